//! Microbenchmarks of the proxy's parts by criterion: `cargo bench -p underpass-benches --bench
//! micro [-- FILTER]`.
//!
//! * **tunnel**: bulk and ping-pong of 100 bytes over an in-memory pipe: TLS and HTTP/2 without
//!   sockets.
//! * **pool**: another stream of an open tunnel, including CONNECT and its response.
//! * **copy**: bulk between two TCP connections on loopback, and from one into an in-memory tunnel,
//!   including both ends.
//! * **registry**: termination of all idle connections at once, without their sockets.
//! * **metrics**: rendering the metrics of 50,000 connections whose label sets all differ.
//! * **route** and **policy**: a decision in a mesh with 10,000 workloads, or with 10,000 policies
//!   of which five apply to the workload.
//! * **rules**: making a plan from settings, and writing a plan as text.
//!
//! Relaying and routing are private to the proxy: `underpass::bench` exposes them for this program.
//! Everything runs on one thread.

#![expect(
    clippy::expect_used,
    reason = "a bench must stop at an error, as its figures would be wrong"
)]

use std::fmt::Write as _;
use std::hint::black_box;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput};
use http::HeaderMap;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio::time::Instant;
use underpass::bench::{LabelSets, Router, Upstream, copy, terminate};
use underpass_config::{Connection, Mesh, PolicyAction, Sources, SpiffeId};
use underpass_hbone::{
    Acceptor, CertificateAuthority, ClientSettings, ConnectRequest, Connector, Credentials, Dial,
    Identity, Pool, PoolSettings, ServerSettings, Trust, TunnelKey, TunnelReader, TunnelStream,
    TunnelWriter,
};
use underpass_interception::{Ports, RulePlan};

const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/default/sa/server";
const MINUTE: Duration = Duration::from_secs(60);
const MIB: usize = 1 << 20;
/// The size of bulk writes, equal to the size of a proxy's reads.
const BLOCK: usize = 128 << 10;
const MESSAGE: usize = 100;
const MEMBERS: usize = 10_000;
const SERVICES: usize = MEMBERS / 10;

fn main() {
    if underpass_benches::bench_arguments().is_none() {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime starts");
    let mut criterion = Criterion::default().configure_from_args();
    tunnel(&mut criterion, &runtime);
    pool(&mut criterion, &runtime);
    copying(&mut criterion, &runtime);
    registry(&mut criterion, &runtime);
    metrics(&mut criterion);
    route(&mut criterion);
    policy(&mut criterion);
    rules(&mut criterion);
    criterion.final_summary();
}

/// Two workloads of one authority. A task accepts tunnels that are dialled in memory, and hands
/// over their streams.
struct InMemoryPair {
    connector: Connector,
    acceptor: Arc<Acceptor>,
    accepted: mpsc::UnboundedSender<TunnelStream>,
    streams: mpsc::UnboundedReceiver<TunnelStream>,
}

impl InMemoryPair {
    fn new() -> Self {
        let domain = "cluster.local".parse().expect("a trust domain");
        let authority = CertificateAuthority::generate(domain).expect("a certificate authority");
        let credentials = |who: &str| {
            let issued = authority.issue(&id(who), 60 * MINUTE).expect("a certificate");
            let roots = authority.roots_pem().as_bytes();
            let (chain, key) = (issued.chain_pem.as_bytes(), issued.key_pem.as_bytes());
            let identity = Identity::from_pem(chain, key, roots).expect("it was just issued");
            Credentials::new(identity, Trust::default()).expect("they can be used").fixed()
        };
        let connector = Connector::new(credentials(CLIENT), ClientSettings::default());
        let acceptor = Arc::new(Acceptor::new(credentials(SERVER), ServerSettings::default()));
        let (accepted, streams) = mpsc::unbounded_channel();
        Self { connector, acceptor, accepted, streams }
    }

    fn pool(&self) -> Pool<Memory> {
        let dial = Memory { acceptor: self.acceptor.clone(), accepted: self.accepted.clone() };
        let settings = PoolSettings {
            dial: MINUTE,
            handshake: MINUTE,
            reply: MINUTE,
            idle: 60 * MINUTE,
            max_age: 60 * MINUTE,
            streams_per_tunnel: 100,
            tunnels_per_peer: 1,
        };
        Pool::new(dial, settings)
    }

    /// Opens a stream and returns both ends.
    async fn stream(&mut self, pool: &Pool<Memory>) -> (TunnelStream, TunnelStream) {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 15008));
        let key = TunnelKey { source: id(CLIENT), address, peers: [id(SERVER)].into() };
        let request =
            || ConnectRequest { authority: "10.0.0.1:80".to_owned(), headers: HeaderMap::new() };
        let near = pool.connect(&key, &self.connector, request).await.expect("it is accepted");
        (near, self.streams.recv().await.expect("the server does not end"))
    }
}

