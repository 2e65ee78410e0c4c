//! End-to-end tests of hot restart: a process takes over from another without failing a connection.
//! `failures` tests failing take-overs.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

mod failures;

use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;

use nix::sys::signal::Signal;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use underpass_tests::{
    APP, End, Family, Load, Pod, Proxy, Scene, Server, Settings, Suite, exchange, http_get,
    read_to_end, within,
};

fn main() -> ExitCode {
    let mut suite = Suite::new();
    suite.test_both(
        "open connections stay in the old process, and new ones go to the new process",
        both_serve,
    );
    suite.test(
        "the old process exits after its last connection and keeps the rules",
        old_process_exits,
    );
    suite.test("repeated take-overs under load fail no connection", repeated_takeovers);
    suite.test(
        "a take-over of the server's proxy fails no stream of clients' tunnels",
        tunnels_continue,
    );
    suite.test("readiness and metrics are served by the new process", new_process_serves_endpoints);
    suite.test(
        "connections in the old process are reset at timeouts.handover_drain",
        handover_drain_deadline,
    );
    suite.test("a stop signal stops the old process after a take-over", old_process_stopped);
    suite.test(
        "with on_exit: remove, only the last process removes the rules",
        last_process_removes_rules,
    );
    suite.test_with_users("take-overs work with the profiles sidecar and osm", profiles_by_user);
    suite.test("--take-over without a running process starts normally", without_running_process);
    failures::add_tests(&mut suite);
    suite.run()
}

/// Starts a process that takes over, and waits until the old one logs it.
async fn start_successor(pod: &Pod, old: &mut Proxy, settings: &Settings) -> Proxy {
    let new = pod.proxy(&settings.clone().take_over()).await;
    old.line(&["another process has taken over", &format!("pid={}", new.pid())]).await;
    new
}

async fn both_serve(family: Family) {
    let (scene, mut old, mut server) = Scene::with_proxies().await;
    let app = scene.server.listen(APP);
    let rules = scene.client.traces().await;
    let (mut client, mut peer, _) = scene.client.meet(&app, scene.app(family)).await;
    exchange(&mut client, &mut peer).await;

    let mut new = start_successor(&scene.client, &mut old, &scene.client_settings()).await;
    assert_eq!(scene.client.traces().await, rules, "the rules are unchanged");
    exchange(&mut client, &mut peer).await;
    let (mut second, mut second_peer, _) = scene.client.meet(&app, scene.app(family)).await;
    exchange(&mut second, &mut second_peer).await;
    drop((second, second_peer));
    new.access_lines(1).await;
    assert_eq!(old.count(&["access"]), 0, "{}", old.log());
    server.access_lines(1).await;
}

async fn old_process_exits() {
    let (scene, mut old, _server) = Scene::with_proxies().await;
    let (mut client, mut peer) = scene.connected(Family::V4).await;
    let _new = start_successor(&scene.client, &mut old, &scene.client_settings()).await;
    let rules = scene.client.traces().await;
    client.shutdown().await.expect("FIN is sent");
    assert_eq!(read_to_end(&mut peer).await, (vec![], End::Fin));
    peer.shutdown().await.expect("FIN is sent");
    assert_eq!(read_to_end(&mut client).await, (vec![], End::Fin));
    assert!(old.ended().await.success(), "{}", old.log());
    old.line(&["keeping the rules: another process owns them"]).await;
    assert_eq!(scene.client.traces().await, rules);
    scene.connected(Family::V4).await;
}

async fn repeated_takeovers() {
    let (scene, mut client_proxy, mut server_proxy) = Scene::with_proxies().await;
    let _echo = Server::echo(&scene.server, APP);
    let scene = Arc::new(scene);
    let connecting = scene.clone();
    let load = Load::start(8, move || {
        let scene = connecting.clone();
        async move { scene.echoed().await }
    });
    for _ in 0..4 {
        load.serve_more(30).await;
        let new = start_successor(&scene.client, &mut client_proxy, &scene.client_settings()).await;
        let mut old = std::mem::replace(&mut client_proxy, new);
        load.serve_more(30).await;
        let new = start_successor(&scene.server, &mut server_proxy, &scene.server_settings()).await;
        let mut old_server = std::mem::replace(&mut server_proxy, new);
        assert!(old.ended().await.success(), "{}", old.log());
        assert!(old_server.ended().await.success(), "{}", old_server.log());
        assert_eq!(old.count(&["connection failed"]), 0, "{}", old.log());
        assert_eq!(old_server.count(&["connection failed"]), 0, "{}", old_server.log());
    }
    load.serve_more(30).await;
    load.end().await;
}

