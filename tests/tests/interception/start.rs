//! Tests of the start until readiness: the self-test of the rules, IPv6 settings, and older
//! connections.

use std::io::ErrorKind;

use underpass::spawn::SpawnError;
use underpass_tests::{APP, Family, Scene, Settings, Suite, error_of, exchange, read_to_end, tool};

use crate::{PROFILES, Profile, SIDECAR, plain};

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test(
        "another program's rule that drops packets is detected before readiness",
        dropped_by_preceding_rule,
    );
    suite.test(
        "another program's rule that rejects packets is detected before readiness",
        refused_by_preceding_rule,
    );
    suite.test("ambient: a missing ip rule is detected before readiness", async || {
        broken_return_path(AMBIENT, "rule del pref 32764", 100).await;
    });
    suite.test("ambient: a missing route is detected before readiness", async || {
        broken_return_path(AMBIENT, "route del local default table 100", 100).await;
    });
    suite.test(
        "ambient: a preceding ip rule of another program is detected before readiness",
        async || {
            broken_return_path(AMBIENT, "rule add pref 100 lookup main", 100).await;
        },
    );
    suite.test_with_users(
        "sidecar: a missing ip rule of TPROXY mode is detected before readiness",
        async || {
            broken_return_path(TPROXY, "rule del pref 32765", 133).await;
        },
    );
    suite.test(
        "ambient: the self-test of the return path uses a neighbour's address without a default route",
        async || {
            without_default_route().await;
        },
    );
    suite.test("ambient: replies pass strict reverse path filters", async || {
        reverse_path_filter(AMBIENT, true).await;
    });
    suite.test_with_users(
        "sidecar: replies pass strict reverse path filters in TPROXY mode",
        async || reverse_path_filter(TPROXY, false).await,
    );
    suite.test_with_users(
        "sidecar: the start fails because of src_valid_mark before it changes anything",
        dropped_by_mark,
    );
    for profile in PROFILES {
        profile.test(
            suite,
            "with ipv6: reject, IPv6 is rejected and IPv4 captured",
            async move || {
                ipv6_is_rejected(profile).await;
            },
        );
        profile.test(
            suite,
            "with ipv6: bypass, IPv6 is direct and IPv4 captured",
            async move || {
                ipv6_bypasses(profile).await;
            },
        );
        profile.test(
            suite,
            "a connection that is older than the rules continues",
            async move || {
                let settings = |settings: Settings| profile.of(settings);
                older_connection_survives(settings).await;
            },
        );
    }
    suite.test_with_users(
        "sidecar: a connection that is older than the rules continues in TPROXY mode",
        async || {
            older_connection_survives(|settings| {
                SIDECAR.of(settings).set("interception.inbound.mode=tproxy")
            })
            .await;
        },
    );
}

/// Starts a proxy after another program's rule. Returns the error.
async fn start_behind(rule: &str) -> String {
    let scene = Scene::new().await;
    let table = format!(
        "table inet other {{\nchain o {{\ntype filter hook output priority -400\n{rule}\n}}\n}}"
    );
    tool(&scene.client, "nft", &[&table]).await.ok();
    match scene.client.try_proxy(&scene.client_settings()).await {
        Err(SpawnError::Ended { status, log }) => {
            assert_eq!(status.code(), Some(1), "{log}");
            assert!(!log.contains(" ready"), "{log}");
            error_of(&log)
        }
        other => unreachable!("the proxy did not exit: {other:?}"),
    }
}

async fn dropped_by_preceding_rule() {
    let error = start_behind("tcp dport 1404 drop").await;
    for part in
        ["self-test", "a test connection to ", ":1404 did not arrive", "hint: check", "verify"]
    {
        assert!(error.contains(part), "{part:?} is not in {error}");
    }
}

async fn refused_by_preceding_rule() {
    let error = start_behind("tcp dport 1404 reject with tcp reset").await;
    for part in
        ["self-test", "did not capture a test connection to ", ":1404", "hint: check", "explain"]
    {
        assert!(error.contains(part), "{part:?} is not in {error}");
    }
}

