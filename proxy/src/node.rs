//! The state of the process (node), of a pod, of a worker thread, and of a pod on a worker (seat).
//!
//! ```text
//! Node     one         mesh, resolver, limits, timeouts, drain, metric series
//! Pod      Arc         policy context, sockets, credentials, endpoint health, self-test, addresses
//! Worker   a thread    command channel, cache of metric series, seats
//! Seat     Pod×Worker  connection registry, pool, connector, acceptor; made by the first
//!                      connection of the pod there
//! ```
//!
//! A worker serves the connections of every pod. What a connection may use follows from its seat,
//! so that one pod's connection cannot use the sockets, the identity or the tunnels of another pod.

pub(crate) mod assignment;
pub(crate) mod certificates;
mod commands;
pub(crate) mod data_plane;
pub(crate) mod identities;
pub(crate) mod in_process;
pub(crate) mod phases;
pub(crate) mod pod;
pub(crate) mod pod_error;
pub(crate) mod served_pods;
pub(crate) mod sockets;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod worker;
pub(crate) mod workers;

use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::sync::watch;
use underpass_config::{SameNode, Settings, Timeouts, TunnelSettings};

use crate::decide::resolve::Resolver;
use crate::decide::snapshot::Snapshot;
use crate::limits::Limits;
use crate::node::served_pods::ServedPods;
use crate::observe::metrics::SeriesRegistry;
use crate::process::pause_gate::Gates;
use crate::traffic::copy::Deadlines;
use crate::traffic::drain::Drain;

/// State that all pods and workers of the process share. No lock is taken per byte.
#[derive(Debug)]
pub(crate) struct Node {
    /// The number of workers.
    pub(crate) workers: usize,
    pub(crate) timeouts: Timeouts,
    /// How long an open connection may be idle or half-closed.
    pub(crate) deadlines: Deadlines,
    pub(crate) tunnels: TunnelSettings,
    pub(crate) same_node: SameNode,
    pub(crate) pods: ServedPods,
    pub(crate) mesh: watch::Receiver<Arc<Snapshot>>,
    pub(crate) resolver: Arc<Resolver>,
    pub(crate) limits: Limits,
    pub(crate) drain: Drain,
    /// Pause accepting and rule repair while another process takes over.
    pub(crate) gates: Gates,
    /// The metric series of all connections.
    pub(crate) series: Arc<SeriesRegistry>,
}

impl Node {
    /// Makes a node of this many workers. Must be called in the control thread's runtime, which
    /// resolves hostnames.
    pub(crate) fn new(
        settings: &Settings,
        workers: usize,
        mesh: watch::Receiver<Arc<Snapshot>>,
        gates: Gates,
        series: Arc<SeriesRegistry>,
    ) -> Self {
        Self {
            workers,
            timeouts: settings.timeouts.clone(),
            deadlines: (&settings.timeouts).into(),
            tunnels: settings.tunnels.clone(),
            same_node: settings.proxy.same_node,
            pods: ServedPods::default(),
            mesh,
            resolver: Arc::new(Resolver::system(Handle::current())),
            limits: Limits::new(&settings.limits, workers),
            drain: Drain::default(),
            gates,
            series,
        }
    }
}
