//! A pod that the workers serve: its listeners, connections, tunnels and sockets.

use std::sync::Arc;
use std::time::Duration;

use crate::node::pod::Pod;
use crate::node::workers::Workers;
use crate::traffic::drain::drain;

/// A pod that the workers serve. Dropping it closes its listeners and ends its connections' tunnels
/// as their last streams end.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) pod: Arc<Pod>,
    pub(super) workers: Workers,
}

impl Served {
    /// Closes the listeners; tunnels take no new streams.
    pub(super) async fn stop_accepting(&self) {
        self.workers.remove_listeners(self.pod.id).await;
        self.pod.closing.cancel();
    }

    /// Terminates the connections that are left, and closes the tunnels and sockets. Nothing holds
    /// the pod's namespace then.
    pub(super) async fn close(&self) {
        drain(&self.pod.connections, Duration::ZERO).await;
        self.pod.sockets.close();
        self.workers.close_tunnels(&self.pod).await;
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.pod.closing.cancel();
        self.pod.sockets.close();
    }
}
