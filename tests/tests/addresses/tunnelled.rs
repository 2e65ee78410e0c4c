//! Tests of the destinations that a CONNECT request may name: only the address at which the tunnel
//! ends.

use std::net::SocketAddr;

use http::{HeaderMap, StatusCode};
use underpass_hbone::{ClientSettings, ConnectRequest, Connector, HboneError, Tunnel};
use underpass_tests::{APP, DEADLINE, Family, HBONE, SERVER, Scene, Suite};

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test_both("a tunnel accepts only its own address as destination", own_address_only);
    suite.test(
        "a listener for captured connections refuses a connection that no rule redirected",
        uncaptured_listeners,
    );
}

/// Authorities of CONNECT requests with the expected status. `OWN` stands for the address at which
/// the tunnel ends.
const TABLE: [(&str, StatusCode); 20] = [
    ("OWN:15001", StatusCode::SERVICE_UNAVAILABLE),
    ("OWN:15006", StatusCode::SERVICE_UNAVAILABLE),
    ("OWN:15008", StatusCode::SERVICE_UNAVAILABLE),
    // A port without a listener.
    ("OWN:15053", StatusCode::SERVICE_UNAVAILABLE),
    ("OWN:0", StatusCode::BAD_REQUEST),
    // Metrics and readiness are public.
    ("OWN:15020", StatusCode::OK),
    ("OWN:15021", StatusCode::OK),
    ("OWN:8080", StatusCode::OK),
    ("127.0.0.1:8080", StatusCode::BAD_REQUEST),
    ("127.0.0.1:15020", StatusCode::BAD_REQUEST),
    ("[::1]:8080", StatusCode::BAD_REQUEST),
    ("[::ffff:127.0.0.1]:8080", StatusCode::BAD_REQUEST),
    ("0.0.0.0:8080", StatusCode::BAD_REQUEST),
    ("[::]:8080", StatusCode::BAD_REQUEST),
    ("224.0.0.1:8080", StatusCode::BAD_REQUEST),
    ("255.255.255.255:8080", StatusCode::BAD_REQUEST),
    ("169.254.169.254:80", StatusCode::BAD_REQUEST),
    // The client itself.
    ("10.1.0.1:8080", StatusCode::BAD_REQUEST),
    ("[fd00:1::1]:8080", StatusCode::BAD_REQUEST),
    ("localhost:8080", StatusCode::SERVICE_UNAVAILABLE),
];

async fn own_address_only(family: Family) {
    let scene = Scene::new().await;
    let mut proxy = scene.server.proxy(&scene.server_settings()).await;
    let app = scene.server.listen(APP);
    let at_client = scene.client.listen(APP);
    let tunnel = open(&scene, family).await;
    let own = scene.server.ip(family);
    let own = if own.is_ipv6() { format!("[{own}]") } else { own.to_string() };
    let mut answers = Vec::new();
    for (authority, expected) in TABLE {
        let authority = authority.replace("OWN", &own);
        let got = connect(&tunnel, &authority).await;
        if got != expected {
            answers.push(format!("CONNECT {authority}: {got} instead of {expected}"));
        }
        if authority == format!("{own}:8080") {
            drop(app.accept().await);
        }
    }
    assert!(answers.is_empty(), "{answers:#?}\n{}", proxy.log());
    assert!(!app.is_reached() && !at_client.is_reached(), "an application was reached");
    let lines = proxy.access_lines(0).await;
    assert!(lines.len() <= TABLE.len(), "a request loops: {lines:#?}");
}

async fn connect(tunnel: &Tunnel, authority: &str) -> StatusCode {
    let request = ConnectRequest { authority: authority.to_owned(), headers: HeaderMap::new() };
    match tunnel.connect(request, DEADLINE).await {
        Ok(_) => StatusCode::OK,
        Err(HboneError::Refused { status }) => status,
        Err(error) => unreachable!("CONNECT {authority}: {error:?}"),
    }
}

async fn open(scene: &Scene, family: Family) -> Tunnel {
    let credentials = scene.pki.credentials(&scene.client_files).fixed();
    let connector = Connector::new(credentials, ClientSettings::default());
    let hbone = scene.server.at(family, HBONE);
    let stream = scene.client.dial(hbone).await.expect("it listens");
    let peers = [scene.pki.id(SERVER)];
    connector.open(stream, hbone, &peers, DEADLINE).await.expect("a tunnel")
}

/// The original destination of an uncaptured connection is the listener itself, which would loop.
async fn uncaptured_listeners() {
    let scene = Scene::new().await;
    let settings = scene.server_settings().set("interception.profile=none");
    let mesh = format!("mesh.file={}", scene.empty_mesh().display());
    let mut proxy = scene.server.proxy(&settings.set(&mesh)).await;
    let mut calls = 0;
    for family in Family::BOTH {
        for port in [15001, 15006] {
            for (pod, ip) in [
                (&scene.client, scene.server.ip(family)),
                (&scene.server, scene.server.ip(family)),
                (&scene.server, family.loopback()),
            ] {
                pod.dial_and_see_reset(SocketAddr::new(ip, port)).await;
                calls += 1;
            }
        }
    }
    let lines = proxy.access_lines(calls).await;
    assert_eq!(lines.len(), calls, "each connection was refused once");
}
