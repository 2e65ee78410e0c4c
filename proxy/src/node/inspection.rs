//! Inspections of the workers: their open and recent connections, and their tunnels. Workers are
//! asked by messages, so an inspection takes no lock that a connection could wait for.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::oneshot;
use underpass_hbone::PeerTunnels;

use crate::decide::subject::{PeerTunnel, Subject};
use crate::observe::party::Direction;
use crate::observe::pod_name::PodName;
use crate::observe::record::recent::{FailureCount, Subscriber};
use crate::observe::record::{EndedConnection, TrackedConnection};

/// The number of oldest connections in a summary.
pub(crate) const OLDEST: usize = 5;

/// An inspection of one worker.
#[derive(Debug)]
pub(crate) enum Inspection {
    Summary {
        /// Only of this pod.
        pod: Option<PodName>,
        summary: oneshot::Sender<Summary>,
    },
    /// Confirms that the worker runs its tasks.
    Ping(oneshot::Sender<()>),
    Connections {
        connections: oneshot::Sender<Connections>,
        /// Receives each connection that is opened or ends after the list was made.
        subscriber: Option<Subscriber>,
    },
}

/// A summary of the connections and tunnels of a worker.
#[derive(Debug, Default)]
pub(crate) struct Summary {
    pub(crate) counts: BTreeMap<ConnectionKind, usize>,
    /// The number of connections that are being opened, tunnels of peers included.
    pub(crate) opening: usize,
    /// The oldest connections.
    pub(crate) oldest: Vec<Arc<TrackedConnection>>,
    pub(crate) tunnels_of_peers: Vec<(Arc<PodName>, PeerTunnel)>,
    pub(crate) tunnels_to_peers: Vec<(Arc<PodName>, PeerTunnels)>,
    /// Of all pods.
    pub(crate) failures: Vec<FailureCount>,
    /// The listed failures of all pods, the newest last.
    pub(crate) failed: Vec<Arc<EndedConnection>>,
}

/// The open and recent connections of a worker.
#[derive(Debug, Default)]
pub(crate) struct Connections {
    pub(crate) open: Vec<Arc<TrackedConnection>>,
    pub(crate) connecting: Vec<Connecting>,
    pub(crate) ended: Vec<Arc<EndedConnection>>,
}

/// The kind of an open connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ConnectionKind {
    pub(crate) is_inbound: bool,
    /// Whether a tunnel carries it.
    pub(crate) has_tunnel: bool,
}

/// A permitted connection that is being opened.
#[derive(Debug, Clone)]
pub(crate) struct Connecting {
    pub(crate) pod: Arc<PodName>,
    pub(crate) direction: Direction,
    /// `None` if the registry does not have it.
    pub(crate) client: Option<SocketAddr>,
    pub(crate) destination: SocketAddr,
    /// The other end of the tunnel.
    pub(crate) tunnel: Option<SocketAddr>,
}

impl Summary {
    /// Counts an open connection, and keeps it if it is one of the oldest.
    pub(crate) fn add(&mut self, connection: &Arc<TrackedConnection>) {
        *self.counts.entry(ConnectionKind::of(connection)).or_default() += 1;
        let accepted = connection.accepted;
        let after = self.oldest.partition_point(|other| other.accepted <= accepted);
        if after < OLDEST {
            self.oldest.insert(after, connection.clone());
            self.oldest.truncate(OLDEST);
        }
    }
}

impl ConnectionKind {
    fn of(connection: &TrackedConnection) -> Self {
        let facts = &connection.facts;
        Self {
            is_inbound: facts.direction == Direction::Inbound,
            has_tunnel: facts.hbone.is_some(),
        }
    }
}

impl Connecting {
    pub(crate) fn new(pod: &Arc<PodName>, subject: &Subject) -> Self {
        let (pod, destination) = (pod.clone(), subject.destination());
        match subject {
            Subject::Outbound(outbound) => {
                let tunnel = outbound.peers.as_ref().map(|_| destination);
                let direction = Direction::Outbound;
                Self { pod, direction, client: None, destination: outbound.asked, tunnel }
            }
            Subject::Inbound(inbound) => {
                let (direction, client) = (Direction::Inbound, Some(inbound.source()));
                Self { pod, direction, client, destination, tunnel: None }
            }
        }
    }
}
