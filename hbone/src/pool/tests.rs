//! Sharing, growing and forgetting tunnels, over connections in memory.

use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::join_all;
use http::HeaderMap;
use tokio::io::{DuplexStream, duplex};
use tokio::task::AbortHandle;

use super::*;
use crate::testing::{Mesh, SECOND, SERVER, id, request};
use crate::{Acceptor, ClientSettings, ServerSettings};

const IDLE: Duration = Duration::from_secs(60);

/// Dials servers that accept every request and keep the stream until the client ends it.
struct Servers {
    acceptor: Acceptor,
    dials: AtomicUsize,
    running: Mutex<Vec<AbortHandle>>,
}

/// Where nobody answers, and where nobody listens.
const BLACK_HOLE: u16 = 1;
const CLOSED: u16 = 2;
/// Answers the first request, and then nothing any more.
const MUTE: u16 = 3;

impl Dial for Arc<Servers> {
    type Io = DuplexStream;

    async fn dial(&self, address: SocketAddr) -> io::Result<DuplexStream> {
        self.dials.fetch_add(1, Ordering::Relaxed);
        match address.port() {
            BLACK_HOLE => std::future::pending().await,
            CLOSED => return Err(io::ErrorKind::ConnectionRefused.into()),
            _ => {}
        }
        let (near, far) = duplex(64 << 10);
        let acceptor = self.acceptor.clone();
        let mute = address.port() == MUTE;
        let serving = tokio::spawn(async move {
            let mut tunnel = acceptor.accept(far, SECOND).await.unwrap();
            while let Some(incoming) = tunnel.next().await {
                let Ok(stream) = incoming.accept(HeaderMap::new()) else {
                    continue;
                };
                tokio::spawn(async move {
                    let (mut reader, _writer) = stream.split();
                    while let Ok(Some(_)) = reader.read().await {}
                });
                if mute {
                    // The answer is queued: one more turn sends it.
                    let _none = timeout(SECOND / 10, tunnel.next()).await;
                    std::future::pending::<()>().await;
                }
            }
        });
        self.running.lock().unwrap().push(serving.abort_handle());
        Ok(near)
    }
}

fn pool(max_streams: u32, streams_per_tunnel: usize) -> (Pool<Arc<Servers>>, Arc<Servers>) {
    let server = ServerSettings { max_streams, ..ServerSettings::default() };
    let mesh = Mesh::with(ClientSettings::default(), server);
    let servers = Arc::new(Servers {
        acceptor: mesh.acceptor,
        dials: AtomicUsize::new(0),
        running: Mutex::default(),
    });
    let settings = PoolSettings {
        dial: 5 * SECOND,
        handshake: SECOND,
        reply: SECOND,
        idle: IDLE,
        streams_per_tunnel,
    };
    (Pool::new(servers.clone(), mesh.connector, settings), servers)
}

fn key(port: u16) -> TunnelKey {
    TunnelKey { address: SocketAddr::from(([10, 0, 0, 1], port)), peers: [id(SERVER)].into() }
}

fn dials(servers: &Servers) -> usize {
    servers.dials.load(Ordering::Relaxed)
}

async fn connect_many(
    pool: &Pool<Arc<Servers>>,
    count: usize,
) -> Vec<Result<TunnelStream, HboneError>> {
    let key = key(80);
    join_all((0..count).map(|_| pool.connect(&key, request()))).await
}

fn entries(pool: &Pool<Arc<Servers>>) -> usize {
    pool.0.entries().len()
}

#[tokio::test]
async fn fifty_at_once_share_one_dial() {
    let (pool, servers) = pool(200, 100);
    let streams = connect_many(&pool, 50).await;
    assert!(streams.iter().all(Result::is_ok));
    assert_eq!(dials(&servers), 1);
    pool.connect(&key(80), request()).await.unwrap();
    assert_eq!(dials(&servers), 1);
}

#[tokio::test]
async fn a_full_tunnel_gets_a_sibling() {
    let (pool, servers) = pool(200, 10);
    let streams = connect_many(&pool, 25).await;
    assert!(streams.iter().all(Result::is_ok));
    assert_eq!((dials(&servers), pool.tunnels()), (3, 3));
    drop(streams);
    assert!(connect_many(&pool, 25).await.iter().all(Result::is_ok), "room is used again");
    assert_eq!(dials(&servers), 3);
}

