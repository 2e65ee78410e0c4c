//! Tests of starts that fail: one clear error, the right exit code, and an unchanged pod.

use std::fs;

use underpass::spawn::SpawnError;
use underpass_tests::{APP, CLIENT, Family, Pod, SERVER, Scene, Settings, Suite, exchange, tool};

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test("a port in use is reported with its setting", port_in_use);
    suite.test("all mistakes in the settings are reported at once with exit code 2", bad_settings);
    suite.test("a broken mesh file is reported with its location and exit code 2", bad_mesh);
    suite.test("a missing or expired certificate is reported with its file", bad_certificate);
    suite.test("a missing NET_ADMIN is reported with its remedy", without_net_admin);
    suite.test_with_users("a start without enough threads fails with exit code 1", without_threads);
    suite.test("with IPv6 disabled, the proxy serves IPv4", without_ipv6);
    suite.test("with ipv6: bypass, IPv6 is direct", ipv6_bypassed);
    suite.test("with profile: none, the proxy installs nothing", profile_none);
}

/// The exit code and output of a proxy that must fail to start. The pod must be without rules.
async fn failed_start(pod: &Pod, settings: &Settings) -> (Option<i32>, String) {
    let started = pod.try_proxy(settings).await;
    ended(pod, started.err()).await
}

async fn ended(pod: &Pod, error: Option<SpawnError>) -> (Option<i32>, String) {
    let (code, log) = match error {
        Some(SpawnError::Ended { status, log }) => (status.code(), log),
        other => (None, format!("the proxy did not exit: {other:?}")),
    };
    assert_eq!(
        tool(pod, "nft", &["list", "ruleset"]).await.ok(),
        "",
        "rules are left; the log:\n{log}"
    );
    for family in ["-4", "-6"] {
        let rules = tool(pod, "ip", &[family, "rule"]).await.ok();
        assert!(!rules.contains("lookup 100"), "an ip rule is left: {rules}");
    }
    (code, log)
}

/// The lines on standard error that are not log lines, which start with a timestamp.
fn errors(log: &str) -> Vec<&str> {
    log.lines().filter(|line| !line.starts_with("20")).collect()
}

async fn port_in_use() {
    let scene = Scene::new().await;
    let settings = [
        (15001, "proxy.outbound_port"),
        (15006, "proxy.inbound_port"),
        (15008, "proxy.hbone_port"),
        (15020, "metrics.address"),
        (15021, "readiness.address"),
    ];
    for (port, setting) in settings {
        let _taken = scene.client.listen(port);
        let (code, log) = failed_start(&scene.client, &scene.client_settings()).await;
        assert_eq!(code, Some(1), "{log}");
        let [error, hint] = errors(&log)[..] else { unreachable!("not two lines:\n{log}") };
        assert!(error.starts_with("error: cannot listen on"), "{error}");
        assert!(error.contains(&port.to_string()), "{error}");
        assert!(hint.starts_with("hint: stop the other process"), "{hint}");
        assert!(hint.contains(setting), "{hint}");
    }
}

async fn without_threads() {
    let scene = Scene::new().await;
    let settings = Settings::new(CLIENT);
    // Root is exempt from the limit. No other process runs as this user.
    let user = "setpriv --reuid=23456 --regid=23456 --clear-groups --inh-caps=+net_admin --ambient-caps=+net_admin";
    for limit in 1.. {
        let script = format!("exec prlimit --nproc={limit} {user} \"$UNDERPASS\" \"$@\"");
        let Err(error) = scene.client.try_proxy_through(&script, &settings).await else {
            assert!(limit > 4, "{limit} threads are too few");
            break;
        };
        assert!(limit < 20, "{error}");
        // The rules stay (interception.on_exit).
        let SpawnError::Ended { status, log } = error else { unreachable!("{error}") };
        assert_eq!(status.code(), Some(1), "{log}");
        let [error, hint] = errors(&log)[..] else { unreachable!("not two lines:\n{log}") };
        assert!(error.starts_with("error: cannot start a thread"), "{error}");
        assert!(hint.contains("ulimit -u"), "{hint}");
    }
}

async fn bad_settings() {
    let scene = Scene::new().await;
    let settings = scene
        .client_settings()
        .set("proxy.workers=none")
        .set("nonsense.key=1")
        .set("timeouts.drain=5");
    let (code, log) = failed_start(&scene.client, &settings).await;
    assert_eq!(code, Some(2), "{log}");
    for part in ["3 mistakes", "proxy.workers", "nonsense", "timeouts.drain"] {
        assert!(log.contains(part), "{part:?} is not in {log}");
    }
}

