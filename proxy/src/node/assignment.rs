//! The messages to a worker: connections to serve, and commands.

use std::io;
use std::sync::Arc;

use tokio::sync::oneshot;
use underpass_interception::BoundListener;

use crate::decide::connection_registry::Registration;
use crate::decide::subject::Decision;
use crate::limits::Ticket;
use crate::node::pod::{Pod, PodId};
use crate::traffic::accepted::Accepted;
use crate::traffic::listeners::Kind;

/// A connection on its way to the worker that will serve it.
#[derive(Debug)]
pub(crate) struct Assignment {
    /// The pod in whose namespace the connection was accepted.
    pub(crate) pod: Arc<Pod>,
    pub(crate) accepted: Accepted,
    /// With the registry of the worker that serves it.
    pub(crate) registration: Registration<Decision>,
    pub(crate) ticket: Ticket,
}

/// A command for a worker.
#[derive(Debug)]
pub(crate) enum WorkerCommand {
    /// Serve a connection that another worker has accepted.
    Serve(Assignment),
    /// Accept the connections of a listener of a pod.
    AddListener {
        pod: Arc<Pod>,
        kind: Kind,
        listener: BoundListener,
        /// Sent when the worker accepts, or cannot wait for connections.
        added: oneshot::Sender<io::Result<()>>,
    },
    /// Close this worker's listeners of a pod. Its open connections go on.
    RemoveListeners {
        pod: PodId,
        /// Sent when they are closed.
        removed: oneshot::Sender<()>,
    },
    /// Close the tunnels that a pod has opened, each as its last stream ends.
    CloseTunnels(PodId),
}
