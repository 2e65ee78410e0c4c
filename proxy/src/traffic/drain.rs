//! The phases of a drain: stop accepting, wait for open connections, terminate the rest.
//!
//! ```text
//! running ── close() ──> closing ── all ended, or deadline and all terminated ──> end() ──> ended
//!            listeners closed, GOAWAY sent
//! ```
//!
//! The connection registry counts and terminates the connections.

use std::time::Duration;

use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};

use crate::decide::connection_registry::Registries;
use crate::error::ProxyError;

/// The maximum wait for the end of terminated connections. The drain then continues without them.
const ABORT_GRACE: Duration = Duration::from_secs(1);

/// The phase of the drain. Clones share the state.
#[derive(Debug, Clone, Default)]
pub(crate) struct Drain {
    closing: CancellationToken,
    ended: CancellationToken,
}

impl Drain {
    /// A token that is cancelled when a pod must not accept new connections: because of this drain,
    /// or of the pod's removal.
    pub(crate) fn closing_of_pod(&self) -> CancellationToken {
        self.closing.child_token()
    }

    /// Stops accepting in every pod.
    pub(crate) fn close(&self) {
        self.closing.cancel();
    }

    /// Ends the workers.
    pub(crate) fn end(&self) {
        self.ended.cancel();
    }

    /// Resolves when all connections have ended, or the remaining ones have exceeded their
    /// deadline.
    pub(crate) fn ended(&self) -> WaitForCancellationFuture<'_> {
        self.ended.cancelled()
    }
}

/// Waits up to `deadline` for the end of `connections`, then terminates the rest and those that are
/// opened later. Returns the number of terminated connections.
pub(crate) async fn drain<T>(connections: &Registries<T>, deadline: Duration) -> usize {
    let left = match tokio::time::timeout(deadline, connections.all_ended()).await {
        Ok(()) => 0,
        Err(_) => connections.open(),
    };
    let closed = connections.close(|| ProxyError::Drained);
    if tokio::time::timeout(ABORT_GRACE, closed).await.is_err() {
        let connections = connections.open();
        tracing::warn!(connections, "terminated connections have not ended");
    }
    left
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn drain_waits_for_connections_that_end_by_themselves() {
        let connections = Registries::new(1);
        let registration = connections.for_worker(0).register(());
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(3)).await;
            drop(registration);
        });
        let began = Instant::now();
        assert_eq!(drain(&connections, Duration::from_secs(5)).await, 0);
        assert_eq!(began.elapsed(), Duration::from_secs(3));
    }

    #[tokio::test(start_paused = true)]
    async fn drain_terminates_remaining_connections_at_its_deadline() {
        let connections = Registries::new(1);
        let registration = connections.for_worker(0).register(());
        let endless = tokio::spawn(async move {
            registration.termination().or_terminate::<()>(std::future::pending()).await
        });
        let began = Instant::now();
        assert_eq!(drain(&connections, Duration::from_secs(5)).await, 1);
        assert_eq!(began.elapsed(), Duration::from_secs(5));
        assert!(matches!(endless.await.unwrap(), Err(ProxyError::Drained)));
    }
}
