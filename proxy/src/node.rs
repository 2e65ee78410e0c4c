//! The state of the process (node), of a pod, of a worker thread, and of a pod on a worker (seat).
//!
//! ```text
//! Node     one         mesh, resolver, limits, timeouts, drain, metric series
//! Pod      Arc         policy context, sockets, credentials, endpoint health, self-test, addresses
//! Worker   a thread    command channel, cache of metric series, seats
//! Seat     Pod×Worker  connection registry, pool, connector, acceptor; created for the first
//!                      connection of the pod on the worker
//! ```
//!
//! A worker serves connections of every pod. A connection uses only the sockets, the identity and
//! the tunnels of its seat, so never those of another pod.

pub(crate) mod assignment;
pub(crate) mod certificates;
mod commands;
pub(crate) mod data_plane;
pub(crate) mod identities;
pub(crate) mod in_process;
pub(crate) mod inspection;
pub(crate) mod phases;
pub(crate) mod pod;
pub(crate) mod pod_error;
pub(crate) mod received_identities;
pub(crate) mod served_pods;
pub(crate) mod sockets;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod worker;
pub(crate) mod workers;

use std::sync::Arc;

use tokio::sync::watch;
use underpass_config::{IdentitySettings, SameNode, Settings, Timeouts, TunnelSettings};
use underpass_interception::NamespaceAccess;

use crate::decide::resolve::Resolver;
use crate::decide::snapshot::Snapshot;
use crate::dns::exchange::SocketExchange;
use crate::dns::lookup::HostLookup;
use crate::dns::resolv_file::ResolvFile;
use crate::dns::upstream::Upstream;
use crate::limits::Limits;
use crate::mesh::on_demand::Lookups;
use crate::node::pod::pod_sockets;
use crate::node::served_pods::ServedPods;
use crate::node::sockets::PodSockets;
use crate::observe::metrics::SeriesRegistry;
use crate::observe::trace::Tracer;
use crate::process::pause_gate::PauseGate;
use crate::traffic::copy::Deadlines;
use crate::traffic::drain::Drain;

/// State that all pods and workers of the process share. No byte that is relayed takes a lock in
/// it.
#[derive(Debug)]
pub(crate) struct Node {
    /// The number of workers.
    pub(crate) workers: usize,
    pub(crate) timeouts: Timeouts,
    /// The maximum times that an open connection may be idle or half-closed.
    pub(crate) deadlines: Deadlines,
    pub(crate) tunnels: TunnelSettings,
    pub(crate) same_node: SameNode,
    /// Whether the process serves the pods of a node, not one fixed pod.
    pub(crate) has_many_pods: bool,
    pub(crate) pods: ServedPods,
    pub(crate) mesh: watch::Receiver<Arc<Snapshot>>,
    /// The lookups on demand, from which pods derive theirs.
    pub(crate) lookups: Lookups,
    /// The resolver settings of the pods, and of this process.
    pub(crate) resolv_file: Arc<ResolvFile>,
    /// Resolves the hostnames of workloads without an address.
    pub(crate) resolver: Arc<Resolver>,
    pub(crate) limits: Limits,
    pub(crate) drain: Drain,
    /// Pauses accepting while another process takes over: on the endpoints, and on the listeners
    /// of a fixed pod. Each pod of a node with many pods has its own gate.
    pub(crate) accepting: PauseGate,
    pub(crate) series: Arc<SeriesRegistry>,
    /// Records the spans of connections if there is a collector.
    pub(crate) tracer: Tracer,
}

/// Whether the node itself connects to a CA, a control plane or a collector. Otherwise the broker
/// grants it no sockets for TCP.
pub(crate) fn node_connects(settings: &Settings) -> bool {
    let has_ca = matches!(settings.identity, Some(IdentitySettings::IstioCa(_)));
    settings.xds.is_some() || settings.otlp.is_some() || has_ca
}

impl Node {
    /// Creates a node with this many workers. `access` is that of the process' own sockets.
    pub(crate) fn new(
        settings: &Settings,
        access: &NamespaceAccess,
        workers: usize,
        mesh: watch::Receiver<Arc<Snapshot>>,
        lookups: Lookups,
        accepting: PauseGate,
        series: Arc<SeriesRegistry>,
    ) -> Self {
        let limits = Limits::new(&settings.limits, workers);
        let budgets = limits.clone();
        series.budgets.read_by(move || budgets.budgets());
        let resolv_file = Arc::new(ResolvFile::new(&settings.dns.resolv_conf));
        let (sockets, descriptors) = (pod_sockets(settings), limits.descriptors.clone());
        let sockets = PodSockets::new(access.clone(), sockets, descriptors);
        let exchange = SocketExchange { sockets, limits: limits.pod() };
        let upstream = Upstream::new(Arc::new(exchange));
        let has_tcp = settings.node.pods.is_none() || node_connects(settings);
        let lookup = HostLookup::new(resolv_file.clone(), upstream, has_tcp);
        Self {
            workers,
            timeouts: settings.timeouts.clone(),
            deadlines: (&settings.timeouts).into(),
            tunnels: settings.tunnels.clone(),
            same_node: settings.proxy.same_node,
            has_many_pods: settings.node.pods.is_some(),
            pods: ServedPods::default(),
            mesh,
            lookups,
            resolv_file,
            resolver: Arc::new(Resolver::new(lookup)),
            limits,
            drain: Drain::default(),
            accepting,
            series,
            tracer: Tracer::default(),
        }
    }

    /// The gate for accepting the connections of a new pod.
    pub(crate) fn accepting_of_pod(&self) -> PauseGate {
        if self.has_many_pods { PauseGate::default() } else { self.accepting.clone() }
    }
}
