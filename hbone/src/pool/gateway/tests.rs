//! A client, backends, and a gateway between them that selects the backends in turn. All
//! connections are in memory.

mod ends;

use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http::{HeaderMap, StatusCode};
use tokio::io::{
    AsyncRead, AsyncWrite, AsyncWriteExt as _, DuplexStream, copy, copy_bidirectional, duplex,
    split,
};
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, yield_now};
use tokio::time::{sleep, timeout};

use super::*;
use crate::identity::Identity;
use crate::identity::credentials::Credentials;
use crate::pool::{PoolSettings, PoolStatistics};
use crate::testing::pki::{Ca, Files};
use crate::testing::{ADDRESS, CLIENT, HOUR, SECOND, id};
use crate::trust::Trust;
use crate::tunnel::server::{Acceptor, Incoming};
use crate::tunnel::settings::{ClientSettings, ServerSettings};

const GATEWAY: &str = "spiffe://td/ns/istio-system/sa/gateway";
const FIRST_BACKEND: &str = "spiffe://td/ns/default/sa/first";
const SECOND_BACKEND: &str = "spiffe://td/ns/default/sa/second";

const SETTINGS: PoolSettings = PoolSettings {
    dial: SECOND,
    handshake: SECOND,
    reply: SECOND,
    idle: Duration::from_secs(60),
    max_age: HOUR,
    streams_per_tunnel: 100,
    tunnels_per_peer: 3,
};

/// The behaviour of the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum GatewayBehaviour {
    Copies,
    /// The gateway copies data, but never ends its direction.
    NeverEnds,
    /// The gateway terminates the inner tunnel with its own identity.
    Intercepts,
    /// The gateway accepts the stream, and forwards nothing.
    Swallows,
    Refuses,
}

/// A request that arrived at a backend, and whether its tunnel resumed a session.
struct ArrivedRequest {
    incoming: Incoming,
    backend: usize,
    resumed: bool,
}

struct Servers {
    gateway: Acceptor,
    backends: Vec<Acceptor>,
    behaviour: Mutex<GatewayBehaviour>,
    next: AtomicUsize,
    /// Aborts the gateway's end of the last tunnel.
    serving: Mutex<Option<AbortHandle>>,
    authorities: Mutex<Vec<String>>,
    arrived: mpsc::UnboundedSender<ArrivedRequest>,
    /// The result of each stream that the gateway copied.
    copied: mpsc::UnboundedSender<io::Result<()>>,
}

struct Scene {
    ca: Ca,
    client: watch::Sender<Credentials>,
    connector: Connector,
    pool: Pool<Arc<Servers>>,
    servers: Arc<Servers>,
    arrived: mpsc::UnboundedReceiver<ArrivedRequest>,
    copied: mpsc::UnboundedReceiver<io::Result<()>>,
}

impl Dial for Arc<Servers> {
    type Io = DuplexStream;

    async fn dial(&self, _: SocketAddr) -> io::Result<DuplexStream> {
        let (near, far) = duplex(64 << 10);
        let servers = self.clone();
        let serving = tokio::spawn(async move {
            let Ok(mut tunnel) = servers.gateway.accept(far, SECOND).await else { return };
            while let Some(incoming) = tunnel.next().await {
                tokio::spawn(servers.clone().forward(incoming));
            }
        });
        *self.serving.lock().unwrap() = Some(serving.abort_handle());
        Ok(near)
    }
}