#[tokio::test]
async fn the_peers_own_limit_makes_a_tunnel_full() {
    let (pool, servers) = pool(2, 100);
    let mut streams = Vec::new();
    for _ in 0..6 {
        streams.push(pool.connect(&key(80), request()).await.unwrap());
    }
    assert_eq!(dials(&servers), 3);
}

#[tokio::test(start_paused = true)]
async fn a_stuck_dial_does_not_hold_up_another_key() {
    let (pool, servers) = pool(200, 100);
    let pool = Arc::new(pool);
    let stuck = tokio::spawn({
        let pool = pool.clone();
        async move { pool.connect(&key(BLACK_HOLE), request()).await }
    });
    tokio::task::yield_now().await;
    let start = Instant::now();
    pool.connect(&key(80), request()).await.unwrap();
    assert!(start.elapsed() < SECOND);
    assert_eq!(dials(&servers), 2);
    let error = stuck.await.unwrap().unwrap_err();
    let HboneError::Dial { source, .. } = error else { panic!("{error:?}") };
    assert_eq!(source.kind(), io::ErrorKind::TimedOut);
}

#[tokio::test]
async fn a_failed_dial_is_told_to_all_who_wait_and_not_remembered() {
    let (pool, servers) = pool(200, 100);
    let closed = key(CLOSED);
    let answers = join_all((0..5).map(|_| pool.connect(&closed, request()))).await;
    assert!(answers.iter().all(|answer| matches!(answer, Err(HboneError::Dial { .. }))));
    assert_eq!((dials(&servers), entries(&pool)), (1, 0));
    pool.connect(&closed, request()).await.unwrap_err();
    assert_eq!(dials(&servers), 2);
}

#[tokio::test]
async fn other_expected_peers_need_another_tunnel() {
    let (pool, servers) = pool(200, 100);
    let _stream = pool.connect(&key(80), request()).await.unwrap();
    let other = TunnelKey { peers: [id("spiffe://td/ns/x/sa/y")].into(), ..key(80) };
    let refused = pool.connect(&other, request()).await;
    assert!(matches!(refused, Err(HboneError::UnexpectedPeer { .. })), "{refused:?}");
    assert_eq!((dials(&servers), entries(&pool)), (2, 1));
}

#[tokio::test]
async fn a_lost_tunnel_is_replaced() {
    let (pool, servers) = pool(200, 100);
    let (mut reader, _writer) = pool.connect(&key(80), request()).await.unwrap().split();
    servers.running.lock().unwrap().pop().unwrap().abort();
    assert!(matches!(reader.read().await, Err(HboneError::Lost { .. })));
    pool.connect(&key(80), request()).await.unwrap();
    assert_eq!((dials(&servers), pool.tunnels()), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_without_streams_is_closed_and_forgotten() {
    let (pool, servers) = pool(200, 100);
    let stream = pool.connect(&key(80), request()).await.unwrap();
    sleep(3 * IDLE).await;
    assert_eq!(entries(&pool), 1, "it has a stream");
    drop(stream);
    sleep(2 * IDLE).await;
    assert_eq!(entries(&pool), 0);
    let serving = servers.running.lock().unwrap().pop().unwrap();
    assert!(serving.is_finished(), "the connection is closed, not only forgotten");
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_that_went_silent_is_not_used_again() {
    let (pool, servers) = pool(200, 100);
    let key = key(MUTE);
    for _ in 0..2 {
        let _stream = pool.connect(&key, request()).await.unwrap();
        sleep(SECOND).await;
        let second = pool.connect(&key, request()).await;
        assert!(matches!(second, Err(HboneError::ReplyTimeout { .. })), "{second:?}");
        assert_eq!(entries(&pool), 0);
    }
    assert_eq!(dials(&servers), 2);
}

#[tokio::test(start_paused = true)]
async fn a_dial_goes_on_when_the_one_who_asked_gives_up() {
    let (pool, servers) = pool(200, 100);
    let gave_up = timeout(Duration::ZERO, pool.connect(&key(80), request())).await;
    gave_up.unwrap_err();
    pool.connect(&key(80), request()).await.unwrap();
    assert_eq!(dials(&servers), 1);
}

#[tokio::test]
async fn a_drained_pool_holds_nothing_and_open_streams_go_on() {
    let (pool, _servers) = pool(200, 100);
    let (_reader, mut writer) = pool.connect(&key(80), request()).await.unwrap().split();
    pool.drain();
    assert_eq!(entries(&pool), 0);
    writer.write("still open".into()).await.unwrap();
    writer.finish().unwrap();
}
