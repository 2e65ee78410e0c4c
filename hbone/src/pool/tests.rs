//! Tests of sharing, opening and closing tunnels, over in-memory connections. `failures` tests
//! failures.

mod failures;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::Bytes;
use futures_util::future::join_all;
use http::{HeaderMap, StatusCode};
use tokio::io::{DuplexStream, duplex};
use tokio::runtime::Handle as Runtime;
use tokio::task::{AbortHandle, yield_now};
use tokio::time::sleep;

use super::*;
use crate::testing::{CLIENT, HOUR, Mesh, SECOND, SERVER, id, request};
use crate::tunnel::server::{Acceptor, Incoming};
use crate::tunnel::settings::{ClientSettings, ServerSettings};

const IDLE: Duration = Duration::from_secs(60);
const SETTINGS: PoolSettings = PoolSettings {
    dial: Duration::from_secs(5),
    handshake: SECOND,
    reply: SECOND,
    idle: IDLE,
    max_age: HOUR,
    streams_per_tunnel: 100,
    tunnels_per_peer: 3,
};

/// The ports of servers that misbehave. All other servers accept every request, and keep the stream
/// open until the client ends it.
const NEVER_CONNECTS: u16 = 1;
const REFUSES_CONNECTIONS: u16 = 2;
/// The server answers only the first request.
const ANSWERS_ONCE: u16 = 3;
/// The first connection answers only its first request, and closes at the fifth.
const CLOSES_AT_FIFTH_REQUEST: u16 = 4;
/// The server closes the connection at the first request.
const CLOSES_AT_FIRST_REQUEST: u16 = 5;
/// The server sends GOAWAY after the tenth request of a tunnel.
const SENDS_GOAWAY: u16 = 6;
/// The server answers with status 503.
const UNAVAILABLE: u16 = 7;
/// The server resets each stream.
const RESETS_STREAMS: u16 = 8;
const DIAL_PANICS: u16 = 9;
/// The server reads nothing after the handshake.
const READS_NOTHING: u16 = 10;

struct Servers {
    acceptor: Acceptor,
    dials: AtomicUsize,
    down: AtomicBool,
    connections: Mutex<Vec<Connection>>,
}

#[derive(Clone)]
struct Connection {
    requests: Arc<AtomicUsize>,
    serving: AbortHandle,
    drain: Arc<Notify>,
}

impl Dial for Arc<Servers> {
    type Io = DuplexStream;

