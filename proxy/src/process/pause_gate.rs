//! Pauses accepting and rule repair while another process takes over.
//!
//! During a pause, new connections wait in the kernel's accept queue. Open connections continue;
//! the connection registry terminates them when necessary.

use std::fmt;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use tokio::sync::watch;

/// Lets work pass unless a take-over has closed it. Clones share the state.
#[derive(Debug, Clone)]
pub(crate) struct PauseGate(Arc<State>);

#[derive(Debug)]
struct State {
    open: watch::Sender<bool>,
    /// The number of passed futures that are still running.
    running: watch::Sender<usize>,
}

impl Default for PauseGate {
    fn default() -> Self {
        let (open, running) = (watch::Sender::new(true), watch::Sender::new(0));
        Self(Arc::new(State { open, running }))
    }
}

impl PauseGate {
    /// Runs `work` when the gate is open. Returns `None` if the gate closed before `work`
    /// completed. `work` must be cancel-safe.
    pub(crate) async fn pass<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        self.pass_until(work, std::future::ready(())).await
    }

    /// Like [`PauseGate::pass`], for work whose effects outlast its cancellation: `close` also
    /// waits for `end`.
    pub(crate) async fn pass_until<T>(
        &self,
        work: impl Future<Output = T>,
        end: impl Future<Output = ()>,
    ) -> Option<T> {
        let mut open = self.0.open.subscribe();
        // `self` owns the sender, so that waiting cannot fail.
        open.wait_for(|open| *open).await.ok()?;
        let _running = PassedFuture::new(&self.0);
        let done = tokio::select! {
            // Polls the gate first, since it may have closed again.
            biased;
            _ = open.wait_for(|open| !*open) => None,
            done = work => Some(done),
        };
        if done.is_none() {
            end.await;
        }
        done
    }

    /// Closes the gate and waits until no passed future is running.
    pub(crate) async fn close(&self) {
        self.0.open.send_replace(false);
        let mut running = self.0.running.subscribe();
        // `self` owns the sender, so that waiting cannot fail.
        running.wait_for(|running| *running == 0).await.ok();
    }

    pub(crate) fn open(&self) {
        self.0.open.send_replace(true);
    }
}

/// Accepting that can pause, in this process or in the proxy process.
pub(crate) trait Pausable: fmt::Debug + Send + Sync {
    /// Returns when nothing accepts any longer.
    fn pause(&self) -> BoxFuture<'static, ()>;

    fn resume(&self);
}

impl Pausable for PauseGate {
    fn pause(&self) -> BoxFuture<'static, ()> {
        let gate = self.clone();
        Box::pin(async move { gate.close().await })
    }

    fn resume(&self) {
        self.open();
    }
}

/// Counts a passed future until it is dropped.
struct PassedFuture<'a>(&'a State);

impl<'a> PassedFuture<'a> {
    fn new(state: &'a State) -> Self {
        state.running.send_modify(|running| *running += 1);
        Self(state)
    }
}

impl Drop for PassedFuture<'_> {
    fn drop(&mut self) {
        self.0.running.send_modify(|running| *running -= 1);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::*;

    #[tokio::test]
    async fn closed_gate_pauses_work_until_it_opens() {
        let (gate, accepted) = (PauseGate::default(), Arc::new(AtomicUsize::new(0)));
        let (own, count) = (gate.clone(), accepted.clone());
        let accepting = tokio::spawn(async move {
            loop {
                let one = async {
                    tokio::task::yield_now().await;
                    count.fetch_add(1, Relaxed);
                };
                own.pass(one).await;
            }
        });
        while accepted.load(Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
        gate.close().await;
        let before = accepted.load(Relaxed);
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        assert_eq!(accepted.load(Relaxed), before);
        gate.open();
        while accepted.load(Relaxed) == before {
            tokio::task::yield_now().await;
        }
        accepting.abort();
    }

    #[tokio::test]
    async fn closing_gate_cancels_running_work() {
        let gate = PauseGate::default();
        let own = gate.clone();
        let endless = tokio::spawn(async move { own.pass(std::future::pending::<()>()).await });
        tokio::task::yield_now().await;
        gate.close().await;
        assert_eq!(endless.await.unwrap(), None);
    }

    #[tokio::test]
    async fn gate_closes_when_cancelled_work_has_ended() {
        let gate = PauseGate::default();
        let (own, over) = (gate.clone(), Arc::new(tokio::sync::Notify::new()));
        let end = over.clone();
        tokio::spawn(async move {
            let end = async move { end.notified().await };
            own.pass_until(std::future::pending::<()>(), end).await
        });
        tokio::task::yield_now().await;
        let closing = tokio::spawn(async move { gate.close().await });
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        assert!(!closing.is_finished());
        over.notify_one();
        closing.await.unwrap();
    }

    #[tokio::test]
    async fn gate_without_running_work_closes_at_once() {
        PauseGate::default().close().await;
    }
}