/// Without a default route, the kernel cannot send a reply to an unused address.
async fn without_default_route() {
    let scene = Scene::new().await;
    let settings = scene.server_settings();
    for ip in ["-4", "-6"] {
        tool(&scene.server, "ip", &[ip, "route", "del", "default"]).await.ok();
    }
    let mut proxy = scene.server.proxy(&settings).await;
    assert!(proxy.stop().await.success());
    tool(&scene.server, "ip", &["rule", "del", "pref", "32764"]).await.ok();
    let others = settings.set("interception.install=false");
    match scene.server.try_proxy(&others).await {
        Err(SpawnError::Ended { log, .. }) => assert!(log.contains("would hang"), "{log}"),
        other => unreachable!("the proxy did not exit: {other:?}"),
    }
}

const TPROXY: fn(Settings) -> Settings =
    |settings| SIDECAR.of(settings).set("interception.inbound.mode=tproxy");
const AMBIENT: fn(Settings) -> Settings = |settings| crate::AMBIENT.of(settings);

/// The rules are already installed, and `ip COMMAND` has broken the return path of one family: the
/// start fails.
async fn broken_return_path(of: fn(Settings) -> Settings, command: &str, table: u32) {
    let scene = Scene::new().await;
    let settings = of(scene.server_settings());
    for (ip, client) in [("-4", "192.0.2.2"), ("-6", "2001:db8::2")] {
        scene.server.rules("install", &settings).await.ok();
        let arguments: Vec<_> = [ip].into_iter().chain(command.split(' ')).collect();
        tool(&scene.server, "ip", &arguments).await.ok();
        let started =
            scene.server.try_proxy(&settings.clone().set("interception.install=false")).await;
        let Err(SpawnError::Ended { status, log }) = started else {
            unreachable!("the proxy did not exit: {started:?}")
        };
        assert_eq!(status.code(), Some(1), "{log}");
        let error = error_of(&log);
        let rule = format!("`ip {ip} rule`");
        let to = format!("table {table}");
        for part in ["would hang", client, " within 5 s", &rule, &to, "verify"] {
            assert!(error.contains(part), "{part:?} is not in {error}");
        }
        scene.server.underpass(&["rules", "remove"]).await.ok();
        if command.starts_with("rule add") {
            tool(&scene.server, "ip", &[ip, "rule", "del", "pref", "100"]).await.ok();
        }
    }
}

/// The proxy's packets from a client's address are accepted on loopback, and replies are routed
/// back.
async fn reverse_path_filter(of: fn(Settings) -> Settings, looked_up_by_mark: bool) {
    let scene = Scene::new().await;
    for interface in ["all", "default", "lo", "eth0"] {
        scene.server.sysctl(&format!("net/ipv4/conf/{interface}/rp_filter"), "1");
        if looked_up_by_mark {
            scene.server.sysctl(&format!("net/ipv4/conf/{interface}/src_valid_mark"), "1");
        }
    }
    let _server = scene.server.proxy(&of(scene.server_settings())).await;
    let app = scene.server.listen(APP);
    application_sees_client(&scene, &app).await;
    let _client = scene.client.proxy(&of(scene.client_settings())).await;
    application_sees_client(&scene, &app).await;
}

async fn dropped_by_mark() {
    let scene = Scene::new().await;
    let settings = TPROXY(scene.server_settings());
    let app = scene.server.listen(APP);
    for interface in ["eth0", "all"] {
        let key = format!("net/ipv4/conf/{interface}/src_valid_mark");
        scene.server.sysctl(&key, "1");
        let started = scene.server.try_proxy(&settings).await;
        let Err(SpawnError::Ended { status, log }) = started else {
            unreachable!("the proxy did not exit: {started:?}")
        };
        assert_eq!(status.code(), Some(1), "{log}");
        assert!(
            log.contains("would drop all inbound connections")
                && log.contains("eth0.src_valid_mark"),
            "{log}"
        );
        assert_eq!(tool(&scene.server, "nft", &["list", "ruleset"]).await.ok(), "");
        scene.server.sysctl(&key, "0");
    }
    // The remedy in the hint works.
    scene.server.sysctl("net/ipv4/conf/eth0/src_valid_mark", "1");
    scene.server.sysctl("net/ipv4/conf/eth0/accept_local", "1");
    let _server = scene.server.proxy(&settings).await;
    application_sees_client(&scene, &app).await;
}

