//! The messages to a worker: connections to serve, and commands.

use std::io;
use std::sync::Arc;

use tokio::sync::oneshot;
use underpass_interception::BoundListener;

use crate::decide::connection_registry::Registration;
use crate::decide::subject::Decision;
use crate::dns::service::DnsService;
use crate::limits::Ticket;
use crate::node::inspection::Inspection;
use crate::node::pod::{Pod, PodId};
use crate::traffic::accepted::Accepted;
use crate::traffic::listeners::{DnsKind, Kind, Listeners};

/// An accepted connection and the worker state that it is registered with.
#[derive(Debug)]
pub(crate) struct Assignment {
    /// The pod in whose namespace the connection was accepted.
    pub(crate) pod: Arc<Pod>,
    pub(crate) accepted: Accepted,
    /// The registration with the pod's registry on the worker that serves the connection.
    pub(crate) registration: Registration<Decision>,
    pub(crate) ticket: Ticket,
}

/// A command for a worker.
#[derive(Debug)]
pub(crate) enum WorkerCommand {
    /// Serves a connection that another worker has accepted.
    Serve(Assignment),
    /// Starts to accept connections on a listener of a pod.
    AddListener {
        pod: Arc<Pod>,
        kind: Kind,
        listener: BoundListener,
        /// Receives the result once the worker accepts connections.
        added: oneshot::Sender<io::Result<()>>,
    },
    /// Starts to answer DNS queries of a pod.
    AddDns {
        pod: Arc<Pod>,
        service: Arc<DnsService>,
        listeners: Listeners<DnsKind>,
        /// Receives the result once the worker receives queries.
        added: oneshot::Sender<io::Result<()>>,
    },
    /// Closes this worker's listeners of a pod. Open connections continue.
    RemoveListeners {
        pod: PodId,
        /// Notified when the listeners are closed.
        removed: oneshot::Sender<()>,
    },
    /// Closes the tunnels that a pod has opened, each when its last stream ends.
    CloseTunnels(PodId),
    /// Reports open and recent connections.
    Inspect(Inspection),
}
