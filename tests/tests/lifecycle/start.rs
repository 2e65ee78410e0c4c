//! Starts that cannot succeed: one clear error, the right exit code, and a pod that is as it was.

use std::fs;

use underpass::spawn::SpawnError;
use underpass_tests::{
    APP, CLIENT, Family, Pod, SERVER, Scene, Settings, Suite, exchange, tool, until,
};

pub(crate) fn add(suite: &mut Suite) {
    suite.test("a port that is taken is named with its setting", taken_ports);
    suite.test("every mistake in the settings is told at once, with exit code 2", bad_settings);
    suite.test("a broken mesh file is told with its place, with exit code 2", bad_mesh);
    suite.test(
        "a certificate that is missing or has expired is told with its file",
        bad_certificate,
    );
    suite.test("without NET_ADMIN it says so and how to grant it", without_net_admin);
    suite.test_with_users(
        "without enough threads it ends with an error and exit code 1",
        without_threads,
    );
    suite.test("where IPv6 is disabled it starts and serves IPv4", without_ipv6);
    suite.test("with ipv6: bypass, IPv6 goes its way", ipv6_bypassed);
    suite.test("with profile: none it installs nothing", profile_none);
    suite.test("what has started holds little of its code", little_code);
}

/// Starts a proxy that must not start: its exit code and what it said. The pod must be without rules.
async fn fails(pod: &Pod, settings: &Settings) -> (Option<i32>, String) {
    let started = pod.try_proxy(settings).await;
    ended(pod, started.err()).await
}

async fn ended(pod: &Pod, error: Option<SpawnError>) -> (Option<i32>, String) {
    let (code, log) = match error {
        Some(SpawnError::Ended { status, log }) => (status.code(), log),
        other => (None, format!("it did not end by itself: {other:?}")),
    };
    assert_eq!(
        tool(pod, "nft", &["list", "ruleset"]).await.ok(),
        "",
        "rules are left; it said:\n{log}"
    );
    for family in ["-4", "-6"] {
        let rules = tool(pod, "ip", &[family, "rule"]).await.ok();
        assert!(!rules.contains("lookup 100"), "an ip rule is left: {rules}");
    }
    (code, log)
}

/// The lines that it wrote to standard error: all others are log lines, and begin with the time.
fn errors(log: &str) -> Vec<&str> {
    log.lines().filter(|line| !line.starts_with("20")).collect()
}

async fn taken_ports() {
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
        let (code, log) = fails(&scene.client, &scene.client_settings()).await;
        assert_eq!(code, Some(1), "{log}");
        let [error] = errors(&log)[..] else { unreachable!("not one line:\n{log}") };
        for part in ["underpass: cannot listen on", &port.to_string(), setting, "another process"] {
            assert!(error.contains(part), "{part:?} is not in {error}");
        }
    }
}

async fn without_threads() {
    let scene = Scene::new().await;
    let settings = Settings::new(CLIENT);
    // Root is exempt. Nothing else runs as this user, whose processes are counted.
    let user = "setpriv --reuid=23456 --regid=23456 --clear-groups --inh-caps=+net_admin --ambient-caps=+net_admin";
    for limit in 1.. {
        let script = format!("exec prlimit --nproc={limit} {user} \"$UNDERPASS\" \"$@\"");
        let Err(error) = scene.client.try_proxy_through(&script, &settings).await else {
            assert!(limit > 4, "{limit} threads are too few");
            break;
        };
        assert!(limit < 20, "{error}");
        // What it had installed stays (interception.on_exit).
        let SpawnError::Ended { status, log } = error else { unreachable!("{error}") };
        assert_eq!(status.code(), Some(1), "{log}");
        let [error] = errors(&log)[..] else { unreachable!("not one line:\n{log}") };
        assert!(error.starts_with("underpass: a thread cannot be started"), "{error}");
    }
}

async fn bad_settings() {
    let scene = Scene::new().await;
    let settings = scene
        .client_settings()
        .set("proxy.workers=none")
        .set("nonsense.key=1")
        .set("timeouts.drain=5");
    let (code, log) = fails(&scene.client, &settings).await;
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
    let (code, log) = fails(&scene.client, &scene.client_settings()).await;
    assert_eq!(code, Some(2), "{log}");
    for part in ["mesh.yaml:2:", "10.0.0.300", "mesh.yaml:3:", "QUIC"] {
        assert!(log.contains(part), "{part:?} is not in {log}");
    }
    fs::remove_file(&scene.mesh).expect("removed");
    let (code, log) = fails(&scene.client, &scene.client_settings()).await;
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
        let (code, log) = fails(&scene.client, &settings).await;
        assert_eq!(code, Some(1), "{log}");
        let [error] = errors(&log)[..] else { unreachable!("not one line:\n{log}") };
        assert!(error.contains(file) && error.contains(reason), "{file} {reason}: {error}");
    }
}

async fn without_net_admin() {
    let scene = Scene::new().await;
    // Present, or `exec` would fail less clearly.
    tool(&scene.client, "setpriv", &["--version"]).await.ok();
    let script =
        "exec setpriv --bounding-set -net_admin --inh-caps -net_admin \"$UNDERPASS\" \"$@\"";
    let started = scene.client.try_proxy_through(script, &scene.client_settings()).await;
    let (code, log) = ended(&scene.client, started.err()).await;
    assert_eq!(code, Some(1), "{log}");
    let [error] = errors(&log)[..] else { unreachable!("not one line:\n{log}") };
    assert!(
        error.contains("NET_ADMIN is missing") && error.contains("--cap-add NET_ADMIN"),
        "{error}"
    );
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
    assert_eq!(peer, client.local_addr().expect("an address"), "nothing is in between");
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
    assert_eq!(peer.ip(), scene.server.ip(Family::V4), "the client is not imitated");
}

async fn little_code() {
    let scene = Scene::new().await;
    let mut proxy = scene.client.proxy(&scene.client_settings()).await;
    let pid = proxy.pid();
    let unmapped = async || {
        let (mapped, resident) = code(pid);
        resident < mapped / 4
    };
    until("most of it is unmapped", unmapped).await;
    // With what an answer needs, which is mapped again by one.
    scene.client.metrics().await;
    let left = code(pid).1;
    // What putting the rules back needs, it needs for that alone.
    tool(&scene.client, "nft", &["delete", "table", "inet", "underpass"]).await.ok();
    proxy.more_than(0, &["another program had changed the rules"]).await;
    until("what that needed is unmapped too", async || code(pid).1 <= left * 5 / 4).await;
    // It goes on all the same.
    assert_eq!(scene.client.metrics().await.sum("underpass_rules_intact", &[]), Some(1.0));
}

/// How much code of files a process has mapped, and how much of it is in memory, in KiB (proc_pid_smaps(5)).
fn code(pid: u32) -> (u64, u64) {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("it runs");
    let (mut is_code, mut mapped, mut resident) = (false, 0, 0);
    for line in maps.lines() {
        let fields: Vec<_> = line.split_ascii_whitespace().collect();
        match fields[..] {
            ["Size:", size, "kB"] if is_code => mapped += size.parse::<u64>().expect("a number"),
            ["Rss:", size, "kB"] if is_code => resident += size.parse::<u64>().expect("a number"),
            [_, permissions, _, _, _, ..] => is_code = permissions == "r-xp",
            _ => {}
        }
    }
    (mapped, resident)
}
