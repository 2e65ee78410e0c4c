//! A running flow and both its ends, each a TCP connection or a stream of a tunnel in memory.

use std::future::poll_fn;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use underpass_config::SpiffeId;
use underpass_hbone::{
    Acceptor, CertificateAuthority, ClientSettings, ConnectRequest, Connector, Credentials,
    HboneError, Identity, MutualTrust, ServerSettings, Trust, Tunnel, TunnelReader, TunnelStream,
    TunnelWriter,
};
use underpass_interception::reset_on_close;

use super::super::deadlines::{Deadlines, Probes};
use super::super::{Flow, Neighbour};
use crate::decide::connection_registry::ConnectionRegistry;
use crate::error::ProxyError;
use crate::limits::Buffers;
use crate::observe::party::{Direction, Party};
use crate::observe::record::{ConnectionRecord, Facts, WorkerRecords};

const MINUTE: Duration = Duration::from_secs(60);

/// The kinds of connections on both sides of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FlowKind {
    Plain,
    IntoTunnel,
    OutOfTunnel,
    SameNode,
}

impl FlowKind {
    pub(super) const ALL: [Self; 4] =
        [Self::Plain, Self::IntoTunnel, Self::OutOfTunnel, Self::SameNode];

    /// Asserts that the client aborted.
    pub(super) fn assert_client_aborted(self, outcome: Result<(), ProxyError>) {
        let expected = match self {
            Self::Plain | Self::IntoTunnel | Self::SameNode => {
                matches!(outcome, Err(ProxyError::Client(_)))
            }
            Self::OutOfTunnel => is_reset(&outcome),
        };
        assert!(expected, "{self:?}: {outcome:?}");
    }

    /// Asserts that the server aborted.
    pub(super) fn assert_server_aborted(self, outcome: Result<(), ProxyError>) {
        let expected = match self {
            Self::Plain | Self::OutOfTunnel | Self::SameNode => {
                matches!(outcome, Err(ProxyError::Upstream(_)))
            }
            Self::IntoTunnel => is_reset(&outcome),
        };
        assert!(expected, "{self:?}: {outcome:?}");
    }
}

fn is_reset(outcome: &Result<(), ProxyError>) -> bool {
    matches!(outcome, Err(ProxyError::Tunnel(HboneError::Reset { .. })))
}

/// The end of a direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Fin,
    Reset,
}

/// One end of a flow.
pub(super) enum Side {
    Socket(TcpStream),
    Stream(TunnelReader, TunnelWriter),
    Gone,
}

impl Side {
    fn stream(stream: TunnelStream) -> Self {
        let (reader, writer) = stream.split();
        Self::Stream(reader, writer)
    }

    fn into_socket(self) -> TcpStream {
        match self {
            Self::Socket(stream) => stream,
            Self::Stream(..) | Self::Gone => panic!("no socket"),
        }
    }

    pub(super) async fn send(&mut self, data: &[u8]) {
        match self {
            Self::Socket(stream) => stream.write_all(data).await.unwrap(),
            Self::Stream(_, writer) => writer.write(Bytes::copy_from_slice(data)).await.unwrap(),
            Self::Gone => panic!("gone"),
        }
    }

    /// Sends until it is blocked for a while. Returns the number of sent bytes.
    pub(super) async fn send_until_it_blocks(&mut self) -> usize {
        let mut sent = 0;
        while let Ok(taken) = timeout(Duration::from_millis(300), self.send_some()).await {
            sent += taken;
        }
        sent
    }

    /// Sends a part of a piece. If cancelled, no byte was sent.
    async fn send_some(&mut self) -> usize {
        let mut data = Bytes::from_static(&[b'x'; 65536]);
        match self {
            Self::Socket(stream) => stream.write(&data).await.unwrap(),
            Self::Stream(_, writer) => {
                poll_fn(|cx| writer.poll_write(cx, &mut data, false)).await.unwrap()
            }
            Self::Gone => panic!("gone"),
        }
    }

    pub(super) async fn finish(&mut self) {
        match self {
            Self::Socket(stream) => stream.shutdown().await.unwrap(),
            Self::Stream(_, writer) => writer.finish().unwrap(),
            Self::Gone => panic!("gone"),
        }
    }

    pub(super) fn abort(&mut self) {
        match std::mem::replace(self, Self::Gone) {
            Self::Socket(stream) => reset_on_close(&stream),
            Self::Stream(_reader, mut writer) => writer.abort(),
            Self::Gone => panic!("gone"),
        }
    }

    async fn read_some(&mut self) -> Result<Option<Bytes>, End> {
        match self {
            Self::Socket(stream) => {
                let mut buffer = vec![0; 65536];
                let read = stream.read(&mut buffer).await.map_err(|_| End::Reset)?;
                buffer.truncate(read);
                Ok((read > 0).then(|| buffer.into()))
            }
            Self::Stream(reader, _) => reader.read().await.map_err(|_| End::Reset),
            Self::Gone => panic!("gone"),
        }
    }

