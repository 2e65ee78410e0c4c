//! From the first rule to `ready`: the test of the rules, IPv6 by each of its settings, and connections that are older.

use std::io::ErrorKind;

use underpass::spawn::SpawnError;
use underpass_tests::{APP, Family, Scene, Settings, Suite, exchange, read_to_end, tool};

use crate::{PROFILES, Profile, SIDECAR, plain};

pub(crate) fn add(suite: &mut Suite) {
    suite.test("rules that come before and drop are found before it is ready", dropped_before);
    suite.test("rules that come before and refuse are found before it is ready", refused_before);
    suite.test("ambient: an ip rule that is missing is found before it is ready", async || {
        no_way_back(AMBIENT, "rule del pref 32764", 100).await;
    });
    suite.test("ambient: so is a route", async || {
        no_way_back(AMBIENT, "route del local default table 100", 100).await;
    });
    suite.test("ambient: so is another program's ip rule that comes first", async || {
        no_way_back(AMBIENT, "rule add pref 100 lookup main", 100).await;
    });
    suite.test_with_users("sidecar: so is an ip rule that TPROXY mode needs", async || {
        no_way_back(TPROXY, "rule del pref 32765", 133).await;
    });
    suite.test(
        "ambient: without a default route the same is tested with a neighbour",
        async || {
            without_default_route().await;
        },
    );
    suite.test("ambient: answers come back past strict reverse path filters", async || {
        filtered(AMBIENT, true).await;
    });
    suite.test_with_users("sidecar: in TPROXY mode too", async || filtered(TPROXY, false).await);
    suite.test_with_users(
        "sidecar: a kernel that drops what TPROXY marks is found before anything is changed",
        dropped_by_mark,
    );
    for profile in PROFILES {
        profile.test(
            suite,
            "with ipv6: reject, IPv6 is refused and IPv4 caught",
            async move || {
                rejected(profile).await;
            },
        );
        profile.test(
            suite,
            "with ipv6: bypass, IPv6 goes its way and IPv4 is caught",
            async move || {
                bypassed(profile).await;
            },
        );
        profile.test(suite, "a connection that is older than the rules goes on", async move || {
            let settings = |settings: Settings| profile.of(settings);
            survives(settings).await;
        });
    }
    suite.test_with_users("sidecar: in TPROXY mode too it goes on", async || {
        survives(|settings| SIDECAR.of(settings).set("interception.inbound.mode=tproxy")).await;
    });
}

/// Starts a proxy where another program has this rule before everybody's: what it says when it gives up.
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
            let errors: Vec<_> =
                log.lines().filter(|line| line.starts_with("underpass: ")).collect();
            let [error] = errors[..] else { unreachable!("not one error:\n{log}") };
            error.to_owned()
        }
        other => unreachable!("it did not end by itself: {other:?}"),
    }
}

async fn dropped_before() {
    let error = start_behind("tcp dport 1404 drop").await;
    for part in
        ["the rules do not work", "a test connection to ", ":1404 did not come back", "verify"]
    {
        assert!(error.contains(part), "{part:?} is not in {error}");
    }
}

async fn refused_before() {
    let error = start_behind("tcp dport 1404 reject with tcp reset").await;
    for part in
        ["the rules do not work", "a test connection to ", ":1404 could not be made", "explain"]
    {
        assert!(error.contains(part), "{part:?} is not in {error}");
    }
}

/// Nobody's address has no route there: an answer to it would not even be sent.
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
        other => unreachable!("it did not end by itself: {other:?}"),
    }
}

const TPROXY: fn(Settings) -> Settings =
    |settings| SIDECAR.of(settings).set("interception.inbound.mode=tproxy");
const AMBIENT: fn(Settings) -> Settings = |settings| crate::AMBIENT.of(settings);

/// The rules are someone else's, and what returns answers was changed by `ip COMMAND`, of one family: the start fails.
async fn no_way_back(of: fn(Settings) -> Settings, command: &str, table: u32) {
    let scene = Scene::new().await;
    let settings = of(scene.server_settings());
    for (ip, client) in [("-4", "192.0.2.2"), ("-6", "2001:db8::2")] {
        scene.server.rules("install", &settings).await.ok();
        let arguments: Vec<_> = [ip].into_iter().chain(command.split(' ')).collect();
        tool(&scene.server, "ip", &arguments).await.ok();
        let started =
            scene.server.try_proxy(&settings.clone().set("interception.install=false")).await;
        let Err(SpawnError::Ended { status, log }) = started else {
            unreachable!("it did not end by itself: {started:?}")
        };
        assert_eq!(status.code(), Some(1), "{log}");
        let error = log.lines().find(|line| line.starts_with("underpass: ")).unwrap_or_default();
        let rule = format!("`ip {ip} rule`");
        let to = format!("to table {table}");
        for part in ["would hang", client, " for 5 s", &rule, &to, "verify"] {
            assert!(error.contains(part), "{part:?} is not in {error}");
        }
        scene.server.underpass(&["rules", "remove"]).await.ok();
        if command.starts_with("rule add") {
            tool(&scene.server, "ip", &[ip, "rule", "del", "pref", "100"]).await.ok();
        }
    }
}