    async fn dial(&self, address: SocketAddr) -> io::Result<DuplexStream> {
        let first = self.dials.fetch_add(1, Ordering::Relaxed) == 0;
        match address.port() {
            NEVER_CONNECTS => std::future::pending().await,
            DIAL_PANICS => panic!("the test requires it"),
            REFUSES_CONNECTIONS => return Err(io::ErrorKind::ConnectionRefused.into()),
            _ if self.down.load(Ordering::Relaxed) => {
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            _ => {}
        }
        let (near, far) = duplex(64 << 10);
        let (requests, drain) = (Arc::<AtomicUsize>::default(), Arc::<Notify>::default());
        let behaviour =
            if first || address.port() != CLOSES_AT_FIFTH_REQUEST { address.port() } else { 80 };
        let acceptor = self.acceptor.clone();
        let serve = serve(acceptor, far, behaviour, requests.clone(), drain.clone());
        let serving = tokio::spawn(serve).abort_handle();
        self.connections.lock().unwrap().push(Connection { requests, serving, drain });
        Ok(near)
    }
}

async fn serve(
    acceptor: Acceptor,
    io: DuplexStream,
    behaviour: u16,
    requests: Arc<AtomicUsize>,
    drain: Arc<Notify>,
) {
    let Ok(mut tunnel) = acceptor.accept(io, SECOND).await else { return };
    let mut unanswered = Vec::new();
    if behaviour == READS_NOTHING {
        std::future::pending::<()>().await;
    }
    loop {
        let incoming = tokio::select! {
            incoming = tunnel.next() => incoming,
            () = drain.notified() => {
                tunnel.drain();
                continue;
            }
        };
        let Some(incoming) = incoming else { return };
        match (behaviour, requests.fetch_add(1, Ordering::Relaxed) + 1) {
            (CLOSES_AT_FIRST_REQUEST, _) | (CLOSES_AT_FIFTH_REQUEST, 5) => return,
            (CLOSES_AT_FIFTH_REQUEST, 2..) => unanswered.push(incoming),
            (UNAVAILABLE, _) => incoming.refuse(StatusCode::SERVICE_UNAVAILABLE),
            (RESETS_STREAMS, _) => drop(incoming),
            (SENDS_GOAWAY, 10) => {
                tunnel.drain();
                accept(incoming);
            }
            (ANSWERS_ONCE, _) => {
                accept(incoming);
                // Poll once more: h2 sends the queued answer in the next poll.
                let _none = timeout(SECOND / 10, tunnel.next()).await;
                std::future::pending::<()>().await;
            }
            _ => accept(incoming),
        }
    }
}

/// Accepts the stream and reads to its end, then ends it.
fn accept(incoming: Incoming) {
    let Ok(stream) = incoming.accept(HeaderMap::new()) else { return };
    tokio::spawn(async move {
        let (mut reader, mut writer) = stream.split();
        while let Ok(Some(_)) = reader.read().await {}
        writer.finish()
    });
}

/// A pool, and the servers that it connects to.
struct Client {
    pool: Pool<Arc<Servers>>,
    connector: Connector,
    servers: Arc<Servers>,
}

impl Client {
    fn new() -> Self {
        Self::with(200, SETTINGS)
    }

    fn with(max_streams: u32, settings: PoolSettings) -> Self {
        let server = ServerSettings { max_streams, ..ServerSettings::default() };
        Self::of(Mesh::with(ClientSettings::default(), server), settings)
    }

    fn of(mesh: Mesh, settings: PoolSettings) -> Self {
        let servers = Arc::new(Servers {
            acceptor: mesh.acceptor,
            dials: AtomicUsize::new(0),
            down: AtomicBool::new(false),
            connections: Mutex::default(),
        });
        let pool = Pool::new(servers.clone(), settings);
        Self { pool, connector: mesh.connector, servers }
    }

    async fn connect(&self, port: u16) -> Result<TunnelStream, HboneError> {
        self.pool.connect(&key(port), &self.connector, request).await
    }

    async fn stream(&self) -> TunnelStream {
        self.connect(80).await.unwrap()
    }

    async fn streams(&self, count: usize) -> Vec<TunnelStream> {
        join_all((0..count).map(|_| self.stream())).await
    }

    /// Opens a stream and ends it.
    async fn exchange(&self, port: u16) -> Result<(), HboneError> {
        let (mut reader, mut writer) = self.connect(port).await?.split();
        writer.write("request".into()).await?;
        writer.finish()?;
        assert_eq!(reader.read().await?, None);
        Ok(())
    }

    fn dials(&self) -> usize {
        self.servers.dials.load(Ordering::Relaxed)
    }

    fn connection(&self, index: usize) -> Connection {
        self.servers.connections.lock().unwrap()[index].clone()
    }

    /// The number of requests on each connection.
    fn requests(&self) -> Vec<usize> {
        let connections = self.servers.connections.lock().unwrap();
        connections.iter().map(|one| one.requests.load(Ordering::Relaxed)).collect()
    }

    fn entries(&self) -> usize {
        self.pool.0.state().entries()
    }

