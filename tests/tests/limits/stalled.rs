//! Tests of the memory that a peer's streams hold while an application, or the peer itself,
//! does not read.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use underpass_tests::{APP, Family, Proxy, Scene, Server, Suite, TlsClient, within};

use crate::tunnels::tunnel;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const WINDOW_UPDATE: u8 = 8;
const END_HEADERS: u8 = 4;
const ACK: u8 = 1;
/// The port of an application that accepts no connection.
const STALLED: u16 = 9001;
/// The memory of a tunnel besides unread bytes, which are about 1 MiB here (docs/hbone.md).
const MAX_MEMORY: u64 = 41 << 20;

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test(
        "the proxy holds no more memory than the bytes that an application does not read",
        unread_by_application,
    );
    suite.test(
        "the proxy holds no more memory than the answers that a peer does not read",
        unread_by_peer,
    );
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let [_, length @ ..] = u32::try_from(payload.len()).expect("a short frame").to_be_bytes();
    [&length[..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

fn connect(stream: u32, to: SocketAddr) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in [(":method", "CONNECT"), (":authority", &to.to_string())] {
        // RFC 7541 section 6.2.2: a literal without indexing.
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).expect("a short name"));
            block.extend(text.as_bytes());
        }
    }
    frame(HEADERS, END_HEADERS, stream, &block)
}

/// The anonymous memory of a proxy in bytes (`proc_pid_smaps(5)`). Private memory would include
/// pages of the executable, which become private when the proxies of parallel tests end.
fn anonymous_memory(proxy: &Proxy) -> u64 {
    let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", proxy.pid()));
    let rollup = rollup.expect("a running process");
    let value = rollup.lines().find_map(|line| line.strip_prefix("Anonymous:"));
    let kib = value.and_then(|value| value.trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.expect("a number of KiB") << 10
}

async fn send(tunnel: &mut TlsStream<TcpStream>, bytes: &[u8]) {
    within("the proxy reads", tunnel.write_all(bytes)).await.expect("the tunnel is open");
}

/// Reads the next frame. Returns its type and payload.
async fn read_frame(tunnel: &mut TlsStream<TcpStream>) -> (u8, Vec<u8>) {
    let mut head = [0; 9];
    within("a frame", tunnel.read_exact(&mut head)).await.expect("the tunnel is open");
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
    let mut payload = vec![0; length];
    within("a frame", tunnel.read_exact(&mut payload)).await.expect("the tunnel is open");
    (head[3], payload)
}

/// Reads frames until this number of bytes of DATA has arrived.
async fn read_data(tunnel: &mut TlsStream<TcpStream>, mut bytes: usize) {
    while bytes > 0 {
        if let (DATA, payload) = read_frame(tunnel).await {
            bytes -= payload.len();
        }
    }
}

/// Opens a tunnel and waits until both sides have exchanged their flow-control windows. Those of
/// the test are never exhausted.
async fn open_tunnel(scene: &Scene) -> TlsStream<TcpStream> {
    let client = TlsClient::new(Some(&scene.pki.issue("peer")));
    let mut tunnel = tunnel(scene, &client).await.expect("a handshake");
    let window = 0x4000_0000_u32.to_be_bytes();
    let initial_window = [&[0, 4][..], &window].concat();
    let settings = frame(SETTINGS, 0, 0, &initial_window);
    send(&mut tunnel, &[settings, frame(WINDOW_UPDATE, 0, 0, &window)].concat()).await;
    while read_frame(&mut tunnel).await.0 != WINDOW_UPDATE {}
    send(&mut tunnel, &frame(SETTINGS, ACK, 0, &[])).await;
    tunnel
}

async fn server_proxy(scene: &Scene) -> Proxy {
    scene.server.proxy(&scene.server_settings().set("logging.filter=warn")).await
}

/// Sends a byte to the stalled application between every 8 KiB that an echo server receives and
/// returns.
async fn unread_by_application() {
    const BATCH: usize = 32;
    const BATCHES: usize = 400;
    const FILLER: usize = 8100;
    let scene = Scene::new().await;
    let proxy = server_proxy(&scene).await;
    let _echo = Server::echo(&scene.server, APP);
    let _stalled = scene.server.listen(STALLED);
    let at = |port| scene.server.at(Family::V4, port);
    let mut tunnel = open_tunnel(&scene).await;
    send(&mut tunnel, &[connect(1, at(STALLED)), connect(3, at(APP))].concat()).await;
    // More than the capacity of the sockets of both applications.
    for _ in 0..64 {
        send(&mut tunnel, &frame(DATA, 0, 1, &[0; 16 << 10])).await;
    }
    let batch = [frame(DATA, 0, 1, &[0]), frame(DATA, 0, 3, &[0; FILLER])].concat().repeat(BATCH);
    let before = anonymous_memory(&proxy);
    for _ in 0..BATCHES {
        send(&mut tunnel, &batch).await;
        read_data(&mut tunnel, BATCH * FILLER).await;
        let growth = anonymous_memory(&proxy).saturating_sub(before);
        assert!(growth < MAX_MEMORY, "{} KiB are held", growth >> 10);
    }
}

/// Echo servers send small answers to a peer that reads none of them.
async fn unread_by_peer() {
    const STREAMS: u32 = 200;
    const ROUNDS: usize = 200;
    let scene = Scene::new().await;
    let proxy = server_proxy(&scene).await;
    let _echo = Server::echo(&scene.server, APP);
    let echo = scene.server.at(Family::V4, APP);
    let mut tunnel = open_tunnel(&scene).await;
    let streams = || (0..STREAMS).map(|index| 2 * index + 1);
    let open = streams().flat_map(|stream| connect(stream, echo));
    send(&mut tunnel, &open.collect::<Vec<u8>>()).await;
    let data: Vec<u8> = streams().flat_map(|stream| frame(DATA, 0, stream, &[0; 1100])).collect();
    exchange_bytes(&mut tunnel, STREAMS).await;
    let before = anonymous_memory(&proxy);
    for _ in 0..ROUNDS {
        send(&mut tunnel, &data).await;
        let growth = anonymous_memory(&proxy).saturating_sub(before);
        assert!(growth < MAX_MEMORY, "{} KiB are held", growth >> 10);
    }
}

/// Waits until every stream works: a byte has reached the echo server and has come back.
async fn exchange_bytes(tunnel: &mut TlsStream<TcpStream>, streams: u32) {
    let bytes = (0..streams).flat_map(|index| frame(DATA, 0, 2 * index + 1, &[0]));
    send(tunnel, &bytes.collect::<Vec<u8>>()).await;
    read_data(tunnel, streams as usize).await;
}
