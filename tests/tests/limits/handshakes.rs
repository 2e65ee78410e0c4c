//! Tests of TLS handshakes: waiting, refusals, and clients that do not complete theirs.

use tokio::net::TcpStream;
use underpass_tests::{Dial, Family, HBONE, Pod, Scene, Suite, TlsClient, until};

use crate::sources::add_address;

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test("a handshake beyond limits.handshakes waits", waiting);
    suite.test(
        "a connection without a ClientHello does not count as a handshake",
        silent_connections,
    );
    suite.test(
        "a source that completes no handshake does not delay another source",
        unfinished_handshakes,
    );
    suite.test(
        "a peer that exceeded a limit of its tunnel gets two handshakes at a time",
        penalized_peer,
    );
}

async fn sum(pod: &Pod, metric: &str) -> Option<f64> {
    pod.metrics().await.sum(metric, &[])
}

async fn under_way(pod: &Pod) -> Option<f64> {
    sum(pod, "underpass_handshakes_under_way").await
}

async fn waited(pod: &Pod) -> Option<f64> {
    sum(pod, "underpass_handshakes_waited_total").await
}

async fn refused(pod: &Pod) -> Option<f64> {
    sum(pod, "underpass_handshakes_refused_total").await
}

/// Opens a connection from the client's pod to the server's listener for tunnels.
async fn dial(scene: &Scene, dial: Dial) -> TcpStream {
    scene.client.dial_as(scene.server.at(Family::V4, HBONE), dial).await.expect("it listens")
}

async fn waiting() {
    let scene = Scene::new().await;
    let server = &scene.server;
    let _server = server.proxy(&scene.server_settings().set("limits.handshakes=1")).await;
    let client = TlsClient::new(Some(&scene.client_files));
    let begun = client.begin(dial(&scene, Dial::default()).await).await.expect("it listens");
    until("the handshake is under way", async || under_way(server).await == Some(1.0)).await;
    let second = async {
        client.connect(dial(&scene, Dial::default()).await).await.expect("the handshake completes")
    };
    let first = async {
        until("the second one waits", async || waited(server).await == Some(1.0)).await;
        drop(begun);
    };
    let (_second, ()) = tokio::join!(second, first);
    assert_eq!(refused(server).await, None);
}

async fn silent_connections() {
    let scene = Scene::new().await;
    let server = &scene.server;
    let settings = scene.server_settings().set("limits.handshakes=1");
    let _server = server.proxy(&settings.set("limits.handshakes_per_source=1")).await;
    let mut silent_connections = Vec::new();
    for _ in 0..100 {
        silent_connections.push(dial(&scene, Dial::default()).await);
    }
    let client = TlsClient::new(Some(&scene.client_files));
    let connected = client.connect(dial(&scene, Dial::default()).await).await;
    connected.expect("silent connections hold no handshake");
    assert_eq!((waited(server).await, refused(server).await), (None, None));
}

async fn unfinished_handshakes() {
    const STARTED_HANDSHAKES: usize = 20;
    let scene = Scene::new().await;
    let server = &scene.server;
    let _server = server.proxy(&scene.server_settings().set("limits.handshakes=8")).await;
    let client = TlsClient::new(Some(&scene.client_files));
    let other = add_address(&scene.client, "10.1.0.77/24").await;
    let mut begun = Vec::new();
    for _ in 0..STARTED_HANDSHAKES {
        begun.push(client.begin(dial(&scene, other).await).await.expect("it listens"));
    }
    until("all have begun or wait", async || {
        let (under_way, waited) = (under_way(server).await, waited(server).await);
        under_way.unwrap_or_default() + waited.unwrap_or_default() == STARTED_HANDSHAKES as f64
    })
    .await;
    let before = waited(server).await;
    assert!(under_way(server).await < Some(8.0));
    client.connect(dial(&scene, Dial::default()).await).await.expect("it does not wait");
    assert_eq!(waited(server).await, before);
}

async fn penalized_peer() {
    let scene = Scene::new().await;
    let server = &scene.server;
    let _server = server.proxy(&scene.server_settings().set("timeouts.frame=300ms")).await;
    let client = TlsClient::new(Some(&scene.client_files));
    let mut peer = client.connect(dial(&scene, Dial::default()).await).await.expect("a handshake");
    crate::tunnels::unfinished_frame(&mut peer).await;
    until("the tunnel is closed", async || {
        sum(server, "underpass_tunnels_closed_total").await == Some(1.0)
    })
    .await;
    let mut begun = Vec::new();
    for _ in 0..3 {
        begun.push(client.begin(dial(&scene, Dial::default()).await).await.expect("it listens"));
    }
    until("the third one is refused", async || refused(server).await == Some(1.0)).await;
    let other = add_address(&scene.client, "10.1.0.77/24").await;
    client.connect(dial(&scene, other).await).await.expect("another source is served");
}
