//! Tests of limits of tunnels without streams, for a peer with a valid certificate that every
//! policy denies.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use underpass_tests::{
    APP, Dial, Family, HBONE, Proxy, Scene, Server, Suite, TlsClient, until, within,
};

use crate::refused;

/// The client preface (RFC 9113 section 3.4) with empty SETTINGS.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
const GOAWAY: u8 = 7;
/// A tenth of the memory of a container with 512 MiB, as the maximum for one peer.
const MAX_MEMORY: u64 = 50 << 20;
const TUNNELS: usize = 100;

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test(
        "a tunnel beyond limits.tunnels_per_source is reset before its handshake",
        limit_of_source,
    );
    suite.test("a tunnel beyond limits.tunnels_per_identity gets GOAWAY", limit_of_identity);
    suite.test(
        "unfinished header blocks hold little memory and end after timeouts.frame",
        header_blocks,
    );
    suite.test(
        "large frames without a stream hold little memory and end after timeouts.frame",
        data_frames,
    );
    suite.test("a tunnel without streams is closed after timeouts.tunnel_idle", idle);
}

/// Opens a tunnel as a client with a certificate; `None` if it was reset.
pub(crate) async fn tunnel(scene: &Scene, client: &TlsClient) -> Option<TlsStream<TcpStream>> {
    let hbone = scene.server.at(Family::V4, HBONE);
    // With the proxy's mark, because the pod's other connections are captured.
    let marked = Dial { mark: Some(0x539), ..Dial::default() };
    let stream = scene.client.dial_as(hbone, marked).await.ok()?;
    let mut tunnel = client.connect(stream).await.ok()?;
    tunnel.write_all(PREFACE).await.ok()?;
    Some(tunnel)
}

/// Reads until the proxy ends the tunnel. Returns whether it sent GOAWAY.
async fn ended_with_goaway(tunnel: &mut TlsStream<TcpStream>) -> bool {
    let mut seen = false;
    loop {
        let mut head = [0; 9];
        if within("the tunnel's end", tunnel.read_exact(&mut head)).await.is_err() {
            return seen;
        }
        seen |= head[3] == GOAWAY;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; length as usize];
        if within("the tunnel's end", tunnel.read_exact(&mut payload)).await.is_err() {
            return seen;
        }
    }
}

async fn closed(scene: &Scene, reason: &str) -> Option<f64> {
    let metrics = scene.server.metrics().await;
    metrics.sum("underpass_tunnels_closed_total", &[("reason", reason)])
}

async fn limit_of_source() {
    let scene = Scene::new().await;
    let settings = scene.server_settings().set("limits.tunnels_per_source=2");
    let mut server = scene.server.proxy(&settings).await;
    let client = TlsClient::new(Some(&scene.pki.issue("rogue")));
    let open = [tunnel(&scene, &client).await, tunnel(&scene, &client).await];
    assert!(open.iter().all(Option::is_some));
    assert!(tunnel(&scene, &client).await.is_none());
    assert_eq!(refused(&scene.server, "tunnels_per_source", "hbone").await, Some(1.0));
    server.line(&["tunnels are refused", "limits.tunnels_per_source"]).await;
    drop(open);
    until("there is room again", async || tunnel(&scene, &client).await.is_some()).await;
}

async fn limit_of_identity() {
    let scene = Scene::new().await;
    let settings = scene.server_settings().set("limits.tunnels_per_identity=1");
    let _server = scene.server.proxy(&settings).await;
    let client = TlsClient::new(Some(&scene.pki.issue("rogue")));
    let _held = tunnel(&scene, &client).await.expect("the first one");
    until("the tunnel is counted", async || {
        let metrics = scene.server.metrics().await;
        metrics.sum("underpass_tunnels_open", &[("direction", "inbound")]) == Some(1.0)
    })
    .await;
    let mut second = tunnel(&scene, &client).await.expect("a handshake");
    assert!(ended_with_goaway(&mut second).await);
    assert_eq!(refused(&scene.server, "tunnels_per_identity", "hbone").await, Some(1.0));
    let other = TlsClient::new(Some(&scene.pki.issue("other")));
    tunnel(&scene, &other).await.expect("another identity has its own");
}