    pub(super) async fn read(&mut self) -> (Vec<u8>, End) {
        let mut received = Vec::new();
        loop {
            match self.read_some().await {
                Ok(Some(data)) => received.extend_from_slice(&data),
                Ok(None) => return (received, End::Fin),
                Err(end) => return (received, end),
            }
        }
    }

    pub(super) async fn receive(&mut self, len: usize) -> Vec<u8> {
        let mut received = Vec::new();
        while received.len() < len {
            received.extend_from_slice(&self.read_some().await.unwrap().expect("more"));
        }
        assert_eq!(received.len(), len);
        received
    }

    /// The end that this side observes in the direction that it writes. It does not read.
    pub(super) async fn end_of_writing(&mut self) -> End {
        match self {
            Self::Socket(stream) => {
                let error = super::super::aborted(stream).await;
                assert!(
                    matches!(
                        error.kind(),
                        std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset
                    ),
                    "{error}"
                );
                End::Reset
            }
            Self::Stream(_, writer) => match writer.closed().await {
                HboneError::Reset { .. } => End::Reset,
                other => panic!("{other}"),
            },
            Self::Gone => panic!("gone"),
        }
    }
}

/// Both ends of a TCP connection.
pub(super) async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (theirs, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
    let ours = accepted.unwrap().0;
    let theirs = theirs.unwrap();
    ours.set_nodelay(true).unwrap();
    theirs.set_nodelay(true).unwrap();
    reset_on_close(&ours);
    (ours, theirs)
}

/// Both ends of a stream in a tunnel, and the tunnel's connections.
struct TunnelledStream {
    near: TunnelStream,
    far: TunnelStream,
    tunnel: Tunnel,
    driver: JoinHandle<()>,
}

/// Credentials of a client and of a server that trust each other.
fn credentials() -> [watch::Receiver<Credentials>; 2] {
    let authority = CertificateAuthority::generate("td".parse().unwrap()).unwrap();
    ["client", "server"].map(|account| {
        let id = format!("spiffe://td/ns/default/sa/{account}").parse().unwrap();
        let issued = authority.issue(&id, 60 * MINUTE).unwrap();
        let (chain, key) = (issued.chain_pem.as_bytes(), issued.key_pem.as_bytes());
        let identity = Identity::from_pem(chain, key, authority.roots_pem().as_bytes()).unwrap();
        Credentials::new(identity, Trust::default()).unwrap().fixed()
    })
}

fn expected() -> [SpiffeId; 1] {
    ["spiffe://td/ns/default/sa/server".parse().unwrap()]
}

async fn tunnelled_stream() -> TunnelledStream {
    let [client, server] = credentials();
    let mut client_settings = ClientSettings::default();
    let mut server_settings = ServerSettings::default();
    // Keepalive probes would expire when the paused clock advances.
    client_settings.keepalive.ping_after = 1_000_000 * MINUTE;
    server_settings.keepalive.ping_after = 1_000_000 * MINUTE;
    let connector = Connector::new(client, client_settings);
    let acceptor = Acceptor::new(server, server_settings);
    let (near, far) = tokio::io::duplex(1 << 20);
    let expected = expected();
    let address = SocketAddr::from(([127, 0, 0, 1], 15008));
    let (tunnel, served) = tokio::join!(
        connector.open(near, address, &expected, MINUTE),
        acceptor.accept(far, MINUTE)
    );
    let (tunnel, mut served) = (tunnel.unwrap(), served.unwrap());
    let (found, mut requests) = mpsc::unbounded_channel();
    let driver = tokio::spawn(async move {
        while let Some(incoming) = served.next().await {
            found.send(incoming).unwrap();
        }
    });
    let request = ConnectRequest { authority: "10.0.0.1:80".to_owned(), headers: HeaderMap::new() };
    let (near, far) = tokio::join!(tunnel.connect(request, MINUTE), async {
        requests.recv().await.unwrap().accept(HeaderMap::new())
    });
    TunnelledStream { near: near.unwrap(), far: far.unwrap(), tunnel, driver }
}

/// The connections on both sides of a flow.
enum Ends {
    Plain(TcpStream, TcpStream),
    IntoTunnel(TcpStream, TunnelStream),
    OutOfTunnel(TunnelStream, TcpStream),
    SameNode(TcpStream, TcpStream),
}

/// A running flow and its ends.
pub(super) struct Scene {
    pub(super) client: Side,
    pub(super) server: Side,
    pub(super) buffers: Buffers,
    flow: JoinHandle<(Result<(), ProxyError>, u64)>,
    tunnel: Option<(Tunnel, JoinHandle<()>)>,
}

impl Scene {
    /// Starts a flow without deadlines, with enough memory for all buffers.
    pub(super) async fn new(way: FlowKind) -> Self {
        Self::with(way, |_| {}).await
    }

    pub(super) async fn with(way: FlowKind, change: impl FnOnce(&mut Deadlines)) -> Self {
        let mut deadlines = NO_DEADLINES;
        change(&mut deadlines);
        Self::build(way, deadlines, Buffers::of(64 << 20)).await
    }

