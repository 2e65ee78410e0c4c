//! Tests of foreign rules that precede underpass's: the self-test detects bypassed traffic, and the
//! error lists these rules.

use underpass::spawn::SpawnError;
use underpass_tests::{Pod, Proxy, Scene, Settings, Suite, error_of, tool, until};

use crate::{AMBIENT, OSM, Profile, SIDECAR, readiness};

const FAILED: &[&str] = &["ERROR", "the self-test of the rules failed"];
const PASSED: &str = "underpass_self_test_passed";
const FOREIGN: &str = "underpass_foreign_rules";

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test(
        "ambient: another program's mark makes the proxy unready until it is removed",
        async || {
            bypass_makes_proxy_unready(
                AMBIENT,
                "type route hook output priority -200",
                "meta mark set 0x539",
            )
            .await;
        },
    );
    for profile in [SIDECAR, OSM] {
        profile.test(
            suite,
            "another program's redirect makes the proxy unready until it is removed",
            async move || {
                let chain = "type nat hook output priority -150";
                bypass_makes_proxy_unready(profile, chain, "tcp dport 1404 redirect to :1").await;
            },
        );
    }
    suite.test(
        "a foreign rule that does not affect the self-test is listed and sets exit code 3",
        harmless_rule_is_listed,
    );
    suite.test("another program's counters are not reported", counters);
    suite.test(
        "a mark in a table of iptables-legacy makes the proxy unready",
        legacy_table_makes_proxy_unready,
    );
    suite.test("a start that fails because of Istio's chains names them", istio_is_named);
    suite.test("`rules remove` removes Istio's chains only with --other-meshes", istio_is_removed);
}

async fn nft(pod: &Pod, command: &str) {
    tool(pod, "nft", &[command]).await.ok();
}

/// Adds a table of another program with one rule.
async fn add_rule(pod: &Pod, chain: &str, rule: &str) {
    nft(pod, &format!("table inet other {{\nchain theirs {{\n{chain}\n{rule}\n}}\n}}")).await;
}

/// Waits until the self-test after a change has this result.
async fn self_test(pod: &Pod, passed: bool) {
    let expected = Some(if passed { 1.0 } else { 0.0 });
    let tested = async || pod.metrics().await.sum(PASSED, &[]) == expected;
    until(&format!("a self-test has passed: {passed}"), tested).await;
}

async fn bypass_makes_proxy_unready(profile: Profile, chain: &str, rule: &str) {
    let scene = Scene::new().await;
    let (pod, settings) = (&scene.client, profile.of(scene.client_settings()));
    let mut proxy = pod.proxy(&settings).await;
    for _ in 0..2 {
        let failures = proxy.count(FAILED);
        add_rule(pod, chain, rule).await;
        self_test(pod, false).await;
        let (status, why) = readiness(pod).await;
        assert_eq!((status, &*why), (503, "not ready: the self-test of the rules failed\n"));
        proxy.more_than(failures, FAILED).await;
        let line = proxy.line(FAILED).await;
        assert!(line.contains("table inet other, chain theirs"), "{line}");
        let counted = async || pod.metrics().await.sum(FOREIGN, &[]) == Some(1.0);
        until("the foreign rule is counted", counted).await;
        let (out, err) = pod.underpass(&["rules", "verify"]).await.exited(3);
        assert!(out.contains("table inet other, chain theirs"), "{out}");
        assert!(err.contains("self-test of the running proxy failed"), "{err}");

        nft(pod, "delete table inet other").await;
        self_test(pod, true).await;
        assert_eq!(readiness(pod).await.0, 200);
        pod.rules("verify", &settings).await.ok();
    }
    assert_eq!(proxy.count(&["repaired"]), 0, "the own rules were intact");
}

async fn harmless_rule_is_listed() {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let mut proxy = pod.proxy(&scene.client_settings()).await;
    add_rule(pod, "type route hook output priority -200", "tcp dport 8080 meta mark set 0x539")
        .await;
    proxy.line(&["WARN", "precedes the rules of underpass", "8080"]).await;
    let (out, err) = pod.underpass(&["rules", "verify", "-o", "json"]).await.exited(3);
    let found: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(found["same"], true, "{out}");
    assert_eq!(found["foreign"][0]["effect"], "sets the proxy's mark", "{out}");
    assert!(err.contains("other rules bypass them"), "{err}");
    self_test(pod, true).await;
    assert_eq!(readiness(pod).await.0, 200);
}

async fn counters() {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let proxy = pod.proxy(&scene.client_settings()).await;
    add_rule(pod, "type filter hook output priority -400", "tcp dport 8080 counter").await;
    self_test(pod, true).await;
    let out = pod.underpass(&["rules", "verify"]).await.ok();
    assert!(!out.contains("other"), "{out}");
    assert_eq!(proxy.count(&["precedes the rules"]), 0, "{}", proxy.log());
}

async fn legacy_table_makes_proxy_unready() {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let _proxy: Proxy = pod.proxy(&scene.client_settings()).await;
    let rule = "-t mangle -A OUTPUT -p tcp -j MARK --set-mark 0x539";
    let arguments: Vec<_> = rule.split(' ').collect();
    tool(pod, "iptables-legacy", &arguments).await.ok();
    self_test(pod, false).await;
    let (out, _) = pod.underpass(&["rules", "verify"]).await.exited(3);
    assert!(out.contains("table mangle of iptables-legacy, chain OUTPUT"), "{out}");
}

/// Chains in the form of an Istio sidecar's, changed to treat all traffic as the proxy's.
const ISTIO: &str = "iptables-nft -t mangle -N ISTIO_OUTPUT
iptables-nft -t mangle -A OUTPUT -j ISTIO_OUTPUT
iptables-nft -t mangle -A ISTIO_OUTPUT -p tcp -j MARK --set-mark 0x539
ip rule add fwmark 0x111/0xfff pref 32764 lookup 100
ip route add local default dev lo table 100";

async fn istio_is_named() {
    let scene = Scene::new().await;
    tool(&scene.client, "sh", &["-ec", ISTIO]).await.ok();
    let error = match scene.client.try_proxy(&scene.client_settings()).await {
        Err(SpawnError::Ended { log, .. }) => log,
        other => unreachable!("the proxy did not exit: {other:?}"),
    };
    let error = error_of(&error);
    for part in ["self-test", "ISTIO_OUTPUT", "fwmark 0x111/0xfff", "Istio"] {
        assert!(error.contains(part), "{part:?} is not in {error}");
    }
}

async fn istio_is_removed() {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let before = pod.traces().await;
    tool(pod, "sh", &["-ec", ISTIO]).await.ok();
    let istios = pod.traces().await;
    let settings: Settings = AMBIENT.rules();
    pod.rules("install", &settings).await.ok();
    assert_eq!(pod.underpass(&["rules", "remove"]).await.ok(), "removed\n");
    assert_eq!(pod.traces().await, istios, "Istio's chains stay");
    pod.underpass(&["rules", "remove", "--other-meshes"]).await.ok();
    assert_eq!(pod.traces().await, before);
}
