//! Tests of connections that must fail: to the proxy's own listeners, through a tunnel to other
//! hosts, and in plaintext to HBONE members.

use std::net::SocketAddr;

use http::{HeaderMap, StatusCode};
use underpass_hbone::{ClientSettings, ConnectRequest, Connector, HboneError, Tunnel};
use underpass_interception::TcpSegment;
use underpass_tests::{APP, CLIENT, DEADLINE, Family, HBONE, SERVER, Scene, Suite};

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test_both(
        "a client gets RST instead of plaintext when the HBONE member's proxy is down",
        member_without_proxy,
    );
    suite.test_both(
        "a client without a certificate does not reach an HBONE member",
        client_without_certificate,
    );
    suite.test(
        "an application cannot connect to its own proxy's listeners",
        own_application_calls_listeners,
    );
    suite.test_both(
        "no other pod reaches the listeners for captured connections",
        other_pod_calls_listeners,
    );
    suite.test_both(
        "a tunnel cannot reach listeners of the proxy or other hosts",
        tunnel_to_listeners,
    );
}

/// Asserts that only HBONE was on the wire, without plaintext data.
pub(crate) fn assert_nothing_in_plain(frames: &[Vec<u8>]) {
    for segment in frames.iter().filter_map(|frame| TcpSegment::parse(frame)) {
        let ports = [segment.source.port(), segment.destination.port()];
        assert!(ports.contains(&HBONE), "{segment:?}");
        // The data that `exchange` sends.
        for data in [&b"request"[..], b"answer"] {
            let is_plain = segment.payload.windows(data.len()).any(|window| window == data);
            assert!(!is_plain, "plaintext: {segment:?}");
        }
    }
}

async fn member_without_proxy(family: Family) {
    let scene = Scene::new().await;
    let mut proxy = scene.client.proxy(&scene.client_settings()).await;
    let app = scene.server.listen(APP);
    let mut wire = scene.server.capture();
    scene.client.dial_and_see_reset(scene.app(family)).await;
    proxy.line(&["connection failed", "reason=\"connect\""]).await;
    assert!(!app.is_reached(), "the application was reached");
    assert_nothing_in_plain(&wire.drain().expect("the capture is read"));
}

async fn client_without_certificate(family: Family) {
    let scene = Scene::new().await;
    let settings = underpass_tests::Settings::new(CLIENT).mesh(&scene.mesh);
    let mut proxy = scene.client.proxy(&settings).await;
    let _server = scene.server.proxy(&scene.server_settings()).await;
    let app = scene.server.listen(APP);
    let mut wire = scene.server.capture();
    scene.client.dial_and_see_reset(scene.app(family)).await;
    proxy.line(&["connection failed", "reason=\"no_identity\""]).await;
    assert!(!app.is_reached(), "the application was reached");
    assert_nothing_in_plain(&wire.drain().expect("the capture is read"));
}

async fn own_application_calls_listeners() {
    let (scene, mut proxy, _server) = Scene::with_proxies().await;
    for family in Family::BOTH {
        let to = SocketAddr::new(family.loopback(), 15001);
        scene.client.dial_and_see_reset(to).await;
        proxy
            .line(&["connection failed", "reason=\"own_listener\"", &format!("dst.addr={to}")])
            .await;
    }
    assert_eq!(proxy.access_lines(2).await.len(), 2, "each connection was refused once");
}

async fn other_pod_calls_listeners(family: Family) {
    let scene = Scene::new().await;
    let mut proxy = scene.server.proxy(&scene.server_settings()).await;
    for port in [15001, 15006] {
        let to = scene.server.at(family, port);
        scene.client.dial_and_see_reset(to).await;
        proxy
            .line(&["connection failed", "reason=\"own_listener\"", &format!("dst.addr={to}")])
            .await;
    }
    assert_eq!(proxy.access_lines(2).await.len(), 2, "each connection was refused once");
}

async fn tunnel_to_listeners(family: Family) {
    let scene = Scene::new().await;
    let mut proxy = scene.server.proxy(&scene.server_settings()).await;
    let tunnel = open_tunnel(&scene, family).await;
    let elsewhere = [scene.client.at(family, APP), SocketAddr::new(family.loopback(), APP)];
    let listeners = [15001, 15006, 15008].map(|port| scene.server.at(family, port));
    let bad = StatusCode::BAD_REQUEST;
    let unavailable = StatusCode::SERVICE_UNAVAILABLE;
    let cases = elsewhere.map(|to| (to, bad, "not_here"));
    let cases = cases.into_iter().chain(listeners.map(|to| (to, unavailable, "own_listener")));
    for (to, expected, reason) in cases {
        let request = ConnectRequest { authority: to.to_string(), headers: HeaderMap::new() };
        let refused = match tunnel.connect(request, DEADLINE).await {
            Err(HboneError::Refused { status }) => Some(status),
            _ => None,
        };
        assert_eq!(refused, Some(expected), "CONNECT {to}");
        proxy.line(&["connection failed", &format!("reason=\"{reason}\""), &to.to_string()]).await;
    }
}

async fn open_tunnel(scene: &Scene, family: Family) -> Tunnel {
    let credentials = scene.pki.credentials(&scene.client_files).fixed();
    let connector = Connector::new(credentials, ClientSettings::default());
    let hbone = scene.server.at(family, HBONE);
    let stream = scene.client.dial(hbone).await.expect("it listens");
    let peers = [scene.pki.id(SERVER)];
    connector.open(stream, hbone, &peers, DEADLINE).await.expect("a tunnel")
}
