//! Gives the micro-benchmarks access to private code: relaying, termination, routing and metrics.
//! Not stable.

use std::future::pending;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::Instant;
use underpass_config::{Mesh, SeriesSettings};
use underpass_hbone::TunnelStream;
use underpass_interception::OriginalDestination;

use crate::decide::connection_registry::{ConnectionRegistry, Terminated};
use crate::decide::endpoint_health::EndpointHealth;
use crate::decide::route::{Caller, EndpointSelector, outbound};
use crate::error::ProxyError;
use crate::limits::{Buffers, Descriptors};
use crate::observe::metrics::{Format, KnownSeries, Labels, SeriesRegistry};
use crate::observe::party::{Direction, Party};
use crate::observe::record::{ConnectionRecord, Facts, WorkerRecords};
use crate::traffic::copy::{Deadlines, Flow, Probes};

/// The memory limit of relaying: the default of a process with enough file descriptors.
const BUFFER_LIMIT: usize = 256 << 20;
const FILE_LIMIT: usize = 20_000;

/// The upstream side of a relayed connection.
#[derive(Debug)]
pub enum Upstream {
    /// A TCP connection.
    Tcp(TcpStream),
    /// A stream of a tunnel.
    Tunnel(TunnelStream),
}

/// Relays in both directions until both end. Returns whether they ended without an error. Requires
/// a runtime.
pub async fn copy(client: TcpStream, upstream: Upstream) -> bool {
    let buffers = Buffers::new(BUFFER_LIMIT, Descriptors::new(FILE_LIMIT, 0, 1));
    let registration = Arc::new(ConnectionRegistry::default()).register(());
    let facts = Facts::new(Direction::Outbound, Party::default(), Party::default());
    let (worker, pod) = (WorkerRecords::default(), Arc::default());
    let record = ConnectionRecord::opened(Instant::now(), facts, worker.of_pod(&pod));
    let deadlines = &Deadlines { idle: None, half_close: None, probes: Probes::CONNTRACK };
    let flow = Flow::new(&buffers, deadlines, &record, registration.termination());
    let ended: Result<(), ProxyError> = match upstream {
        Upstream::Tcp(upstream) => flow.through_tcp(&client, &upstream).await,
        Upstream::Tunnel(tunnel) => flow.into_tunnel(&client, tunnel).await,
    };
    let is_ok = ended.is_ok();
    record.close(ended);
    is_ok
}

/// Measures the termination of idle connections in a registry, without sockets. Requires a runtime.
pub async fn terminate(connections: usize) -> Duration {
    let registry = Arc::new(ConnectionRegistry::default());
    let mut running = JoinSet::new();
    for _ in 0..connections {
        let registration = registry.register(());
        running.spawn(async move {
            registration.termination().or_terminate::<()>(pending()).await.is_err()
        });
    }
    tokio::task::yield_now().await;
    let began = Instant::now();
    let mut terminated = Terminated::default();
    registry.terminate(&mut terminated, |()| Err(ProxyError::Drained)).await;
    terminated.end().await;
    let elapsed = began.elapsed();
    running.join_all().await;
    elapsed
}

/// Routes connections of a client outside of the mesh, in the network "".
#[derive(Debug)]
pub struct Router {
    mesh: Mesh,
    health: EndpointHealth,
}

impl Router {
    /// A router in a mesh whose endpoints are all healthy.
    #[must_use]
    pub fn new(mesh: Mesh) -> Self {
        Self { mesh, health: EndpointHealth::default() }
    }

    /// Whether there is a route to `destination`, by tunnel or plaintext.
    #[must_use]
    pub fn has_route(&self, destination: SocketAddr) -> bool {
        let caller = Caller {
            network: "",
            namespace: "default",
            workload: None,
            address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            identity: None,
            hbone_port: 15008,
        };
        let destination = OriginalDestination::new(destination);
        let selector = EndpointSelector::new(&self.health);
        outbound(destination, &self.mesh, &caller, selector).is_ok()
    }
}

/// The metrics of one open inbound connection from each workload of a mesh, with all labels.
#[derive(Debug)]
pub struct LabelSets(Arc<SeriesRegistry>);

impl LabelSets {
    /// The metrics of connections from the workloads of `mesh`.
    #[must_use]
    pub fn new(mesh: &Mesh) -> Self {
        let workloads = mesh.workloads();
        let limit = workloads.len();
        let settings = SeriesSettings { limit, ..SeriesSettings::default() };
        let registry = Arc::new(SeriesRegistry::new(settings));
        let known = KnownSeries::new(registry.clone());
        let parties = workloads.iter().map(|workload| Party {
            workload: Some(Arc::clone(workload)),
            identity: Some(workload.identity.clone()),
            ..Party::default()
        });
        let server = parties.clone().next().unwrap_or_default();
        for client in parties {
            let series = known.get(Labels::new(Direction::Inbound, &client, &server, None, true));
            series.opened();
            series.sent(123_456);
            series.received(7890);
        }
        Self(registry)
    }

    /// Renders all label sets as a scrape does. Returns the number of bytes.
    #[must_use]
    pub fn render(&self) -> usize {
        self.0.pages(Format::Prometheus).map(|page| page.len()).sum()
    }
}