/// The resident memory of a proxy in bytes.
fn resident(proxy: &Proxy) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", proxy.pid()));
    let status = status.expect("a running process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    let kib = line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number");
    kib << 10
}

/// Sends the head of a frame without its payload.
pub(crate) async fn unfinished_frame(tunnel: &mut TlsStream<TcpStream>) {
    tunnel.write_all(PREFACE).await.expect("an open tunnel");
    // DATA of 8 bytes.
    tunnel.write_all(&[0, 0, 8, 0, 0, 0, 0, 0, 1]).await.expect("an open tunnel");
}

/// Opens tunnels, sends as many of `bytes` in each as the proxy accepts, and expects all to be
/// closed while another peer is served.
async fn assert_held_tunnels_end(bytes: &[u8], reason: &str) {
    let scene = Scene::new().await;
    let settings = scene.server_settings().set("timeouts.frame=3s").set("logging.filter=warn");
    let server = scene.server.proxy(&settings).await;
    let _client = scene.client.proxy(&scene.client_settings()).await;
    let _echo = Server::echo(&scene.server, APP);
    scene.echoed().await;
    let before = resident(&server);
    let rogue = TlsClient::new(Some(&scene.pki.issue("rogue")));
    let mut tunnels = Vec::new();
    for _ in 0..TUNNELS {
        let mut tunnel = tunnel(&scene, &rogue).await.expect("a handshake");
        // Data that is not accepted because the tunnel was closed is not held either.
        let _refused = tokio::time::timeout(Duration::from_secs(1), tunnel.write_all(bytes)).await;
        tunnels.push(tunnel);
    }
    let growth = resident(&server).saturating_sub(before);
    assert!(growth < MAX_MEMORY, "{TUNNELS} tunnels hold {} KiB", growth >> 10);
    scene.echoed().await;
    for tunnel in &mut tunnels {
        ended_with_goaway(tunnel).await;
    }
    until("all of them are counted", async || {
        closed(&scene, reason).await == Some(f64::from(u32::try_from(TUNNELS).expect("few")))
    })
    .await;
    scene.echoed().await;
}

/// Sends HEADERS and four CONTINUATION frames of 1 MiB without END_HEADERS. They would exhaust the
/// memory of a proxy that allows frames of 1 MiB.
async fn header_blocks() {
    let mut bytes = Vec::new();
    for kind in [1, 9, 9, 9, 9] {
        bytes.extend([0x10, 0, 0, kind, 0, 0, 0, 0, 1]);
        bytes.extend(vec![0; 1 << 20]);
    }
    assert_held_tunnels_end(&bytes, "header_block").await;
    // The maximum accepted frame size.
    let mut bytes = vec![0, 0xf0, 0, 1, 0, 0, 0, 0, 1];
    bytes.extend(vec![0; 0xf000 - 1]);
    assert_held_tunnels_end(&bytes, "unfinished_frame").await;
}

async fn data_frames() {
    let mut bytes = vec![4, 0, 0, 0, 0, 0, 0, 0, 1];
    bytes.extend(vec![0; (256 << 10) - 1]);
    assert_held_tunnels_end(&bytes, "unfinished_frame").await;
}

async fn idle() {
    let scene = Scene::new().await;
    let settings = scene.server_settings().set("timeouts.tunnel_idle=1s");
    let _server = scene.server.proxy(&settings).await;
    let client = TlsClient::new(Some(&scene.pki.issue("rogue")));
    let mut tunnel = tunnel(&scene, &client).await.expect("a handshake");
    until("the proxy sends GOAWAY", async || closed(&scene, "idle").await == Some(1.0)).await;
    let mut received = Vec::new();
    let goaway = async {
        // Expected frames: SETTINGS, its acknowledgement, WINDOW_UPDATE, GOAWAY.
        while !received.windows(2).any(|pair| pair == [8, GOAWAY]) {
            let _more = tunnel.read_buf(&mut received).await.expect("GOAWAY comes first");
        }
    };
    within("GOAWAY", goaway).await;
}
