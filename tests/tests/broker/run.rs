//! `underpass run` as two processes: their privileges, traffic, repair, reports, hot restart, and
//! the end of either.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;

use nix::sys::signal::Signal;
use underpass::spawn::SpawnError;
use underpass_interception::TABLE;
use underpass_tests::{
    APP, CLIENT, Family, Mesh, Pod, Proxy, Scene, Server, Settings, Suite, exchange, http_get,
    read_to_end, tool, until,
};

use crate::{Process, assert_broker, assert_unprivileged, child, is_running, send, stopped};

/// The bit of NET_ADMIN (include/uapi/linux/capability.h).
const NET_ADMIN: u64 = 1 << 12;
const REPAIRED: &str = "repaired the rules, which another program had changed";

/// The profiles, with the user of the proxy process.
const PROFILES: [(&str, u32); 3] = [("ambient", 15008), ("sidecar", 1337), ("osm", 1500)];

pub(crate) fn add_tests(suite: &mut Suite) {
    for (profile, user) in PROFILES {
        suite.test_with_users(
            &format!(
                "run, {profile}: proxy process without capabilities serves tunnels and plaintext"
            ),
            async move || serves(profile, user).await,
        );
        for one in [Process::Broker, Process::Proxy] {
            suite.test_with_users(
                &format!("run, {profile}: killed {one:?} process ends the other one and the pod stays closed"),
                async move || killed(profile, one).await,
            );
        }
        suite.test_with_users(
            &format!("run, {profile}: hot restart between one process and two keeps connections"),
            async move || takes_over(profile).await,
        );
    }
    suite.test_with_users("run: endpoints show rules and metrics of the broker", endpoints);
    suite.test_with_users("run: broker passes renewed certificate files on", renews);
    suite.test_with_users("run: broker drains the connections of the proxy process", drains);
    suite.test_with_users("run: unusable certificate ends the start without rules", no_certificate);
    suite
        .test_with_users("run: unreadable mesh file makes one process with a warning", one_process);
}

fn with_broker(settings: Settings, profile: &str) -> Settings {
    settings.set("privileges.broker=auto").set(&format!("interception.profile={profile}"))
}

async fn start(scene: &Scene, profile: &str) -> (Proxy, Proxy) {
    let (client, server) = (scene.client_settings(), scene.server_settings());
    let (client, server) = (with_broker(client, profile), with_broker(server, profile));
    tokio::join!(scene.client.proxy(&client), scene.server.proxy(&server))
}

fn proxy_of(broker: &Proxy) -> u32 {
    child(broker).expect("a proxy process")
}

async fn has_rules(pod: &Pod) -> bool {
    tool(pod, "nft", &["list", "table", "inet", TABLE]).await.status.success()
}

async fn serves(profile: &str, user: u32) {
    let scene = Scene::new().await;
    let outside = scene.server.at(Family::V4, APP + 1);
    let (mut client, server) = start(&scene, profile).await;
    for broker in [&client, &server] {
        assert_unprivileged(proxy_of(broker), user);
        assert_broker(broker.pid(), NET_ADMIN);
    }
    for family in Family::BOTH {
        scene.connected(family).await;
    }
    assert_eq!(
        client.access_lines(2).await.iter().filter(|line| line.contains("15008")).count(),
        2
    );
    let before = client.count(&[REPAIRED]);
    tool(&scene.client, "nft", &["flush", "ruleset"]).await.ok();
    client.more_than(before, &[REPAIRED]).await;
    scene.connected(Family::V4).await;
    // Without a proxy at the other side, the mesh's protocol is plaintext.
    let proxy = proxy_of(&server);
    stopped(server, proxy).await;
    tool(&scene.server, "nft", &["flush", "ruleset"]).await.ok();
    scene.set_mesh(&Mesh::default().hbone(&scene.client).tcp(&scene.server));
    client.line(&["the change of the mesh is in force"]).await;
    let app = scene.server.listen(APP + 1);
    let (mut one, mut other, _) = scene.client.meet(&app, outside).await;
    exchange(&mut one, &mut other).await;
    let proxy = proxy_of(&client);
    stopped(client, proxy).await;
    assert!(has_rules(&scene.client).await, "interception.on_exit is keep");
}

