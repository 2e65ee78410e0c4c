//! Tests that a network namespace has one proxy: a second one is refused, and `rules verify` and
//! `rules explain` query the running one.

use nix::sys::signal::Signal;
use serde_json::Value;
use underpass::spawn::SpawnError;
use underpass_tests::{Pod, Scene, Settings, Suite, error_of, tool, until};

use crate::{AMBIENT, SIDECAR};

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test(
        "a second proxy with other ports is refused and the first one continues",
        second_refused,
    );
    suite.test("a second proxy in another PID namespace is refused", other_pid_namespace);
    suite.test("a killed proxy does not block the next one", killed_proxy_is_replaced);
    suite.test("`rules install` refuses to replace the rules of a running proxy", install_refused);
    suite.test(
        "`rules verify` and `explain` use the settings of the running proxy",
        query_running_proxy,
    );
    suite.test_with_users(
        "sidecar: `rules verify` and `explain` reach a proxy that switched its user",
        query_sidecar_proxy,
    );
    suite.test(
        "without a proxy, `rules verify` and `explain` print that they assume defaults",
        assume_defaults,
    );
    suite.test(
        "`rules verify` queries the process that has taken over",
        query_proxy_after_take_over,
    );
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| unreachable!("{error}: {text}"))
}

const OTHER_PORTS: [&str; 5] = [
    "proxy.outbound_port=16001",
    "proxy.inbound_port=16006",
    "proxy.hbone_port=16008",
    "readiness.address=[::]:16021",
    "metrics.address=[::]:16020",
];

fn with_other_ports(settings: &Settings) -> Settings {
    OTHER_PORTS.iter().fold(settings.clone(), |settings, port| settings.set(port))
}

/// The error of a refused start.
async fn refused_start(pod: &Pod, script: &str, settings: &Settings) -> String {
    match pod.try_proxy_through(script, settings).await {
        Err(SpawnError::Ended { status, log }) => {
            assert_eq!(status.code(), Some(1), "{log}");
            error_of(&log)
        }
        other => unreachable!("the proxy did not exit: {other:?}"),
    }
}

async fn second_refused() {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let settings = scene.client_settings().set("take_over.socket=off");
    let first = pod.proxy(&settings).await;
    let rules = pod.traces().await;
    let error =
        refused_start(pod, "exec \"$UNDERPASS\" \"$@\"", &with_other_ports(&settings)).await;
    let pid = format!("pid {}", first.pid());
    for part in [&*pid, "profile ambient", "15001, 15006 and 15008", "--take-over"] {
        assert!(error.contains(part), "{part:?} is not in {error}");
    }
    assert_eq!(pod.traces().await, rules, "the rules are unchanged");
    pod.underpass(&["rules", "verify"]).await.ok();
}

async fn other_pid_namespace() {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let settings = scene.client_settings().set("take_over.socket=off");
    let _first = pod.proxy(&settings).await;
    let script = "exec unshare --pid --fork --mount \"$UNDERPASS\" \"$@\"";
    let error = refused_start(pod, script, &with_other_ports(&settings)).await;
    assert!(error.contains("another underpass runs in this network namespace"), "{error}");
}

async fn killed_proxy_is_replaced() {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let settings = scene.client_settings();
    let mut first = pod.proxy(&settings).await;
    first.signal(Signal::SIGKILL);
    first.ended().await;
    let second = pod.proxy(&with_other_ports(&settings)).await;
    let found = json(&pod.underpass(&["rules", "verify", "-o", "json"]).await.ok());
    assert_eq!(found["proxy"]["pid"], second.pid());
}

async fn install_refused() {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let proxy = pod.proxy(&scene.client_settings().set("interception.repair=false")).await;
    let other = SIDECAR.rules();
    for command in ["install", "watch"] {
        let (_, err) = pod.rules(command, &other).await.exited(1);
        for part in [&*format!("pid {}", proxy.pid()), "--force"] {
            assert!(err.contains(part), "{part:?} is not in {err}");
        }
    }
    pod.rules("install --force", &other).await.ok();
    pod.rules("verify", &other).await.ok();
}

async fn query_running_proxy() {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let settings = scene.client_settings();
    let exclude = |port: &str| {
        let text = format!("interception: {{outbound: {{exclude_ports: {port}}}}}");
        settings.clone().section(&text)
    };
    let proxy = pod.proxy(&exclude("5432").set("proxy.outbound_port=15011")).await;
    let out = pod.underpass(&["rules", "verify"]).await.ok();
    let first = out.lines().next().unwrap_or_default();
    for part in [&*format!("pid {}", proxy.pid()), "the running proxy", "15011"] {
        assert!(first.contains(part), "{part:?} is not in {first}");
    }
    let found = json(&pod.underpass(&["rules", "verify", "-o", "json"]).await.ok());
    assert_eq!(found["settings"], "running proxy");
    assert_eq!(found["proxy"]["ports"], serde_json::json!([15011, 15006, 15008]));
    let explained = pod.underpass(&["rules", "explain"]).await.ok();
    assert!(explained.contains("15011") && explained.contains("5432"), "{explained}");
    let explained = json(&pod.underpass(&["rules", "explain", "-o", "json"]).await.ok());
    assert_eq!(explained["settings"], "running proxy");

    // The settings that the proxy has reloaded apply.
    exclude("6432").write(pod);
    let intact = async || {
        let out = pod.underpass(&["rules", "explain"]).await.ok();
        out.contains("6432") && pod.underpass(&["rules", "verify"]).await.status.success()
    };
    until("the proxy has applied its settings", intact).await;

    let given = json(&pod.rules("verify -o json", &AMBIENT.rules()).await.exited(3).0);
    assert_eq!((&given["settings"], &given["proxy"]), (&"given".into(), &Value::Null));
}

async fn query_sidecar_proxy() {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let _proxy = pod.proxy(&SIDECAR.of(scene.client_settings())).await;
    let out = pod.underpass(&["rules", "verify"]).await.ok();
    assert!(out.contains("the running proxy") && out.contains("profile sidecar"), "{out}");
    let owner = tool(pod, "nft", &["list", "chain", "inet", "underpass", "owner"]).await.ok();
    assert!(owner.contains("profile sidecar ports 15001 15006 15008"), "{owner}");
}

async fn assume_defaults() {
    let scene = Scene::new().await;
    let pod = &scene.client;
    const ASSUMED: &str = "no running proxy was found in this network namespace: using the default";
    let (_, err) = pod.underpass(&["rules", "verify"]).await.exited(3);
    assert!(err.contains(ASSUMED), "{err}");
    let explained = pod.underpass(&["rules", "explain", "-o", "json"]).await;
    assert!(explained.err.contains(ASSUMED), "{}", explained.err);
    assert_eq!(json(&explained.ok())["settings"], "defaults");
}

async fn query_proxy_after_take_over() {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let settings = scene.client_settings();
    let mut old = pod.proxy(&settings).await;
    let new = pod.proxy(&settings.clone().take_over()).await;
    old.line(&["another process has taken over"]).await;
    let found = json(&pod.underpass(&["rules", "verify", "-o", "json"]).await.ok());
    assert_eq!(found["proxy"]["pid"], new.pid());
    let owner = tool(pod, "nft", &["list", "chain", "inet", "underpass", "owner"]).await.ok();
    assert!(owner.contains(&format!("pid {} ", new.pid())), "{owner}");
    drop(old);
    let error =
        refused_start(pod, "exec \"$UNDERPASS\" \"$@\"", &with_other_ports(&settings)).await;
    assert!(error.contains(&format!("pid {}", new.pid())), "{error}");
}