/// An in-memory network whose server accepts every stream.
struct Memory {
    acceptor: Arc<Acceptor>,
    accepted: mpsc::UnboundedSender<TunnelStream>,
}

impl Dial for Memory {
    type Io = DuplexStream;

    async fn dial(&self, _address: SocketAddr) -> io::Result<DuplexStream> {
        let (near, far) = duplex(MIB);
        let (acceptor, accepted) = (self.acceptor.clone(), self.accepted.clone());
        tokio::spawn(async move {
            let mut tunnel = acceptor.accept(far, MINUTE).await.expect("a good handshake");
            while let Some(incoming) = tunnel.next().await {
                let stream = incoming.accept(HeaderMap::new()).expect("the client still waits");
                accepted.send(stream).expect("the bench still waits");
            }
        });
        Ok(near)
    }
}

fn id(text: &str) -> SpiffeId {
    text.parse().expect("an identity")
}

/// Runs `each` the number of times that criterion requests. Returns the total time.
async fn timed(times: u64, mut each: impl AsyncFnMut()) -> Duration {
    let began = Instant::now();
    for _ in 0..times {
        each().await;
    }
    began.elapsed()
}

fn tunnel(criterion: &mut Criterion, runtime: &Runtime) {
    let mut sides = InMemoryPair::new();
    let pool = sides.pool();
    let (near, far) = runtime.block_on(sides.stream(&pool));
    let ((mut near_reader, mut near_writer), (mut far_reader, mut far_writer)) =
        (near.split(), far.split());
    let mut group = criterion.benchmark_group("tunnel");
    group.bench_function("ping-pong", |bencher| {
        bencher.iter_custom(|times| {
            runtime.block_on(timed(times, async || {
                send(&mut near_writer, MESSAGE).await;
                receive(&mut far_reader, MESSAGE).await;
                send(&mut far_writer, MESSAGE).await;
                receive(&mut near_reader, MESSAGE).await;
            }))
        });
    });
    group.throughput(Throughput::Bytes(MIB as u64));
    group.bench_function("bulk", |bencher| {
        bencher.iter_custom(|times| {
            runtime.block_on(timed(times, async || {
                tokio::join!(send(&mut near_writer, MIB), receive(&mut far_reader, MIB));
            }))
        });
    });
    group.finish();
}

async fn send(writer: &mut TunnelWriter, bytes: usize) {
    static BYTES: [u8; BLOCK] = [b'x'; BLOCK];
    let mut left = bytes;
    while left > 0 {
        let block = Bytes::from_static(&BYTES).slice(..left.min(BLOCK));
        left -= block.len();
        writer.write(block).await.expect("the tunnel holds");
    }
}

async fn receive(reader: &mut TunnelReader, bytes: usize) {
    let mut left = bytes;
    while left > 0 {
        let chunk = reader.read().await.expect("the tunnel holds").expect("there is more");
        left -= chunk.len();
    }
}

fn pool(criterion: &mut Criterion, runtime: &Runtime) {
    let mut sides = InMemoryPair::new();
    let pool = sides.pool();
    // The first stream includes the handshake, so it is not measured.
    let first = runtime.block_on(sides.stream(&pool));
    criterion.bench_function("pool/stream", |bencher| {
        bencher.iter_custom(|times| {
            runtime.block_on(timed(times, async || drop(sides.stream(&pool).await)))
        });
    });
    drop(first);
}

fn copying(criterion: &mut Criterion, runtime: &Runtime) {
    let mut group = criterion.benchmark_group("copy");
    group.throughput(Throughput::Bytes(MIB as u64));
    let (mut client, mut server) = runtime.block_on(async {
        let ((client, near), (far, server)) = (pair().await, pair().await);
        tokio::spawn(copy(near, Upstream::Tcp(far)));
        (client, server)
    });
    let block = vec![b'x'; MIB];
    let mut buffer = vec![0; MIB];
    group.bench_function("between connections", |bencher| {
        bencher.iter_custom(|times| {
            runtime.block_on(timed(times, async || {
                let (sent, received) =
                    tokio::join!(client.write_all(&block), server.read_exact(&mut buffer));
                sent.expect("the client's connection holds");
                received.expect("the server's connection holds");
            }))
        });
    });
    let mut sides = InMemoryPair::new();
    let pool = sides.pool();
    let (mut client, mut reader, _writer) = runtime.block_on(async {
        let (client, near) = pair().await;
        let (tunnel, far) = sides.stream(&pool).await;
        tokio::spawn(copy(near, Upstream::Tunnel(tunnel)));
        let (reader, writer) = far.split();
        (client, reader, writer)
    });
    group.bench_function("into a tunnel", |bencher| {
        bencher.iter_custom(|times| {
            runtime.block_on(timed(times, async || {
                let (sent, ()) = tokio::join!(client.write_all(&block), receive(&mut reader, MIB));
                sent.expect("the connection holds");
            }))
        });
    });
    group.finish();
}