/// What a proxy sends for a client over loopback is no stranger there, and answers are routed here.
async fn filtered(of: fn(Settings) -> Settings, looked_up_by_mark: bool) {
    let scene = Scene::new().await;
    for interface in ["all", "default", "lo", "eth0"] {
        scene.server.sysctl(&format!("net/ipv4/conf/{interface}/rp_filter"), "1");
        if looked_up_by_mark {
            scene.server.sysctl(&format!("net/ipv4/conf/{interface}/src_valid_mark"), "1");
        }
    }
    let _server = scene.server.proxy(&of(scene.server_settings())).await;
    let app = scene.server.listen(APP);
    sees_its_client(&scene, &app).await;
    let _client = scene.client.proxy(&of(scene.client_settings())).await;
    sees_its_client(&scene, &app).await;
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
            unreachable!("it did not end by itself: {started:?}")
        };
        assert_eq!(status.code(), Some(1), "{log}");
        assert!(log.contains("would hang") && log.contains("eth0.src_valid_mark"), "{log}");
        assert_eq!(tool(&scene.server, "nft", &["list", "ruleset"]).await.ok(), "");
        scene.server.sysctl(&key, "0");
    }
    // The way out that it names is one.
    scene.server.sysctl("net/ipv4/conf/eth0/src_valid_mark", "1");
    scene.server.sysctl("net/ipv4/conf/eth0/accept_local", "1");
    let _server = scene.server.proxy(&settings).await;
    sees_its_client(&scene, &app).await;
}

async fn sees_its_client(scene: &Scene, app: &underpass_tests::Listener) {
    let (mut client, mut server, peer) = scene.client.meet(app, scene.app(Family::V4)).await;
    exchange(&mut client, &mut server).await;
    assert_eq!(peer.ip(), scene.client.ip(Family::V4));
}

/// A proxy in each pod, in a mesh without members, with this setting.
async fn both(scene: &Scene, profile: Profile, assignment: &str) -> [underpass_tests::Proxy; 2] {
    let mesh = format!("mesh.file={}", scene.empty_mesh().display());
    let client = plain(scene, profile).set(assignment);
    let server = profile.of(scene.server_settings()).set(&mesh).set(assignment);
    let (client, server) = tokio::join!(scene.client.proxy(&client), scene.server.proxy(&server));
    [client, server]
}

async fn caught_v4(scene: &Scene, profile: Profile, app: &underpass_tests::Listener) {
    let (mut client, mut server, peer) = scene.client.meet(app, scene.app(Family::V4)).await;
    exchange(&mut client, &mut server).await;
    assert_eq!(peer.ip(), profile.peer(Family::V4, scene.client.ip(Family::V4)));
}

async fn rejected(profile: Profile) {
    let scene = Scene::new().await;
    let proxies = both(&scene, profile, "interception.ipv6=reject").await;
    let app = scene.server.listen(APP);
    caught_v4(&scene, profile, &app).await;
    // On its way out.
    scene.client.dial_and_be_refused(scene.app(Family::V6)).await;
    drop(proxies);
    tool(&scene.client, "nft", &["flush", "ruleset"]).await.ok();
    // On its way in.
    scene.client.dial_and_be_refused(scene.app(Family::V6)).await;
    assert!(!app.is_reached(), "the application was reached");
    // The pod itself is no stranger.
    let (mut client, mut server, _) =
        scene.server.meet(&app, (Family::V6.loopback(), APP).into()).await;
    exchange(&mut client, &mut server).await;
}

async fn bypassed(profile: Profile) {
    let scene = Scene::new().await;
    let [mut client_proxy, mut server_proxy] =
        both(&scene, profile, "interception.ipv6=bypass").await;
    let app = scene.server.listen(APP);
    caught_v4(&scene, profile, &app).await;
    let (mut client, mut server, peer) = scene.client.meet(&app, scene.app(Family::V6)).await;
    exchange(&mut client, &mut server).await;
    assert_eq!(peer, client.local_addr().expect("an address"), "nothing is in between");
    for proxy in [&mut client_proxy, &mut server_proxy] {
        let lines = proxy.access_lines(1).await;
        assert!(!lines.iter().any(|line| line.contains("fd00:")), "{lines:?}");
    }
}

async fn survives(with: impl Fn(Settings) -> Settings) {
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
