//! Tests of `inbound.mode: tproxy` with each backend: the application sees its client, and is
//! unreachable without the proxy.

use std::pin::pin;
use std::time::Duration;

use nix::sys::signal::Signal;
use underpass_interception::TcpSegment;
use underpass_tests::{APP, Family, Scene, Settings, Suite, exchange, tool, until, within};

use crate::SIDECAR;

pub(crate) fn add_tests(suite: &mut Suite) {
    for backend in ["nftables", "iptables", "iptables-legacy"] {
        suite.test_with_users(
            &format!("tproxy with {backend}: the application sees its client, in plaintext and through the tunnel"),
            async move || application_sees_client(backend).await,
        );
        suite.test_with_users(
            &format!("tproxy with {backend}: a killed proxy leaves its pod unreachable"),
            async move || unreachable_without_proxy(backend).await,
        );
    }
}

fn settings(scene: &Scene, backend: &str) -> Settings {
    SIDECAR
        .of(scene.server_settings())
        .set("interception.inbound.mode=tproxy")
        .set(&format!("interception.backend={backend}"))
}

async fn application_sees_client(backend: &str) {
    let scene = Scene::new().await;
    let mut proxy = scene.server.proxy(&settings(&scene, backend)).await;
    let app = scene.server.listen(APP);
    let inbound = ["connection complete", "direction=\"inbound\""];
    for family in Family::BOTH {
        let (mut client, mut server, peer) = scene.client.meet(&app, scene.app(family)).await;
        exchange(&mut client, &mut server).await;
        assert_eq!(peer.ip(), scene.client.ip(family));
        drop((client, server));
        let destination = format!("dst.addr={}", scene.app(family));
        proxy.line(&[inbound[0], inbound[1], &destination]).await;
    }
    let _client = scene.client.proxy(&SIDECAR.of(scene.client_settings())).await;
    for family in Family::BOTH {
        let (mut client, mut server, peer) = scene.client.meet(&app, scene.app(family)).await;
        exchange(&mut client, &mut server).await;
        assert_eq!(peer.ip(), scene.client.ip(family));
        drop((client, server));
        proxy.line(&[inbound[0], &format!("dst.hbone_addr={}", scene.app(family))]).await;
    }
}

async fn unreachable_without_proxy(backend: &str) {
    let scene = Scene::new().await;
    let mut proxy = scene.server.proxy(&settings(&scene, backend)).await;
    let app = scene.server.listen(APP);
    let (mut client, mut server, _) = scene.client.meet(&app, scene.app(Family::V4)).await;
    exchange(&mut client, &mut server).await;
    drop((client, server));
    proxy.signal(Signal::SIGKILL);
    proxy.ended().await;
    // A child process holds the sockets until it executes its program.
    let listening = async || {
        let listeners = ["--tcp", "--listening", "--no-header", "sport = :15006"];
        !tool(&scene.server, "ss", &listeners).await.ok().is_empty()
    };
    until("the listeners are closed", async || !listening().await).await;
    tokio::join!(assert_syn_dropped(&scene, Family::V4), assert_syn_dropped(&scene, Family::V6));
    assert!(!app.is_reached(), "the application was reached without a proxy");
}

/// Asserts that the client's SYN gets no answer. A retransmission shows that the first one was
/// dropped.
async fn assert_syn_dropped(scene: &Scene, family: Family) {
    let to = scene.app(family);
    let mut wire = scene.client.capture();
    let mut dialling = pin!(scene.client.dial(to));
    let mut sent = 0;
    let retransmission = async {
        while sent < 2 {
            let answer = tokio::time::timeout(Duration::from_millis(10), &mut dialling).await;
            assert!(answer.is_err(), "{to} was answered: {answer:?}");
            let frames = wire.drain().expect("the capture is read");
            let segments = frames.iter().filter_map(|frame| TcpSegment::parse(frame));
            sent += segments.filter(|segment| segment.destination == to).count();
        }
    };
    within("the client retransmits", retransmission).await;
}