/// Both ends of a TCP connection.
async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("loopback is up");
    let address = listener.local_addr().expect("it is bound");
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    (near.expect("it listens"), far.expect("one was connected").0)
}

fn registry(criterion: &mut Criterion, runtime: &Runtime) {
    let mut group = criterion.benchmark_group("registry");
    group.sample_size(10);
    for connections in [5_000, 50_000] {
        let id = BenchmarkId::new("terminate", connections);
        group.throughput(Throughput::Elements(connections as u64));
        group.bench_with_input(id, &connections, |bencher, &connections| {
            bencher.iter_custom(|rounds| {
                runtime.block_on(async {
                    let mut took = Duration::ZERO;
                    for _ in 0..rounds {
                        took += terminate(connections).await;
                    }
                    took
                })
            });
        });
    }
    group.finish();
}

fn metrics(criterion: &mut Criterion) {
    const LABEL_SETS: usize = 50_000;
    let mesh = Mesh::from_text("bench", &members(LABEL_SETS)).expect("a right mesh");
    let sets = LabelSets::new(&mesh);
    let mut group = criterion.benchmark_group("metrics");
    group.sample_size(10);
    group.throughput(Throughput::Bytes(sets.render() as u64));
    group.bench_function(BenchmarkId::new("render", LABEL_SETS), |bencher| {
        bencher.iter(|| black_box(sets.render()));
    });
    group.finish();
}

fn route(criterion: &mut Criterion) {
    let router = Router::new(Mesh::from_text("bench", &members(MEMBERS)).expect("a right mesh"));
    let mut group = criterion.benchmark_group("route");
    for (name, network, port, members) in [
        ("by workload", 10, 8080, MEMBERS),
        ("by service", 11, 80, SERVICES),
        ("unknown", 12, 80, MEMBERS),
    ] {
        let mut member = 0;
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                // Far from the previous one, to defeat the CPU cache.
                member = (member + 7919) % members;
                black_box(router.has_route(address(network, member, port)))
            });
        });
        assert!(router.has_route(address(network, 0, port)), "{name}");
    }
    group.finish();
}

fn address(network: u8, member: usize, port: u16) -> SocketAddr {
    let [.., b, c] = member.to_be_bytes();
    (Ipv4Addr::new(network, 0, b, c), port).into()
}

/// The mesh file: each workload is one of ten endpoints of a service.
fn members(count: usize) -> String {
    let mut text = String::from("workloads:\n");
    for member in 0..count {
        writeln!(
            text,
            "- {{name: app-{member}, namespace: default, serviceAccount: app, workloadIps: [\"{}\"], protocol: HBONE, \
             services: {{default/app-{}.example: {{80: 8080}}}}}}",
            address(10, member, 0).ip(),
            member % SERVICES
        )
        .expect("a String takes everything");
    }
    text.push_str("services:\n");
    for service in 0..SERVICES {
        writeln!(
            text,
            "- {{name: app-{service}, namespace: default, hostname: app-{service}.example, vips: [\"/{}\"], ports: {{80: 8080}}}}",
            address(11, service, 0).ip()
        )
        .expect("a String takes everything");
    }
    text
}

fn policy(criterion: &mut Criterion) {
    let mut text = String::from("policies:\n");
    for number in 0..MEMBERS {
        writeln!(
            text,
            "- {{name: p-{number}, namespace: ns-{}, scope: Namespace, action: Allow, dryRun: false, \
             rules: [[[{{principals: [!Exact cluster.local/ns/default/sa/a-{number}]}}]]]}}",
            number / 5
        )
        .expect("a String takes everything");
    }
    let mesh = Mesh::from_text("bench", &text).expect("a right mesh");
    let client = id(CLIENT);
    let connection = Connection {
        source: [192, 0, 2, 1].into(),
        destination: ([10, 0, 0, 9], 8080).into(),
        identity: Some(&client),
        aliases: &[],
    };
    criterion.bench_function("policy/five ask, none allows", |bencher| {
        bencher.iter(|| {
            let policies = mesh.policies(black_box("ns-1000"), None);
            let mut allowing =
                policies.layers().flat_map(|layer| layer.deciding(PolicyAction::Allow));
            black_box(allowing.any(|policy| policy.matches(&connection)))
        });
    });
}

fn rules(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("rules");
    for profile in ["ambient", "sidecar", "osm"] {
        let flags = vec![format!("interception.profile={profile}")];
        let sources = Sources { file: None, environment: Vec::new(), flags };
        let settings = sources.load().expect("the settings are right");
        let ports = Ports::of(&settings);
        let plan = || RulePlan::new(black_box(&settings.interception), ports, true);
        group.bench_function(BenchmarkId::new("plan", profile), |bencher| bencher.iter(plan));
        let made = plan();
        group.bench_function(BenchmarkId::new("text", profile), |bencher| {
            bencher.iter(|| black_box(&made).to_string());
        });
    }
    group.finish();
}