impl Servers {
    async fn forward(self: Arc<Self>, incoming: Incoming) {
        self.authorities.lock().unwrap().push(incoming.authority().to_string());
        assert_eq!(incoming.peer().spiffe_id(), &id(CLIENT));
        let behaviour = *self.behaviour.lock().unwrap();
        if behaviour == GatewayBehaviour::Refuses {
            return incoming.refuse(StatusCode::SERVICE_UNAVAILABLE);
        }
        let mut outer = incoming.accept(HeaderMap::new()).unwrap().into_io();
        if behaviour == GatewayBehaviour::Intercepts {
            return self.clone().serve(self.gateway.clone(), outer, usize::MAX).await;
        }
        let (mut near, far) = duplex(64 << 10);
        let backend = self.next.fetch_add(1, Ordering::Relaxed) % self.backends.len();
        tokio::spawn(self.clone().serve(self.backends[backend].clone(), far, backend));
        let copied = match behaviour {
            GatewayBehaviour::Copies => copy_bidirectional(&mut outer, &mut near).await.map(|_| ()),
            GatewayBehaviour::NeverEnds => {
                let ((mut from_client, mut to_client), (mut from_backend, mut to_backend)) =
                    (split(outer), split(near));
                let client_copied = async {
                    copy(&mut from_client, &mut to_backend).await?;
                    to_backend.shutdown().await
                };
                let (_client_copied, _backend_copied) =
                    tokio::join!(client_copied, copy(&mut from_backend, &mut to_client));
                pending().await
            }
            _ => pending().await,
        };
        let _receiver_ended = self.copied.send(copied);
    }

    async fn serve<T>(self: Arc<Self>, acceptor: Acceptor, io: T, backend: usize)
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + Sync + 'static,
    {
        let Ok(mut tunnel) = acceptor.accept(io, SECOND).await else { return };
        let resumed = tunnel.resumed();
        while let Some(incoming) = tunnel.next().await {
            let _receiver_ended = self.arrived.send(ArrivedRequest { incoming, backend, resumed });
        }
    }
}

impl Scene {
    fn new() -> Self {
        Self::with(ClientSettings::default(), ServerSettings::default())
    }

    fn with(client_settings: ClientSettings, server_settings: ServerSettings) -> Self {
        let ca = Ca::root("ours");
        let fixed = |who, serial| {
            let identity = ca.identity(who, serial);
            Acceptor::new(credentials(identity).fixed(), server_settings.clone())
        };
        let (found, arrived) = mpsc::unbounded_channel();
        let (ended, copied) = mpsc::unbounded_channel();
        let servers = Arc::new(Servers {
            gateway: fixed(GATEWAY, 2),
            backends: vec![fixed(FIRST_BACKEND, 3), fixed(SECOND_BACKEND, 4)],
            behaviour: Mutex::new(GatewayBehaviour::Copies),
            next: AtomicUsize::new(0),
            serving: Mutex::default(),
            authorities: Mutex::default(),
            arrived: found,
            copied: ended,
        });
        let (client, credentials) = watch::channel(credentials(ca.identity(CLIENT, 1)));
        let connector = Connector::new(credentials, client_settings);
        let pool = Pool::new(servers.clone(), SETTINGS);
        Self { ca, client, connector, pool, servers, arrived, copied }
    }

    fn set_behaviour(&self, behaviour: GatewayBehaviour) {
        *self.servers.behaviour.lock().unwrap() = behaviour;
    }

    async fn connect_to(&self, peers: &[&str]) -> Result<TunnelStream, HboneError> {
        open(&self.pool, &self.connector, peers).await
    }

    async fn connect(&self) -> Result<TunnelStream, HboneError> {
        self.connect_to(&[FIRST_BACKEND, SECOND_BACKEND]).await
    }

    /// Opens a stream. Returns both ends, the backend, and whether the inner tunnel resumed a
    /// session.
    async fn stream(&mut self) -> (TunnelStream, TunnelStream, usize, bool) {
        let connecting = open(&self.pool, &self.connector, &[FIRST_BACKEND, SECOND_BACKEND]);
        let (near, far) = tokio::join!(connecting, async {
            let ArrivedRequest { incoming, backend, resumed } = self.arrived.recv().await.unwrap();
            assert_eq!(incoming.authority().to_string(), "web.default.svc:8080");
            (incoming.accept(HeaderMap::new()).unwrap(), backend, resumed)
        });
        let (far, backend, resumed) = far;
        (near.unwrap(), far, backend, resumed)
    }