async fn tunnels_continue() {
    let (scene, mut client_proxy, mut old) = Scene::with_proxies().await;
    let app = scene.server.listen(APP);
    let (mut first, mut first_peer, _) = scene.client.meet(&app, scene.app(Family::V4)).await;
    exchange(&mut first, &mut first_peer).await;
    let new = start_successor(&scene.server, &mut old, &scene.server_settings()).await;
    exchange(&mut first, &mut first_peer).await;
    // While the tunnel has a stream, the old process delays its GOAWAY.
    let come = async {
        while new.count(&["access"]) == 0 {
            let (mut next, mut next_peer, _) = scene.client.meet(&app, scene.app(Family::V4)).await;
            exchange(&mut next, &mut next_peer).await;
            drop((next, next_peer));
            client_proxy.access_lines(client_proxy.count(&["access"]) + 1).await;
        }
    };
    within("connections come to the new process", come).await;
    exchange(&mut first, &mut first_peer).await;
    drop((first, first_peer));
    assert!(old.ended().await.success(), "{}", old.log());
}

async fn new_process_serves_endpoints() {
    let (scene, mut old, _server) = Scene::with_proxies().await;
    let (mut client, mut peer) = scene.connected(Family::V4).await;
    let _new = start_successor(&scene.client, &mut old, &scene.client_settings()).await;
    let at = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    assert_eq!(http_get(&scene.client, at(15021), "/healthz/ready").await.0, 200);
    let (status, metrics) = http_get(&scene.client, at(15020), "/metrics").await;
    assert_eq!(status, 200);
    assert!(!metrics.contains("istio_tcp_connections_opened_total{"), "the old one's:\n{metrics}");
    exchange(&mut client, &mut peer).await;
}

async fn handover_drain_deadline() {
    let scene = Scene::new().await;
    let settings = scene.client_settings().set("timeouts.handover_drain=300ms");
    let mut old = scene.client.proxy(&settings).await;
    let _server = scene.server.proxy(&scene.server_settings()).await;
    let (mut client, mut peer) = scene.connected(Family::V4).await;
    let _new = start_successor(&scene.client, &mut old, &settings).await;
    assert_eq!(read_to_end(&mut client).await, (vec![], End::Reset));
    assert_eq!(read_to_end(&mut peer).await, (vec![], End::Reset));
    assert!(old.ended().await.success(), "{}", old.log());
    old.line(&["connection failed", "reason=\"drained\""]).await;
}

async fn old_process_stopped() {
    let scene = Scene::new().await;
    let settings = scene.client_settings().set("timeouts.drain=200ms");
    let mut old = scene.client.proxy(&settings).await;
    let _server = scene.server.proxy(&scene.server_settings()).await;
    let (mut client, mut peer) = scene.connected(Family::V4).await;
    let _new = start_successor(&scene.client, &mut old, &settings).await;
    exchange(&mut client, &mut peer).await;
    old.signal(Signal::SIGTERM);
    assert!(old.ended().await.success(), "{}", old.log());
    assert_eq!(read_to_end(&mut client).await, (vec![], End::Reset));
}

async fn last_process_removes_rules() {
    let scene = Scene::new().await;
    let without = scene.client.traces().await;
    let settings = scene.client_settings().set("interception.on_exit=remove");
    let mut old = scene.client.proxy(&settings).await;
    let with = scene.client.traces().await;
    let mut new = start_successor(&scene.client, &mut old, &settings).await;
    assert!(old.ended().await.success(), "{}", old.log());
    assert_eq!(scene.client.traces().await, with);
    assert!(new.stop().await.success());
    assert_eq!(scene.client.traces().await, without);
}

async fn profiles_by_user() {
    for profile in ["sidecar", "osm"] {
        let scene = Scene::new().await;
        let settings = scene.client_settings().set(&format!("interception.profile={profile}"));
        let mut old = scene.client.proxy(&settings).await;
        let _server = scene.server.proxy(&scene.server_settings()).await;
        let app = scene.server.listen(APP);
        let (mut client, mut peer, _) = scene.client.meet(&app, scene.app(Family::V4)).await;
        exchange(&mut client, &mut peer).await;
        for _ in 0..2 {
            let mut new = start_successor(&scene.client, &mut old, &settings).await;
            let (mut second, mut second_peer, _) =
                scene.client.meet(&app, scene.app(Family::V4)).await;
            exchange(&mut second, &mut second_peer).await;
            exchange(&mut client, &mut peer).await;
            drop((second, second_peer));
            new.access_lines(1).await;
            // The first process still serves. The next take-over is from the second one.
            std::mem::swap(&mut old, &mut new);
            std::mem::forget(new);
        }
    }
}

async fn without_running_process() {
    let scene = Scene::new().await;
    let mut proxy = scene.client.proxy(&scene.client_settings().take_over()).await;
    proxy.line(&["no running process to take over from"]).await;
    // Repeat with the socket file of a killed process.
    proxy.signal(Signal::SIGKILL);
    proxy.ended().await;
    let mut proxy = scene.client.proxy(&scene.client_settings().take_over()).await;
    proxy.line(&["no running process to take over from"]).await;
    let mut received = String::new();
    let ready = scene.client.dial(SocketAddr::from((Ipv4Addr::LOCALHOST, 15021))).await;
    let mut ready = ready.expect("connected");
    ready.write_all(b"GET /healthz/ready HTTP/1.0\r\n\r\n").await.expect("sent");
    within("an answer", ready.read_to_string(&mut received)).await.expect("read");
    assert!(received.ends_with("ready\n"), "{received}");
}