async fn bad_mesh() {
    let scene = Scene::new().await;
    fs::write(
        &scene.mesh,
        "workloads:\n- {name: a, workloadIps: [10.0.0.300]}\n- {name: b, protocol: QUIC}\n",
    )
    .expect("written");
    let (code, log) = failed_start(&scene.client, &scene.client_settings()).await;
    assert_eq!(code, Some(2), "{log}");
    for part in ["mesh.yaml:2:", "10.0.0.300", "mesh.yaml:3:", "QUIC"] {
        assert!(log.contains(part), "{part:?} is not in {log}");
    }
    fs::remove_file(&scene.mesh).expect("removed");
    let (code, log) = failed_start(&scene.client, &scene.client_settings()).await;
    assert_eq!(code, Some(2), "{log}");
    assert!(log.contains("mesh.yaml: cannot be read"), "{log}");
}

async fn bad_certificate() {
    let scene = Scene::new().await;
    let expired = scene.pki.issue_expired(CLIENT);
    let mut missing = scene.client_files.clone();
    missing.certificate = scene.world.folder().join("no-such.pem");
    let mut mixed = scene.client_files.clone();
    mixed.key = scene.server_files.key.clone();
    let cases = [
        (expired, "client-expired.pem", "expired at"),
        (missing, "no-such.pem", "No such file"),
        (mixed, "server.key", "does not belong"),
    ];
    for (files, file, reason) in cases {
        let settings = Settings::new(CLIENT).identity(&files).mesh(&scene.mesh);
        let (code, log) = failed_start(&scene.client, &settings).await;
        assert_eq!(code, Some(1), "{log}");
        let [error, hint] = errors(&log)[..] else { unreachable!("not two lines:\n{log}") };
        assert!(hint.starts_with("hint: "), "{hint}");
        assert!(error.contains(file) && error.contains(reason), "{file} {reason}: {error}");
    }
}

async fn without_net_admin() {
    let scene = Scene::new().await;
    // Check that the program exists, because a failure of `exec` would be less clear.
    tool(&scene.client, "setpriv", &["--version"]).await.ok();
    let script =
        "exec setpriv --bounding-set -net_admin --inh-caps -net_admin \"$UNDERPASS\" \"$@\"";
    let started = scene.client.try_proxy_through(script, &scene.client_settings()).await;
    let (code, log) = ended(&scene.client, started.err()).await;
    assert_eq!(code, Some(1), "{log}");
    let [error, hint] = errors(&log)[..] else { unreachable!("not two lines:\n{log}") };
    assert!(error.contains("NET_ADMIN is missing"), "{error}");
    assert!(hint.contains("--cap-add NET_ADMIN"), "{hint}");
}

async fn without_ipv6() {
    let scene = Scene::new().await;
    for pod in [&scene.client, &scene.server] {
        pod.sysctl("net/ipv6/conf/default/disable_ipv6", "1");
        pod.sysctl("net/ipv6/conf/all/disable_ipv6", "1");
    }
    let mut client_proxy = scene.client.proxy(&scene.client_settings()).await;
    let _server_proxy = scene.server.proxy(&scene.server_settings()).await;
    client_proxy.line(&["IPv6 is disabled on the loopback interface"]).await;
    let app = scene.server.listen(APP);
    let (mut client, mut server, peer) = scene.client.meet(&app, scene.app(Family::V4)).await;
    exchange(&mut client, &mut server).await;
    assert_eq!(peer.ip(), scene.client.ip(Family::V4));
    drop((client, server));
    client_proxy.line(&["connection complete", "dst.hbone_addr="]).await;
}

async fn ipv6_bypassed() {
    let scene = Scene::new().await;
    let _client =
        scene.client.proxy(&scene.client_settings().set("interception.ipv6=bypass")).await;
    let app = scene.server.listen(APP);
    let before = scene.client.counters();
    let (client, _, peer) = scene.client.meet(&app, scene.app(Family::V6)).await;
    assert_eq!(peer, client.local_addr().expect("an address"), "the connection is direct");
    assert_eq!(scene.client.connections_since(&before), vec![]);
}

async fn profile_none() {
    let scene = Scene::new().await;
    let settings = scene.server_settings().set("interception.profile=none");
    let _client = scene.client.proxy(&scene.client_settings()).await;
    let _server = scene.server.proxy(&settings).await;
    assert_eq!(tool(&scene.server, "nft", &["list", "ruleset"]).await.ok(), "", "{SERVER}");
    let app = scene.server.listen(APP);
    let (mut client, mut server, peer) = scene.client.meet(&app, scene.app(Family::V4)).await;
    exchange(&mut client, &mut server).await;
    assert_eq!(peer.ip(), scene.server.ip(Family::V4), "the proxy connects from its own address");
}
