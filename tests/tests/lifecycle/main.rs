//! End-to-end tests of stop and restart: connections, rules and the pod. `start` tests failing
//! starts.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

mod start;

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;

use nix::sys::signal::Signal;
use tokio::io::AsyncWriteExt as _;
use underpass_tests::{
    APP, End, Family, HBONE, Pod, Scene, Suite, binary, exchange, http_get, read_to_end, tool,
};

fn main() -> ExitCode {
    let mut suite = Suite::new();
    suite.test("a stopping proxy is unready and lets open connections end", drains);
    suite.test("connections are reset at the drain deadline", drain_deadline);
    suite.test("a second stop signal ends the drain", second_stop_ends_drain);
    suite.test("a draining proxy accepts no new connection", draining_accepts_nothing);
    suite.test("a proxy stops when its parent ends", stops_with_parent);
    suite.test(
        "the rules refuse inbound and outbound connections of a pod without its proxy",
        closed_without_proxy,
    );
    suite.test_both(
        "with on_exit: remove, no rules remain and traffic is direct",
        rules_removed_on_exit,
    );
    suite.test("a restart after a kill installs every rule once", killed_and_restarted);
    suite.test("a restarted proxy serves again", restarted_serves);
    suite.test("`underpass rules remove` removes everything and reports it", rules_remove);
    start::add_tests(&mut suite);
    suite.run()
}

async fn ready(pod: &Pod) -> (u16, String) {
    http_get(pod, SocketAddr::from((Ipv4Addr::LOCALHOST, 15021)), "/healthz/ready").await
}

async fn drains() {
    let (scene, mut proxy, _server) = Scene::with_proxies().await;
    let app = scene.server.listen(APP);
    let (mut client, mut server, _) = scene.client.meet(&app, scene.app(Family::V4)).await;
    assert_eq!(ready(&scene.client).await, (200, "ready\n".to_owned()));
    proxy.signal(Signal::SIGTERM);
    proxy.line(&["stopping", "SIGTERM"]).await;
    assert_eq!(ready(&scene.client).await, (503, "not ready: draining\n".to_owned()));
    exchange(&mut client, &mut server).await;
    client.shutdown().await.expect("FIN is sent");
    assert_eq!(read_to_end(&mut server).await, (vec![], End::Fin));
    server.shutdown().await.expect("FIN is sent");
    assert_eq!(read_to_end(&mut client).await, (vec![], End::Fin));
    assert_eq!(proxy.ended().await.code(), Some(0), "{}", proxy.log());
    proxy.line(&["connection complete"]).await;
}

async fn drain_deadline() {
    for stop_client in [true, false] {
        let scene = Scene::new().await;
        let client_settings = scene.client_settings().set("timeouts.drain=300ms");
        let server_settings = scene.server_settings().set("timeouts.drain=300ms");
        let mut client_proxy = scene.client.proxy(&client_settings).await;
        let mut server_proxy = scene.server.proxy(&server_settings).await;
        let app = scene.server.listen(APP);
        let (mut client, mut server, _) = scene.client.meet(&app, scene.app(Family::V4)).await;
        exchange(&mut client, &mut server).await;
        let proxy = if stop_client { &mut client_proxy } else { &mut server_proxy };
        proxy.signal(Signal::SIGTERM);
        assert_eq!(read_to_end(&mut client).await, (vec![], End::Reset));
        assert_eq!(read_to_end(&mut server).await, (vec![], End::Reset));
        assert_eq!(proxy.ended().await.code(), Some(0), "{}", proxy.log());
        proxy.line(&["connection failed", "reason=\"drained\""]).await;
    }
}

async fn second_stop_ends_drain() {
    let scene = Scene::new().await;
    // Longer than the timeout of a trial.
    let settings = scene.client_settings().set("timeouts.drain=10m");
    let mut proxy = scene.client.proxy(&settings).await;
    let _server = scene.server.proxy(&scene.server_settings()).await;
    let app = scene.server.listen(APP);
    let (mut client, mut server, _) = scene.client.meet(&app, scene.app(Family::V4)).await;
    exchange(&mut client, &mut server).await;
    proxy.signal(Signal::SIGTERM);
    proxy.line(&["stopping"]).await;
    proxy.signal(Signal::SIGTERM);
    assert_eq!(proxy.ended().await.code(), Some(0), "{}", proxy.log());
    assert_eq!(read_to_end(&mut client).await, (vec![], End::Reset));
}

