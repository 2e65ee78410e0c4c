//! Tests of IPv6 that is enabled or disabled while the proxy runs: no plaintext leaves, and IPv4
//! continues.

use underpass_interception::{PacketCapture, TcpSegment};
use underpass_tests::{APP, Family, HBONE, Pod, Scene, Server, Suite, exchange, tool, until};

use crate::{AMBIENT, PROFILES, Profile};

/// The ports of applications: one for a connection right after IPv6 is enabled, one for later.
const PORTS: [u16; 2] = [8081, APP];
const BACKENDS: [&str; 3] = ["nftables", "iptables", "iptables-legacy"];

pub(crate) fn add_tests(suite: &mut Suite) {
    for profile in PROFILES {
        for backend in BACKENDS {
            let name = format!("with {backend}, IPv6 that is enabled after the start is captured");
            profile
                .test(suite, &name, async move || ipv6_enabled_after_start(profile, backend).await);
        }
    }
    suite.test(
        "ambient: no IPv6 packet leaves the pod without a loopback interface",
        without_loopback,
    );
}

fn set_disabled(pod: &Pod, interface: &str, disabled: bool) {
    let value = if disabled { "1" } else { "0" };
    pod.sysctl(&format!("net/ipv6/conf/{interface}/disable_ipv6"), value);
}

/// Restores the address that the pod had before IPv6 was disabled.
async fn add_address(pod: &Pod) {
    let address = format!("{}/64", pod.ip(Family::V6));
    tool(pod, "ip", &["address", "add", &address, "dev", "eth0", "nodad"]).await.ok();
}

/// Asserts that no application data was on the wire. A SYN-ACK is possible: the server's
/// application answers a client's address before the return routes exist.
fn assert_nothing_in_plain(wire: &mut PacketCapture) {
    let frames = wire.drain().expect("the capture is read");
    let segments: Vec<_> = frames.iter().filter_map(|frame| TcpSegment::parse(frame)).collect();
    let plain = |segment: &&TcpSegment<'_>| {
        let ports = [segment.source.port(), segment.destination.port()];
        !segment.payload.is_empty() && ports.iter().any(|port| PORTS.contains(port))
    };
    let found = segments.iter().find(plain);
    assert!(found.is_none(), "plaintext: {found:?}");
}

async fn ipv6_enabled_after_start(profile: Profile, backend: &str) {
    let scene = Scene::new().await;
    let pods = [&scene.client, &scene.server];
    pods.iter().for_each(|pod| set_disabled(pod, "all", true));
    let backend = format!("interception.backend={backend}");
    let (client, server) = (
        profile.of(scene.client_settings()).set(&backend),
        profile.of(scene.server_settings()).set(&backend),
    );
    let (mut client, mut server) =
        tokio::join!(scene.client.proxy(&client), scene.server.proxy(&server));
    client.line(&["IPv6 is disabled on the loopback interface"]).await;
    let (app, early_app) = (scene.server.listen(APP), Server::echo(&scene.server, PORTS[0]));
    let mut wire = scene.server.capture();

    for pod in pods {
        set_disabled(pod, "all", false);
        add_address(pod).await;
    }
    // The connection may be captured or refused, but must not be plaintext.
    let early = scene.client.dial(scene.server.at(Family::V6, PORTS[0])).await;
    if let Ok(early) = &early {
        // The connection may already be lost.
        early.try_write(b"early").ok();
    }
    for proxy in [&mut client, &mut server] {
        proxy.line(&["IPv6 is enabled on the loopback interface now"]).await;
    }
    let (mut near, mut far, peer) = scene.client.meet(&app, scene.app(Family::V6)).await;
    exchange(&mut near, &mut far).await;
    assert_eq!(peer.ip(), profile.peer(Family::V6, scene.client.ip(Family::V6)));
    drop((near, far, app, early, early_app));
    let tunnel = format!("dst.addr=[{}]:{HBONE}", scene.server.ip(Family::V6));
    client.line(&["connection complete", &tunnel]).await;
    assert_nothing_in_plain(&mut wire);

    pods.iter().for_each(|pod| set_disabled(pod, "all", true));
    let _echo = Server::echo(&scene.server, APP);
    scene.echoed().await;
    for pod in pods {
        let metrics = pod.metrics().await;
        assert_eq!(metrics.sum("underpass_rules_intact", &[]), Some(1.0));
        assert_eq!(metrics.sum("underpass_rules_repairs_total", &[]), Some(0.0));
    }
}

async fn without_loopback() {
    let scene = Scene::new().await;
    set_disabled(&scene.client, "lo", true);
    let _client = scene.client.proxy(&AMBIENT.of(scene.client_settings())).await;
    let app = scene.server.listen(APP);
    let mut wire = scene.server.capture();
    let before = scene.client.counters();
    let redirected = async || {
        let matched = scene.client.connections_since(&before);
        matched.iter().any(|(rule, _)| *rule == Family::V6.rule("capture-outbound"))
    };
    tokio::select! {
        dialled = scene.client.dial(scene.app(Family::V6)) => {
            dialled.expect_err("the proxy is unreachable");
        }
        () = until("the connection is redirected", redirected) => {}
    }
    assert_nothing_in_plain(&mut wire);
    assert!(!app.is_reached(), "the application was reached");
}
