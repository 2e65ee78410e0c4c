//! Whether something goes on that only one process may do: accepting connections, looking after the rules. While another
//! process tries to take over it does not, and nothing is lost by it: connections wait in the kernel's queue, for either of both.

use std::sync::Arc;

use tokio::sync::watch;

/// Shared by all that stand at the gate, and by whoever may close it.
#[derive(Debug, Clone)]
pub(crate) struct Gate(Arc<State>);

#[derive(Debug)]
struct State {
    open: watch::Sender<bool>,
    /// How many have passed and are not back yet.
    inside: watch::Sender<usize>,
}

impl Default for Gate {
    fn default() -> Self {
        let (open, inside) = (watch::Sender::new(true), watch::Sender::new(0));
        Self(Arc::new(State { open, inside }))
    }
}

impl Gate {
    /// Waits until the gate is open, and then does `work`; `None` if the gate closed before that was done. Cancelling it must
    /// lose nothing.
    pub(crate) async fn pass<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        self.pass_until(work, std::future::ready(())).await
    }

    /// The same for work that goes on for a while after it was cancelled: the gate closes only when
    /// `end` is over too.
    pub(crate) async fn pass_until<T>(
        &self,
        work: impl Future<Output = T>,
        end: impl Future<Output = ()>,
    ) -> Option<T> {
        let mut open = self.0.open.subscribe();
        // The sender is ours, so that waiting cannot fail.
        open.wait_for(|open| *open).await.ok()?;
        let _inside = Inside::new(&self.0);
        let done = tokio::select! {
            // First: it may have been closed since.
            biased;
            _ = open.wait_for(|open| !*open) => None,
            done = work => Some(done),
        };
        if done.is_none() {
            end.await;
        }
        done
    }

    /// Closes the gate and waits until nobody is inside any longer.
    pub(crate) async fn close(&self) {
        self.0.open.send_replace(false);
        let mut inside = self.0.inside.subscribe();
        // As above.
        let _nobody = inside.wait_for(|inside| *inside == 0).await;
    }

    pub(crate) fn open(&self) {
        self.0.open.send_replace(true);
    }
}

/// Somebody who has passed, for as long as this lives.
struct Inside<'a>(&'a State);

impl<'a> Inside<'a> {
    fn new(state: &'a State) -> Self {
        state.inside.send_modify(|inside| *inside += 1);
        Self(state)
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.inside.send_modify(|inside| *inside -= 1);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::*;

    #[tokio::test]
    async fn behind_a_closed_gate_nothing_is_done_until_it_opens_again() {
        let (gate, accepted) = (Gate::default(), Arc::new(AtomicUsize::new(0)));
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
    async fn what_is_under_way_when_the_gate_closes_is_cancelled() {
        let gate = Gate::default();
        let own = gate.clone();
        let endless = tokio::spawn(async move { own.pass(std::future::pending::<()>()).await });
        tokio::task::yield_now().await;
        gate.close().await;
        assert_eq!(endless.await.unwrap(), None);
    }

    #[tokio::test]
    async fn closes_when_cancelled_work_is_over() {
        let gate = Gate::default();
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
    async fn a_gate_that_nobody_stands_at_closes_at_once() {
        Gate::default().close().await;
    }
}