async fn killed(profile: &str, one: Process) {
    let scene = Scene::new().await;
    let (mut client, _server) = start(&scene, profile).await;
    drop(scene.connected(Family::V4).await);
    let (broker, proxy) = (client.pid(), proxy_of(&client));
    let (killed, other) = match one {
        Process::Broker => (broker, proxy),
        Process::Proxy => (proxy, broker),
    };
    send(killed, Signal::SIGKILL);
    let status = client.ended().await;
    if one == Process::Proxy {
        assert_eq!(status.code(), Some(1), "{status}");
        assert!(client.log().contains("the proxy process has ended"), "{}", client.log());
    }
    until("both processes have ended", async || !is_running(other) && !is_running(killed)).await;
    assert!(has_rules(&scene.client).await, "the pod stays closed");
    let app = scene.server.listen(APP);
    scene.client.dial_and_be_refused(scene.app(Family::V4)).await;
    assert!(!app.is_reached(), "no plaintext");
    drop(app);
    let client = scene.client.proxy(&with_broker(scene.client_settings(), profile)).await;
    drop(scene.connected(Family::V4).await);
    let proxy = proxy_of(&client);
    stopped(client, proxy).await;
}

async fn takes_over(profile: &str) {
    let scene = Scene::new().await;
    let two = with_broker(scene.client_settings(), profile);
    let one = two.clone().set("privileges.broker=off");
    let _server = scene.server.proxy(&scene.server_settings()).await;
    let _echo = Server::echo(&scene.server, APP + 1);
    let app = scene.server.listen(APP);
    let mut old = scene.client.proxy(&one).await;
    let rules = scene.client.traces().await;
    for next in [&two, &two, &one, &two] {
        let (mut stream, mut peer, _) = scene.client.meet(&app, scene.app(Family::V4)).await;
        exchange(&mut stream, &mut peer).await;
        let proxy = child(&old);
        let new = scene.client.proxy(&next.clone().take_over()).await;
        old.line(&["another process has taken over", &format!("pid={}", new.pid())]).await;
        assert_eq!(scene.client.traces().await, rules, "the rules are unchanged");
        exchange(&mut stream, &mut peer).await;
        scene.echoed_at(scene.server.at(Family::V4, APP + 1)).await;
        assert_eq!(old.count(&["connection failed"]), 0, "{}", old.log());
        drop(stream);
        read_to_end(&mut peer).await;
        drop(peer);
        assert!(old.ended().await.success(), "{}", old.log());
        if let Some(proxy) = proxy {
            assert!(!is_running(proxy), "the old proxy process has ended");
        }
        old = new;
    }
    let (status, text) = ready(&scene.client).await;
    assert_eq!((status, &*text), (200, "ready\n"));
}

async fn ready(pod: &Pod) -> (u16, String) {
    http_get(pod, SocketAddr::from((Ipv4Addr::LOCALHOST, 15021)), "/healthz/ready").await
}