    /// Waits until background tasks fulfil `condition`.
    async fn wait_until(&self, condition: impl Fn(PoolStatistics) -> bool) {
        let holds = || condition(self.pool.statistics());
        assert!(eventually(holds).await, "still {:?}", self.pool.statistics());
    }
}

/// Returns true once `condition` holds. Does not advance the clock: all tasks run in memory on one
/// thread.
async fn eventually(condition: impl Fn() -> bool) -> bool {
    for _ in 0..100_000 {
        if condition() {
            return true;
        }
        yield_now().await;
    }
    false
}

fn key(port: u16) -> TunnelKey {
    TunnelKey {
        source: id(CLIENT),
        address: SocketAddr::from(([10, 0, 0, 1], port)),
        peers: [id(SERVER)].into(),
    }
}

#[tokio::test]
async fn concurrent_callers_share_one_dial() {
    let client = Client::new();
    let _streams = client.streams(50).await;
    assert_eq!(client.dials(), 1);
    let counted = client.pool.statistics();
    assert_eq!((counted.tunnels, counted.streams), (1, 50));
}

#[tokio::test]
async fn full_tunnel_leads_to_second_tunnel() {
    let client = Client::with(200, PoolSettings { streams_per_tunnel: 10, ..SETTINGS });
    let streams = client.streams(25).await;
    assert_eq!((client.dials(), client.pool.tunnels()), (3, 3));
    drop(streams);
    let _streams = client.streams(25).await;
    assert_eq!(client.dials(), 3);
}

#[tokio::test]
async fn tunnel_is_full_at_stream_limit_of_peer() {
    let client = Client::with(2, SETTINGS);
    let mut streams = Vec::new();
    for _ in 0..6 {
        streams.push(client.stream().await);
    }
    client.wait_until(|now| now.dialing == 0).await;
    assert_eq!(client.dials(), 3);
    assert_eq!(client.requests(), [2, 2, 2]);
}

#[tokio::test]
async fn tunnel_serves_more_streams_than_concurrent_limit() {
    let client = Client::with(100, PoolSettings { tunnels_per_peer: 1, ..SETTINGS });
    for _ in 0..3 {
        for outcome in join_all((0..100).map(|_| client.exchange(80))).await {
            outcome.unwrap();
        }
    }
    assert_eq!((client.dials(), client.requests()), (1, vec![300]));
    let streams = client.streams(100).await;
    let more = client.streams(50).await;
    assert_eq!((streams.len() + more.len(), client.dials()), (150, 2));
}

#[tokio::test]
async fn half_full_tunnel_leads_to_others_in_background_up_to_limit() {
    let client = Client::with(200, PoolSettings { streams_per_tunnel: 10, ..SETTINGS });
    let mut streams = Vec::new();
    for (wanted, tunnels) in [(5, 1), (1, 2), (6, 3), (14, 3)] {
        for _ in 0..wanted {
            streams.push(client.stream().await);
        }
        client.wait_until(|now| now.tunnels == tunnels && now.dialing == 0).await;
    }
    assert_eq!((client.dials(), client.requests()), (3, vec![9, 9, 8]));
}

#[tokio::test(start_paused = true)]
async fn busy_tunnel_leads_to_preferred_second_tunnel() {
    let client = Client::new();
    let (_reader, mut bulk) = client.stream().await.split();
    let megabyte = Bytes::from(vec![0; 1 << 20]);
    for _ in 0..48 {
        bulk.write(megabyte.clone()).await.unwrap();
    }
    sleep(SECOND).await;
    let _second = client.stream().await;
    client.wait_until(|now| now.tunnels == 2).await;
    let _third = client.stream().await;
    let _fourth = client.stream().await;
    assert_eq!((client.dials(), client.requests()), (2, vec![2, 2]));
    sleep(5 * SECOND).await;
    let _fifth = client.streams(4).await;
    assert_eq!((client.dials(), client.requests()), (2, vec![4, 4]), "it is quiet again");
}

#[tokio::test(start_paused = true)]
async fn surplus_tunnels_close_early_and_last_one_late() {
    let client = Client::with(200, PoolSettings { streams_per_tunnel: 10, ..SETTINGS });
    let streams = client.streams(25).await;
    sleep(3 * IDLE).await;
    assert_eq!(client.pool.tunnels(), 3, "all have streams");
    drop(streams);
    sleep(IDLE / 2).await;
    assert_eq!(client.pool.statistics(), PoolStatistics { tunnels: 1, ..Default::default() });
    sleep(IDLE * 2).await;
    assert_eq!(client.entries(), 0);
    for index in 0..3 {
        assert!(
            client.connection(index).serving.is_finished(),
            "closed, not only removed from the pool"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn aged_tunnel_finishes_streams_and_closes() {
    let client = Client::with(200, PoolSettings { max_age: IDLE / 2, ..SETTINGS });
    let (mut reader, mut writer) = client.stream().await.split();
    sleep(IDLE / 4).await;
    drop(client.stream().await);
    assert_eq!(client.dials(), 1);
    sleep(IDLE / 4).await;
    let _young = client.stream().await;
    let expected = PoolStatistics { tunnels: 1, retired: 1, streams: 2, ..Default::default() };
    assert_eq!((client.dials(), client.pool.statistics()), (2, expected));
    writer.write("still open".into()).await.unwrap();
    writer.finish().unwrap();
    assert_eq!(reader.read().await.unwrap(), None);
    drop((reader, writer));
    client.wait_until(|now| now.retired == 0 && now.tunnels == 1).await;
    assert!(client.connection(0).serving.is_finished());
}

#[tokio::test]
async fn tunnels_are_not_shared_between_sources_or_expected_peers() {
    let client = Client::new();
    let _stream = client.stream().await;
    let source = TunnelKey { source: id("spiffe://td/ns/x/sa/y"), ..key(80) };
    let _other = client.pool.connect(&source, &client.connector, request).await.unwrap();
    assert_eq!((client.dials(), client.entries()), (2, 2));
    let peers = TunnelKey { peers: [id("spiffe://td/ns/x/sa/y")].into(), ..key(80) };
    let refused = client.pool.connect(&peers, &client.connector, request).await;
    assert!(matches!(refused, Err(HboneError::UnexpectedPeer { .. })), "{refused:?}");
    assert_eq!((client.dials(), client.pool.statistics().backing_off), (3, 1));
}

#[tokio::test(start_paused = true)]
async fn dial_continues_when_caller_cancels() {
    let client = Client::new();
    timeout(Duration::ZERO, client.stream()).await.unwrap_err();
    client.stream().await;
    assert_eq!(client.dials(), 1);
}

#[tokio::test]
async fn drained_pool_opens_no_stream_and_keeps_open_ones() {
    let client = Client::new();
    let (reader, mut writer) = client.stream().await.split();
    client.pool.drain();
    assert_eq!(client.pool.tunnels(), 0);
    writer.write("still open".into()).await.unwrap();
    writer.finish().unwrap();
    drop((reader, writer));
    client.wait_until(|now| now == PoolStatistics::default()).await;
}

#[tokio::test(start_paused = true)]
async fn short_streams_leave_no_state() {
    let tasks = || Runtime::current().metrics().num_alive_tasks();
    let before = tasks();
    let client = Client::with(100, SETTINGS);
    for _ in 0..100 {
        for outcome in join_all((0..100).map(|_| client.exchange(80))).await {
            outcome.unwrap();
        }
    }
    assert_eq!(client.requests().iter().sum::<usize>(), 10_000);
    assert!(client.dials() <= SETTINGS.tunnels_per_peer, "{}", client.dials());
    assert_eq!(client.pool.statistics().streams, 0);
    sleep(2 * IDLE).await;
    assert_eq!((client.entries(), tasks()), (0, before));
}

#[tokio::test]
async fn tasks_of_dropped_pool_end_with_last_stream() {
    let tasks = || Runtime::current().metrics().num_alive_tasks();
    let before = tasks();
    let Client { pool, connector, .. } = Client::new();
    let stream = pool.connect(&key(80), &connector, request).await.unwrap();
    drop(pool);
    yield_now().await;
    assert!(tasks() > before);
    drop(stream);
    assert!(eventually(|| tasks() == before).await);
}