async fn draining_accepts_nothing() {
    let (scene, mut proxy, _server) = Scene::with_proxies().await;
    let app = scene.server.listen(APP);
    let (mut client, mut server, _) = scene.client.meet(&app, scene.app(Family::V4)).await;
    exchange(&mut client, &mut server).await;
    proxy.signal(Signal::SIGTERM);
    proxy.line(&["stopping"]).await;
    let refused = async {
        // The listeners close on several threads.
        while scene.client.dial(scene.app(Family::V4)).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    underpass_tests::within("the listeners are closed", refused).await;
    exchange(&mut client, &mut server).await;
}

async fn stops_with_parent() {
    let (_scene, mut proxy, _server) = Scene::with_proxies().await;
    assert_eq!(proxy.stop().await.code(), Some(0));
    proxy.line(&["stopping", "standard input ended"]).await;
}

async fn closed_without_proxy() {
    let (scene, mut client_proxy, mut server_proxy) = Scene::with_proxies().await;
    let app = scene.server.listen(APP);
    client_proxy.stop().await;
    server_proxy.stop().await;
    client_proxy.line(&["the rules stay"]).await;
    for family in Family::BOTH {
        let out = scene.client.dial(scene.app(family)).await;
        assert_eq!(out.map(drop).map_err(|error| error.kind()), Err(ErrorKind::ConnectionRefused));
    }
    // Without the client pod's rules, its connections reach the rules of the server's pod.
    tool(&scene.client, "nft", &["flush", "ruleset"]).await.ok();
    for family in Family::BOTH {
        for port in [APP, HBONE] {
            let out = scene.client.dial(scene.server.at(family, port)).await;
            assert_eq!(
                out.map(drop).map_err(|error| error.kind()),
                Err(ErrorKind::ConnectionRefused)
            );
        }
    }
    assert!(!app.is_reached(), "the application was reached without a proxy");
}

async fn rules_removed_on_exit(family: Family) {
    let scene = Scene::new().await;
    let before = scene.client.traces().await;
    let settings = scene.client_settings().set("interception.on_exit=remove");
    let mut proxy = scene.client.proxy(&settings).await;
    assert_ne!(scene.client.traces().await, before);
    proxy.stop().await;
    assert_eq!(scene.client.traces().await, before);
    proxy.line(&["rules removed"]).await;
    let app = scene.server.listen(APP);
    let (mut client, mut server, peer) = scene.client.meet(&app, scene.app(family)).await;
    exchange(&mut client, &mut server).await;
    assert_eq!(peer, client.local_addr().expect("an address"), "the connection is direct");
}

async fn killed_and_restarted() {
    let (scene, mut proxy, _server) = Scene::with_proxies().await;
    let once = scene.client.traces().await;
    proxy.signal(Signal::SIGKILL);
    proxy.ended().await;
    assert_eq!(scene.client.traces().await, once, "a killed proxy leaves its rules");
    let _proxy = scene.client.proxy(&scene.client_settings()).await;
    assert_eq!(scene.client.traces().await, once);
}

async fn restarted_serves() {
    let (scene, mut client_proxy, mut server_proxy) = Scene::with_proxies().await;
    let app = scene.server.listen(APP);
    // The client's proxy may still have its tunnel to the server's first proxy.
    for round in 0..3 {
        let (mut client, mut server, _) = scene.client.meet(&app, scene.app(Family::V4)).await;
        exchange(&mut client, &mut server).await;
        drop((client, server));
        server_proxy.signal(if round == 0 { Signal::SIGKILL } else { Signal::SIGTERM });
        server_proxy.ended().await;
        server_proxy = scene.server.proxy(&scene.server_settings()).await;
    }
    let (mut client, mut server, _) = scene.client.meet(&app, scene.app(Family::V4)).await;
    exchange(&mut client, &mut server).await;
    assert!(client_proxy.stop().await.success());
}

async fn rules_remove() {
    let scene = Scene::new().await;
    let before = scene.client.traces().await;
    let mut proxy = scene.client.proxy(&scene.client_settings()).await;
    proxy.stop().await;
    let program = binary().to_str().expect("a path in UTF-8");
    let remove = || tool(&scene.client, program, &["rules", "remove"]);
    assert_eq!(remove().await.ok(), "removed\n");
    assert_eq!(scene.client.traces().await, before);
    assert_eq!(remove().await.ok(), "there was nothing to remove\n");
}
