//! Whether connections are accepted. While another process tries to take over they are not, and nothing is lost by it: they
//! wait in the kernel's queue, for either of both.

use std::sync::Arc;

use tokio::sync::watch;

/// Shared by all that accept, and by whoever may stop them.
#[derive(Debug, Clone)]
pub(crate) struct Gate(Arc<State>);

#[derive(Debug)]
struct State {
    open: watch::Sender<bool>,
    /// How many loops may be accepting right now.
    accepting: watch::Sender<usize>,
}

impl Default for Gate {
    fn default() -> Self {
        let (open, accepting) = (watch::Sender::new(true), watch::Sender::new(0));
        Self(Arc::new(State { open, accepting }))
    }
}

impl Gate {
    /// Accepts by `forever` whenever the gate is open. Cancelling it must lose no connection.
    pub(crate) async fn accept<F: Future<Output = ()>>(&self, forever: impl Fn() -> F) {
        let mut open = self.0.open.subscribe();
        // The sender is ours, so that waiting cannot fail.
        while open.wait_for(|open| *open).await.is_ok() {
            let _accepting = Accepting::new(&self.0);
            tokio::select! {
                // First: it may have been closed since.
                biased;
                _ = open.wait_for(|open| !*open) => {}
                () = forever() => return,
            }
        }
    }

    /// Closes the gate and waits until nobody accepts any longer.
    pub(crate) async fn close(&self) {
        self.0.open.send_replace(false);
        // As above.
        let mut accepting = self.0.accepting.subscribe();
        let _none = accepting.wait_for(|accepting| *accepting == 0).await;
    }

    pub(crate) fn open(&self) {
        self.0.open.send_replace(true);
    }
}

/// A loop that accepts, for as long as this lives.
struct Accepting<'a>(&'a State);

impl<'a> Accepting<'a> {
    fn new(state: &'a State) -> Self {
        state.accepting.send_modify(|accepting| *accepting += 1);
        Self(state)
    }
}

impl Drop for Accepting<'_> {
    fn drop(&mut self) {
        self.0.accepting.send_modify(|accepting| *accepting -= 1);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::*;

    #[tokio::test]
    async fn behind_a_closed_gate_nothing_is_accepted_until_it_opens_again() {
        let (gate, accepted) = (Gate::default(), Arc::new(AtomicUsize::new(0)));
        let (own, count) = (gate.clone(), accepted.clone());
        let accepting = tokio::spawn(async move {
            let forever = || async {
                loop {
                    count.fetch_add(1, Relaxed);
                    tokio::task::yield_now().await;
                }
            };
            own.accept(forever).await;
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
    async fn a_gate_that_nobody_stands_at_closes_at_once() {
        Gate::default().close().await;
    }
}