async fn application_sees_client(scene: &Scene, app: &underpass_tests::Listener) {
    let (mut client, mut server, peer) = scene.client.meet(app, scene.app(Family::V4)).await;
    exchange(&mut client, &mut server).await;
    assert_eq!(peer.ip(), scene.client.ip(Family::V4));
}

/// Starts a proxy in each pod with an empty mesh and this setting.
async fn both_proxies(
    scene: &Scene,
    profile: Profile,
    assignment: &str,
) -> [underpass_tests::Proxy; 2] {
    let mesh = format!("mesh.file={}", scene.empty_mesh().display());
    let client = plain(scene, profile).set(assignment);
    let server = profile.of(scene.server_settings()).set(&mesh).set(assignment);
    let (client, server) = tokio::join!(scene.client.proxy(&client), scene.server.proxy(&server));
    [client, server]
}

async fn assert_captured_v4(scene: &Scene, profile: Profile, app: &underpass_tests::Listener) {
    let (mut client, mut server, peer) = scene.client.meet(app, scene.app(Family::V4)).await;
    exchange(&mut client, &mut server).await;
    assert_eq!(peer.ip(), profile.peer(Family::V4, scene.client.ip(Family::V4)));
}

async fn ipv6_is_rejected(profile: Profile) {
    let scene = Scene::new().await;
    let proxies = both_proxies(&scene, profile, "interception.ipv6=reject").await;
    let app = scene.server.listen(APP);
    assert_captured_v4(&scene, profile, &app).await;
    // Outbound.
    scene.client.dial_and_be_refused(scene.app(Family::V6)).await;
    drop(proxies);
    tool(&scene.client, "nft", &["flush", "ruleset"]).await.ok();
    // Inbound.
    scene.client.dial_and_be_refused(scene.app(Family::V6)).await;
    assert!(!app.is_reached(), "the application was reached");
    // A connection within the pod is not rejected.
    let (mut client, mut server, _) =
        scene.server.meet(&app, (Family::V6.loopback(), APP).into()).await;
    exchange(&mut client, &mut server).await;
}

async fn ipv6_bypasses(profile: Profile) {
    let scene = Scene::new().await;
    let [mut client_proxy, mut server_proxy] =
        both_proxies(&scene, profile, "interception.ipv6=bypass").await;
    let app = scene.server.listen(APP);
    assert_captured_v4(&scene, profile, &app).await;
    let (mut client, mut server, peer) = scene.client.meet(&app, scene.app(Family::V6)).await;
    exchange(&mut client, &mut server).await;
    assert_eq!(peer, client.local_addr().expect("an address"), "the connection is direct");
    for proxy in [&mut client_proxy, &mut server_proxy] {
        let lines = proxy.access_lines(1).await;
        assert!(!lines.iter().any(|line| line.contains("fd00:")), "{lines:?}");
    }
}

async fn older_connection_survives(with: impl Fn(Settings) -> Settings) {
    let scene = Scene::new().await;
    let app = scene.server.listen(APP);
    let mut older = Vec::new();
    for family in Family::BOTH {
        let (mut client, mut server, peer) = scene.client.meet(&app, scene.app(family)).await;
        exchange(&mut client, &mut server).await;
        assert_eq!(peer, client.local_addr().expect("an address"));
        older.push((client, server));
    }
    let (client, server) = (with(scene.client_settings()), with(scene.server_settings()));
    let _proxies = tokio::join!(scene.client.proxy(&client), scene.server.proxy(&server));
    for (mut client, mut server) in older {
        exchange(&mut client, &mut server).await;
        drop(client);
        assert_eq!(read_to_end(&mut server).await.0, b"");
        assert_ne!(
            server.peer_addr().map_err(|error| error.kind()),
            Err(ErrorKind::ConnectionReset)
        );
    }
}