    /// Waits until the outer tunnel has no streams. Returns false at the timeout.
    async fn is_quiet(&self) -> bool {
        for _ in 0..10_000 {
            if self.pool.statistics().streams == 0 {
                return true;
            }
            yield_now().await;
        }
        false
    }

    fn revoke(&self, serial: u64) {
        let trust = Files::new().crl("list", &self.ca.revoke(&[serial])).trust();
        let identity = self.ca.identity(CLIENT, 1);
        self.client.send_replace(Credentials::new(identity, trust).unwrap());
    }
}

fn credentials(identity: Identity) -> Credentials {
    Credentials::new(identity, Trust::default()).unwrap()
}

async fn open(
    pool: &Pool<Arc<Servers>>,
    connector: &Connector,
    peers: &[&str],
) -> Result<TunnelStream, HboneError> {
    let peers: Vec<SpiffeId> = peers.iter().map(|who| id(who)).collect();
    let gateway = TunnelKey { source: id(CLIENT), address: ADDRESS, peers: [id(GATEWAY)].into() };
    let request = |authority: &str| ConnectRequest {
        authority: authority.to_owned(),
        headers: HeaderMap::new(),
    };
    let outer = || request("web.default.svc:80");
    let inner = || request("web.default.svc:8080");
    pool.connect_through(&gateway, connector, outer, &peers, inner).await
}

fn inner_error(error: HboneError) -> HboneError {
    let HboneError::BehindGateway { gateway, source } = error else {
        panic!("{error:?} is not behind the gateway")
    };
    assert_eq!(gateway, ADDRESS);
    (*source).clone()
}

#[tokio::test(start_paused = true)]
async fn both_ends_authenticate_through_gateway() {
    let mut scene = Scene::new();
    let (near, far, backend, _) = scene.stream().await;
    assert_eq!(backend, 0);
    assert_eq!(near.peer().spiffe_id(), &id(FIRST_BACKEND));
    assert_eq!(far.peer().spiffe_id(), &id(CLIENT));
    assert_eq!(*scene.servers.authorities.lock().unwrap(), ["web.default.svc:80"]);
    let expected = PoolStatistics { tunnels: 1, streams: 1, ..Default::default() };
    assert_eq!(scene.pool.statistics(), expected);
}

#[tokio::test(start_paused = true)]
async fn streams_share_outer_tunnel_and_have_own_inner_tunnel() {
    let mut scene = Scene::new();
    let mut streams = Vec::new();
    for expected in [0, 1, 0, 1] {
        let (near, far, backend, _) = scene.stream().await;
        assert_eq!(backend, expected);
        assert_eq!(near.peer().spiffe_id(), &id([FIRST_BACKEND, SECOND_BACKEND][backend]));
        streams.push((near, far));
    }
    let expected = PoolStatistics { tunnels: 1, streams: 4, ..Default::default() };
    assert_eq!(scene.pool.statistics(), expected);
}

#[tokio::test(start_paused = true)]
async fn session_ticket_is_not_accepted_by_another_backend() {
    let mut scene = Scene::new();
    // The client offers its newest ticket first, whichever backend issued it.
    let turns = [(0, false), (0, true), (1, false), (1, true), (0, false)];
    for (backend, resumes) in turns {
        scene.servers.next.store(backend, Ordering::Relaxed);
        let (near, far, arrived, resumed) = scene.stream().await;
        assert_eq!((arrived, resumed), (backend, resumes));
        assert_eq!(near.peer().spiffe_id(), &id([FIRST_BACKEND, SECOND_BACKEND][backend]));
        // The tickets arrive before the data.
        let (mut reader, _writer) = near.split();
        let (_reader, mut writer) = far.split();
        writer.write("hello".into()).await.unwrap();
        reader.read().await.unwrap().unwrap();
    }
    // The client does not resume a session for other expected peers.
    scene.servers.next.store(1, Ordering::Relaxed);
    let refused = inner_error(scene.connect_to(&[FIRST_BACKEND]).await.unwrap_err());
    assert!(matches!(refused, HboneError::UnexpectedPeer { .. }), "{refused:?}");
    // The client does not resume a session with a peer that is no longer trusted.
    scene.revoke(4);
    scene.servers.next.store(1, Ordering::Relaxed);
    let refused = inner_error(scene.connect().await.unwrap_err());
    assert!(matches!(refused, HboneError::Revoked), "{refused:?}");
}