    pub(super) async fn with_buffers(way: FlowKind, bytes: usize) -> Self {
        Self::build(way, NO_DEADLINES, Buffers::of(bytes)).await
    }

    /// Starts a plain flow whose client's connection is `client`.
    pub(super) async fn plain(client: TcpStream) -> Self {
        let (upstream, server) = pair().await;
        let buffers = Buffers::of(1 << 20);
        let flow = tokio::spawn(run(Ends::Plain(client, upstream), NO_DEADLINES, buffers.clone()));
        Self { client: Side::Gone, server: Side::Socket(server), buffers, flow, tunnel: None }
    }

    async fn build(way: FlowKind, deadlines: Deadlines, buffers: Buffers) -> Self {
        let (ours, theirs) = pair().await;
        let socket = Side::Socket(theirs);
        let (ends, client, server, tunnel) = if matches!(way, FlowKind::Plain | FlowKind::SameNode)
        {
            let (upstream, server) = pair().await;
            let ends = match way {
                FlowKind::SameNode => Ends::SameNode(ours, upstream),
                _ => Ends::Plain(ours, upstream),
            };
            (ends, socket, Side::Socket(server), None)
        } else {
            let TunnelledStream { near, far, tunnel, driver } = tunnelled_stream().await;
            let tunnel = Some((tunnel, driver));
            if way == FlowKind::IntoTunnel {
                (Ends::IntoTunnel(ours, near), socket, Side::stream(far), tunnel)
            } else {
                (Ends::OutOfTunnel(far, ours), Side::stream(near), socket, tunnel)
            }
        };
        let flow = tokio::spawn(run(ends, deadlines, buffers.clone()));
        Self { client, server, buffers, flow, tunnel }
    }

    /// The client and the server, or the reverse order.
    pub(super) fn sides(&mut self, client_first: bool) -> (&mut Side, &mut Side) {
        let Self { client, server, .. } = self;
        if client_first { (client, server) } else { (server, client) }
    }

    pub(super) fn take_sockets(&mut self) -> (TcpStream, TcpStream) {
        let take = |side: &mut Side| std::mem::replace(side, Side::Gone).into_socket();
        (take(&mut self.client), take(&mut self.server))
    }

    /// Sends a byte in each direction.
    pub(super) async fn exchange(&mut self) {
        for client_first in [true, false] {
            let (one, other) = self.sides(client_first);
            one.send(b"x").await;
            assert_eq!(other.receive(1).await, b"x");
        }
    }

    /// Sends bulk from the server to the client.
    pub(super) async fn bulk_to_client(&mut self) {
        let data = vec![b'b'; 8 << 20];
        let ((), received) = tokio::join!(self.server.send(&data), self.client.receive(data.len()));
        assert!(received == data);
    }

    /// Drops the tunnel's connection, like the exit of its process.
    pub(super) async fn lose_tunnel(&mut self) {
        let (_tunnel, driver) = self.tunnel.take().unwrap();
        driver.abort();
        assert!(driver.await.unwrap_err().is_cancelled());
    }

    /// Waits for the end of the flow. Returns its outcome and the number of counted bytes.
    pub(super) async fn ended(self) -> (Result<(), ProxyError>, u64) {
        self.flow.await.unwrap()
    }
}

const NO_DEADLINES: Deadlines =
    Deadlines { idle: None, half_close: None, probes: Probes::CONNTRACK };

fn opened_record(direction: Direction) -> ConnectionRecord {
    let facts = Facts::new(direction, Party::default(), Party::default());
    let (worker, pod) = (WorkerRecords::default(), Arc::default());
    ConnectionRecord::opened(Instant::now(), facts, worker.of_pod(&pod))
}

async fn run(ends: Ends, deadlines: Deadlines, buffers: Buffers) -> (Result<(), ProxyError>, u64) {
    let registration = Arc::new(ConnectionRegistry::default()).register(());
    let record = opened_record(Direction::Outbound);
    let flow = Flow::new(&buffers, &deadlines, &record, registration.termination());
    let outcome = match ends {
        Ends::Plain(client, server) => flow.through_tcp(&client, &server).await,
        Ends::IntoTunnel(client, tunnel) => flow.into_tunnel(&client, tunnel).await,
        Ends::OutOfTunnel(tunnel, server) => flow.out_of_tunnel(tunnel, &server).await,
        Ends::SameNode(client, app) => {
            let destination = Arc::new(ConnectionRegistry::default()).register(());
            let own = opened_record(Direction::Inbound);
            let [source, its] = credentials();
            let trust = MutualTrust::establish(&source, &its, &expected().into()).unwrap();
            let neighbour = Neighbour {
                app: &app,
                buffers: &buffers,
                record: &own,
                termination: destination.termination(),
                revocations: [trust.server_revocation(), trust.client_revocation()],
            };
            let outcome = flow.into_neighbour(&client, neighbour).await;
            assert_eq!(own.moved(), record.moved(), "both records count the same bytes");
            own.close(Ok(()));
            outcome
        }
    };
    let moved = record.moved();
    record.close(Ok(()));
    (outcome, moved)
}
