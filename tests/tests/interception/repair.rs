//! Tests of rules that another program changes: they are repaired, and the repair is logged.

use nix::sys::signal::Signal;
use underpass_tests::{Pod, Proxy, Scene, Settings, Suite, binary, tool, until};

use crate::{AMBIENT, OSM, Profile, SIDECAR};

const CHANGED: &[&str] = &["repaired the rules, which another program had changed"];
const REPAIRS: &str = "underpass_rules_repairs_total";
const INTACT: &str = "underpass_rules_intact";

pub(crate) fn add_tests(suite: &mut Suite) {
    for profile in [AMBIENT, SIDECAR, OSM] {
        profile.test(suite, "rules that another program changes are repaired", async move || {
            rules_repaired(profile).await;
        });
    }
    suite.test("ambient: removed ip rules and routes are restored", routes_restored);
    suite.test(
        "ambient: a failure to repair the rules is logged as an error if it lasts",
        lasting_failure_logged,
    );
    suite.test_with_users("sidecar: the removed loopback address is restored", address_restored);
    for profile in [AMBIENT, SIDECAR] {
        profile.test(
            suite,
            "with iptables, rules that another program changes are repaired",
            async move || {
                iptables_repaired(profile).await;
            },
        );
        profile.test(
            suite,
            "with iptables-legacy, changed rules are repaired without kernel notifications",
            async move || legacy_repaired(profile).await,
        );
    }
    suite.test(
        "a proxy with repair: false logs that traffic may leave in plaintext",
        reports_unrepaired_rules,
    );
    suite.test("`rules watch` installs, repairs, and ends at a stop signal", watch);
}

/// Changes the rules by `command`, and waits for the repair and its log line.
async fn assert_repaired(pod: &Pod, proxy: &Proxy, settings: &Settings, command: &str) {
    let repairs = pod.metrics().await.sum(REPAIRS, &[]).expect("a count");
    tool(pod, "sh", &["-ec", command]).await.ok();
    let counted = async || pod.metrics().await.sum(REPAIRS, &[]) > Some(repairs);
    until(&format!("a repair is counted after {command}"), counted).await;
    until("the repair is logged", async || proxy.count(CHANGED) > 0).await;
    let intact = async || pod.rules("verify", settings).await.status.success();
    until(&format!("the rules are repaired after {command}"), intact).await;
    // A third change within seconds counts as a fight, which ends after 2 s without a change.
    let counted = async || pod.metrics().await.sum(INTACT, &[]) == Some(1.0);
    until(&format!("the rules are intact after {command}"), counted).await;
}

/// Container runtimes disable the loopback interface of a pod before they delete it.
async fn lasting_failure_logged() {
    let scene = Scene::new().await;
    let settings = scene.client_settings().set("logging.filter=debug,h2=off");
    let mut proxy = scene.client.proxy(&settings).await;
    tool(&scene.client, "ip", &["link", "set", "lo", "down"]).await.ok();
    proxy.line(&["DEBUG", "cannot watch or repair the rules once", "loopback"]).await;
    proxy.line(&["ERROR", "cannot watch or repair the rules, retrying", "loopback"]).await;
    tool(&scene.client, "ip", &["link", "set", "lo", "up"]).await.ok();
    proxy.line(CHANGED).await;
}

/// The first rule of the first chain with two rules: chain, handle and text.
async fn first_rule(pod: &Pod) -> (String, String, String) {
    let listing = ["--stateless", "--handle", "list", "table", "inet", "underpass"];
    let text = tool(pod, "nft", &listing).await.ok();
    let (mut chain, mut rules) = (String::new(), Vec::new());
    for line in text.lines().map(str::trim) {
        if let Some(head) = line.strip_prefix("chain ") {
            chain = head.split(' ').next().expect("a name").to_owned();
            rules.clear();
        } else if line.contains(" comment ") {
            rules.extend(line.rsplit_once(" # handle "));
        }
        if let [(rule, handle), _] = rules[..] {
            return (chain, handle.to_owned(), rule.to_owned());
        }
    }
    unreachable!("no chain has two rules:\n{text}")
}