#[tokio::test(start_paused = true)]
async fn wrong_peer_behind_gateway_receives_no_request() {
    let mut scene = Scene::new();
    for (behaviour, peers) in [
        (GatewayBehaviour::Copies, &[SECOND_BACKEND][..]),
        (GatewayBehaviour::Copies, &[]),
        (GatewayBehaviour::Intercepts, &[FIRST_BACKEND, SECOND_BACKEND]),
    ] {
        scene.set_behaviour(behaviour);
        scene.servers.next.store(0, Ordering::Relaxed);
        let refused = inner_error(scene.connect_to(peers).await.unwrap_err());
        let HboneError::UnexpectedPeer { presented, .. } = refused else { panic!("{refused:?}") };
        assert_eq!(
            presented.as_str(),
            if behaviour == GatewayBehaviour::Copies { FIRST_BACKEND } else { GATEWAY }
        );
        assert!(scene.is_quiet().await);
        sleep(SECOND).await;
        assert!(scene.arrived.try_recv().is_err());
    }
    scene.set_behaviour(GatewayBehaviour::Copies);
    scene.stream().await;
    assert_eq!(scene.pool.statistics().backing_off, 0, "the gateway did not fail");
}

#[tokio::test(start_paused = true)]
async fn errors_distinguish_gateway_from_backend() {
    let mut scene = Scene::new();
    scene.set_behaviour(GatewayBehaviour::Refuses);
    let refused = scene.connect().await.unwrap_err();
    assert!(matches!(refused, HboneError::Refused { .. }), "{refused:?}");
    scene.set_behaviour(GatewayBehaviour::Swallows);
    let silent = scene.connect().await.unwrap_err();
    assert_eq!(silent.kind(), "handshake_timeout");
    assert!(matches!(inner_error(silent), HboneError::HandshakeTimeout { .. }));
    scene.set_behaviour(GatewayBehaviour::Copies);
    let unanswered = inner_error(scene.connect().await.unwrap_err());
    assert!(matches!(unanswered, HboneError::ReplyTimeout { .. }), "{unanswered:?}");
    scene.arrived.recv().await.unwrap();
    let (refused, ()) = tokio::join!(
        open(&scene.pool, &scene.connector, &[FIRST_BACKEND, SECOND_BACKEND]),
        async {
            let arrived = scene.arrived.recv().await.unwrap();
            arrived.incoming.refuse(StatusCode::UNAUTHORIZED);
        }
    );
    let refused = inner_error(refused.unwrap_err());
    let HboneError::Refused { status } = refused else { panic!("{refused:?}") };
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    assert!(scene.is_quiet().await);
}

#[tokio::test(start_paused = true)]
async fn revocation_on_either_level_terminates_stream() {
    for serial in [2, 3] {
        let mut scene = Scene::new();
        let (near, far, ..) = scene.stream().await;
        // A stream that is not being read is terminated too.
        let (_far_reader, mut far_writer) = far.split();
        far_writer.write("unread".into()).await.unwrap();
        let distrusted = near.revocation();
        scene.revoke(99);
        sleep(SECOND).await;
        scene.revoke(serial);
        let reason = timeout(SECOND, distrusted).await.unwrap();
        assert!(matches!(reason, HboneError::Revoked), "{reason:?}");
        let gone = timeout(SECOND, far_writer.closed()).await.unwrap();
        assert!(matches!(gone, HboneError::Lost { .. }), "{gone:?}");
        drop(near);
        assert!(scene.is_quiet().await);
    }
}
