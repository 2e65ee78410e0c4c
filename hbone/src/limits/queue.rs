//! A queue of requests for units of a budget: lowest rank first, and first in, first out among
//! equal ranks.
//!
//! Callers set the timeouts.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::budget::{Budget, Share};

/// The requests that wait for units of one budget or of its parts. Clones share the queue.
#[derive(Debug)]
pub struct Queue<R: Ord>(Arc<Mutex<WaitList<R>>>);

#[derive(Debug)]
struct WaitList<R: Ord> {
    waiters: BTreeMap<(R, u64), Waiter<R>>,
    /// A counter that orders requests of equal rank.
    waited: u64,
}

#[derive(Debug)]
struct Waiter<R: Ord> {
    budget: Arc<Budget>,
    turn: oneshot::Sender<QueuePermit<R>>,
}

/// One unit of the budget. Dropping it admits the next request.
#[derive(Debug)]
pub struct QueuePermit<R: Ord> {
    queue: Queue<R>,
    share: Option<Share>,
}

impl<R: Ord> Clone for Queue<R> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<R: Ord> Default for Queue<R> {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(WaitList { waiters: BTreeMap::new(), waited: 0 })))
    }
}

impl<R: Ord + Copy> Queue<R> {
    /// Waits for one unit of `budget`. Calls `on_wait` if none is free at once. Cancel-safe.
    pub async fn turn(
        &self,
        budget: &Arc<Budget>,
        rank: R,
        on_wait: impl FnOnce(),
    ) -> QueuePermit<R> {
        let (position, turn) = {
            let mut waiting = self.lock();
            let is_next =
                waiting.waiters.first_key_value().is_none_or(|((first, _), _)| rank < *first);
            if is_next && let Ok(share) = Share::take(budget, 1) {
                return QueuePermit { queue: self.clone(), share: Some(share) };
            }
            let (sender, turn) = oneshot::channel();
            waiting.waited += 1;
            let position = (rank, waiting.waited);
            waiting.waiters.insert(position, Waiter { budget: budget.clone(), turn: sender });
            (QueueEntry { queue: self, position }, turn)
        };
        on_wait();
        let granted = turn.await;
        drop(position);
        match granted {
            Ok(turn) => turn,
            // Unreachable: the queue owns the senders, and `self` keeps the queue.
            Err(_) => std::future::pending().await,
        }
    }
}

impl<R: Ord> Queue<R> {
    fn lock(&self) -> MutexGuard<'_, WaitList<R>> {
        // No code panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Admits requests from the front while the budget grants units.
    fn advance(&self) {
        while let Some((waiter, share)) = self.next() {
            // If the waiting caller was cancelled meanwhile, the permit comes back and is dropped.
            let _returned =
                waiter.turn.send(QueuePermit { queue: self.clone(), share: Some(share) });
        }
    }

    fn next(&self) -> Option<(Waiter<R>, Share)> {
        let mut waiting = self.lock();
        let first = waiting.waiters.first_entry()?;
        let share = Share::take(&first.get().budget, 1).ok()?;
        Some((first.remove(), share))
    }
}

impl<R: Ord> Drop for QueuePermit<R> {
    fn drop(&mut self) {
        self.share = None;
        self.queue.advance();
    }
}

/// A request in the queue, removed when its caller is dropped.
struct QueueEntry<'a, R: Ord> {
    queue: &'a Queue<R>,
    position: (R, u64),
}

impl<R: Ord> Drop for QueueEntry<'_, R> {
    fn drop(&mut self) {
        let left = self.queue.lock().waiters.remove(&self.position);
        // The cancelled request may have blocked the next one.
        if left.is_some() {
            self.queue.advance();
        }
    }
}

#[cfg(test)]
mod tests;