async fn endpoints() {
    let scene = Scene::new().await;
    let (mut client, _server) = start(&scene, "ambient").await;
    assert_eq!(ready(&scene.client).await, (200, "ready\n".to_owned()));
    let metrics = async || {
        let at = SocketAddr::from((Ipv4Addr::LOCALHOST, 15020));
        http_get(&scene.client, at, "/metrics").await.1
    };
    tool(&scene.client, "nft", &["flush", "ruleset"]).await.ok();
    client.line(&[REPAIRED]).await;
    until("the metrics of the broker have arrived", async || {
        let metrics = metrics().await;
        metrics.contains("underpass_rules_repairs_total 1")
            && metrics.contains("underpass_rules_intact 1")
    })
    .await;
    // A self-test that runs while the rules are lost fails, and is repeated.
    until("the proxy is healthy", async || {
        scene.client.underpass(&["status"]).await.status.success()
    })
    .await;
    let status = scene.client.underpass(&["status"]).await.ok();
    for part in ["healthy", "verified", "passed"] {
        assert!(status.contains(part), "{part} is missing: {status}");
    }
    scene.client.underpass(&["rules", "verify"]).await.ok();
    let rules = scene.client.underpass(&["admin", "get", "/rules"]).await.ok();
    assert!(rules.contains("prerouting"), "{rules}");
    // A rule of another program lets connections bypass the proxy.
    let chain = "type route hook output priority -200\nmeta mark set 0x539";
    let table = format!("table inet other {{\nchain theirs {{\n{chain}\n}}\n}}");
    tool(&scene.client, "nft", &[&table]).await.ok();
    let unready = (503, "not ready: the self-test of the rules failed\n".to_owned());
    until("the process is unready", async || ready(&scene.client).await == unready).await;
    let (_, err) = scene.client.underpass(&["rules", "verify"]).await.exited(3);
    assert!(err.contains("self-test of the running proxy failed"), "{err}");
    tool(&scene.client, "nft", &["delete", "table", "inet", "other"]).await.ok();
    until("the process is ready again", async || ready(&scene.client).await.0 == 200).await;
    let proxy = proxy_of(&client);
    stopped(client, proxy).await;
}

async fn renews() {
    let scene = Scene::new().await;
    let key = fs::metadata(&scene.client_files.key).expect("the key");
    assert_eq!(key.permissions().mode() & 0o077, 0, "only root can read the key");
    let (mut client, _server) = start(&scene, "ambient").await;
    client.line(&["certificate in use"]).await;
    let files = scene.pki.issue(CLIENT);
    assert_eq!(files, scene.client_files);
    client.more_than(1, &["certificate in use"]).await;
    scene.connected(Family::V4).await;
}

async fn drains() {
    let scene = Scene::new().await;
    let settings = with_broker(scene.client_settings(), "ambient").set("timeouts.drain=60s");
    let mut client = scene.client.proxy(&settings).await;
    let _server = scene.server.proxy(&scene.server_settings()).await;
    let (mut stream, mut peer) = scene.connected(Family::V4).await;
    client.signal(Signal::SIGTERM);
    client.line(&["stopping"]).await;
    until("the listeners are closed", async || {
        scene.client.dial(scene.app(Family::V4)).await.is_err()
    })
    .await;
    exchange(&mut stream, &mut peer).await;
    drop((stream, peer));
    assert!(client.ended().await.success(), "{}", client.log());
    client.line(&["drained", "terminated=0"]).await;
}

async fn fails(pod: &Pod, settings: &Settings) -> (Option<i32>, String) {
    match pod.try_proxy(settings).await {
        Err(SpawnError::Ended { status, log }) => (status.code(), log),
        other => panic!("the process did not exit: {other:?}"),
    }
}

async fn no_certificate() {
    let scene = Scene::new().await;
    let settings = with_broker(scene.client_settings(), "ambient");
    let (code, log) = fails(&scene.client, &settings.set("identity.key=/nowhere.key")).await;
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("/nowhere.key"), "{log}");
    assert!(!has_rules(&scene.client).await, "no rule is installed");
}

async fn one_process() {
    let scene = Scene::new().await;
    fs::set_permissions(&scene.mesh, fs::Permissions::from_mode(0o600)).expect("it is ours");
    let settings = with_broker(scene.client_settings(), "ambient");
    let mut client = scene.client.proxy(&settings).await;
    let reason = format!("user 15008 cannot read {}", scene.mesh.display());
    client.line(&["no broker: one process has all privileges", &reason]).await;
    assert_eq!(child(&client), None);
    assert!(client.stop().await.success(), "{}", client.log());
}