async fn rules_repaired(profile: Profile) {
    let scene = Scene::new().await;
    let settings = profile.of(scene.client_settings());
    let proxy = scene.client.proxy(&settings).await;
    let pod = &scene.client;
    let before = pod.traces().await;
    for command in ["nft flush ruleset", "nft delete table inet underpass"] {
        assert_repaired(pod, &proxy, &settings, command).await;
    }
    let (chain, handle, _) = first_rule(pod).await;
    let delete = format!("nft delete rule inet underpass {chain} handle {handle}");
    assert_repaired(pod, &proxy, &settings, &delete).await;
    let add = format!("nft insert rule inet underpass {chain} accept");
    assert_repaired(pod, &proxy, &settings, &add).await;
    let (chain, handle, rule) = first_rule(pod).await;
    let reorder = format!(
        "nft -f - <<'END'\ndelete rule inet underpass {chain} handle {handle}\nadd rule inet underpass {chain} {rule}\nEND"
    );
    assert_repaired(pod, &proxy, &settings, &reorder).await;
    let chain = "nft add chain inet underpass another '{ type filter hook output priority 0; }'";
    assert_repaired(pod, &proxy, &settings, chain).await;
    assert_eq!(pod.traces().await, before);
}

async fn routes_restored() {
    let scene = Scene::new().await;
    let settings = scene.client_settings();
    let proxy = scene.client.proxy(&settings).await;
    let before = scene.client.traces().await;
    for family in ["-4", "-6"] {
        for removal in ["rule del pref 32764", "route del local default dev lo table 100"] {
            let command = format!("ip {family} {removal}");
            assert_repaired(&scene.client, &proxy, &settings, &command).await;
        }
    }
    assert_eq!(scene.client.traces().await, before);
}

async fn address_restored() {
    let scene = Scene::new().await;
    let settings = SIDECAR.of(scene.client_settings());
    let proxy = scene.client.proxy(&settings).await;
    assert_repaired(&scene.client, &proxy, &settings, "ip -6 address del ::6/128 dev lo").await;
}

async fn iptables_repaired(profile: Profile) {
    let scene = Scene::new().await;
    let settings = profile.of(scene.client_settings()).set("interception.backend=iptables");
    let proxy = scene.client.proxy(&settings).await;
    for command in [
        "iptables-nft -t nat -D OUTPUT 1",
        "iptables-nft -t nat -I ISTIO_OUTPUT -j ACCEPT",
        "ip6tables-nft -t nat -F",
        "nft flush ruleset",
    ] {
        assert_repaired(&scene.client, &proxy, &settings, command).await;
    }
}

async fn legacy_repaired(profile: Profile) {
    let scene = Scene::new().await;
    let settings = profile.of(scene.client_settings()).set("interception.backend=iptables-legacy");
    let proxy = scene.client.proxy(&settings).await;
    let command = "iptables-legacy -t nat -F ISTIO_OUTPUT; ip6tables-legacy -t nat -D OUTPUT 1";
    assert_repaired(&scene.client, &proxy, &settings, command).await;
}

async fn reports_unrepaired_rules() {
    let scene = Scene::new().await;
    let settings = scene.client_settings().set("interception.repair=false");
    let mut proxy = scene.client.proxy(&settings).await;
    tool(&scene.client, "nft", &["delete", "table", "inet", "underpass"]).await.ok();
    assert_eq!(proxy.stop().await.code(), Some(0));
    proxy.line(&["ERROR", "traffic may leave in plain"]).await;
}

async fn watch() {
    let scene = Scene::new().await;
    let settings = SIDECAR.rules();
    let arguments = settings.arguments(&scene.client);
    let arguments: Vec<_> =
        ["rules", "watch"].into_iter().chain(arguments.iter().map(String::as_str)).collect();
    let watch = scene.client.background(binary(), &arguments);
    let intact = async || scene.client.rules("verify", &settings).await.status.success();
    until("the rules are installed", intact).await;
    tool(&scene.client, "ip", &["-6", "address", "del", "::6/128", "dev", "lo"]).await.ok();
    until("the address is restored", intact).await;
    tool(&scene.client, "nft", &["delete", "table", "inet", "underpass"]).await.ok();
    until("the rules are repaired", intact).await;
    watch.signal(Signal::SIGTERM);
    let (out, err) = watch.ended().await.exited(0);
    assert_eq!(err, "");
    // The program may be stopped before it prints the last repair.
    assert!(out.matches("repaired in ").count() >= 2, "{out}");
    assert!(out.contains("- ip -6 addr add ::6/128 dev lo"), "{out}");
    scene.client.rules("verify", &settings).await.ok();
}
