//! Stopping: first nothing new, then a while for what runs, then an end with a reason.
//!
//! ```text
//! running ── close() ──> closing ── deadline ──> aborting
//!            listeners closed, GOAWAY sent       every connection left is reset
//! ```

use std::future::Future;
use std::time::Duration;

use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};
use tokio_util::task::TaskTracker;

use crate::error::ProxyError;

/// How long aborted connections may take to say so in the log before the process leaves them.
const ABORT_GRACE: Duration = Duration::from_secs(1);

/// Shared by all that accept, and by all that serve what was accepted.
#[derive(Debug, Clone, Default)]
pub(crate) struct Drain {
    closing: CancellationToken,
    aborting: CancellationToken,
    ended: CancellationToken,
    connections: TaskTracker,
}

impl Drain {
    /// Ends when nothing new may begin.
    pub(crate) fn closing(&self) -> WaitForCancellationFuture<'_> {
        self.closing.cancelled()
    }

    /// Ends when no connection is left, or none that would listen.
    pub(crate) fn ended(&self) -> WaitForCancellationFuture<'_> {
        self.ended.cancelled()
    }

    /// Ends when the deadline has passed.
    pub(crate) async fn aborting(&self) -> ProxyError {
        self.aborting.cancelled().await;
        ProxyError::Drained
    }

    /// `work`, unless the deadline passes first: that is an error like any other that ends a connection. It is pinned by the caller:
    /// a future that is given to another is in its memory twice, and moved into it. The deadline is looked at first.
    pub(crate) async fn or_abort<T>(
        &self,
        work: impl Future<Output = Result<T, ProxyError>> + Unpin,
    ) -> Result<T, ProxyError> {
        tokio::select! {
            biased;
            drained = self.aborting() => Err(drained),
            outcome = work => outcome,
        }
    }

    /// `work`, as one of the connections that [`Drain::drain`] waits for.
    pub(crate) fn track<F: Future>(&self, work: F) -> impl Future<Output = F::Output> + use<F> {
        self.connections.track_future(work)
    }

    /// How many tracked connections there are.
    pub(crate) fn open(&self) -> usize {
        self.connections.len()
    }

    /// Stops what is new, waits up to `deadline` for the rest, and aborts what is left; returns how many were.
    pub(crate) async fn drain(&self, deadline: Duration) -> usize {
        self.closing.cancel();
        self.connections.close();
        let mut left = 0;
        if tokio::time::timeout(deadline, self.connections.wait()).await.is_err() {
            left = self.open();
            self.aborting.cancel();
            if tokio::time::timeout(ABORT_GRACE, self.connections.wait()).await.is_err() {
                tracing::warn!(connections = self.open(), "connections did not end when aborted");
            }
        }
        self.ended.cancel();
        left
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;

    #[tokio::test(start_paused = true)]
    async fn what_ends_by_itself_is_waited_for_and_not_aborted() {
        let drain = Drain::default();
        let work = drain.track(tokio::time::sleep(Duration::from_secs(3)));
        tokio::spawn(work);
        let began = Instant::now();
        assert_eq!(drain.drain(Duration::from_secs(5)).await, 0);
        assert_eq!(began.elapsed(), Duration::from_secs(3));
    }

    #[tokio::test(start_paused = true)]
    async fn what_does_not_end_is_aborted_at_the_deadline() {
        let drain = Drain::default();
        let watcher = drain.clone();
        let endless = async move { watcher.or_abort::<()>(std::future::pending()).await };
        let task = tokio::spawn(drain.track(endless));
        let began = Instant::now();
        assert_eq!(drain.drain(Duration::from_secs(5)).await, 1);
        assert_eq!(began.elapsed(), Duration::from_secs(5));
        assert!(matches!(task.await.unwrap(), Err(ProxyError::Drained)));
    }
}
