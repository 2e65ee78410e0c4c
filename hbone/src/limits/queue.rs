//! The order in which those that wait for a budget get a share: the lowest rank first, and among
//! equals the first.
//!
//! Not here: how long one may wait.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::budget::{Budget, Share};

/// Those that wait for shares of one budget or of its parts. Cheap to clone; clones are one queue.
#[derive(Debug)]
pub struct Queue<R: Ord>(Arc<Mutex<Waiting<R>>>);

#[derive(Debug)]
struct Waiting<R: Ord> {
    waiters: BTreeMap<(R, u64), Waiter<R>>,
    /// How many have waited, for their order.
    waited: u64,
}

#[derive(Debug)]
struct Waiter<R: Ord> {
    budget: Arc<Budget>,
    turn: oneshot::Sender<Turn<R>>,
}

/// A share of one unit. When it is dropped, the next one in the queue gets its turn.
#[derive(Debug)]
pub struct Turn<R: Ord> {
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
        Self(Arc::new(Mutex::new(Waiting { waiters: BTreeMap::new(), waited: 0 })))
    }
}

impl<R: Ord + Copy> Queue<R> {
    /// Waits for a unit of `budget`. `waits` is called if there is a wait. Cancel-safe: a wait
    /// that is given up leaves nothing behind.
    pub async fn turn(&self, budget: &Arc<Budget>, rank: R, waits: impl FnOnce()) -> Turn<R> {
        let (place, turn) = {
            let mut waiting = self.waiting();
            let is_next =
                waiting.waiters.first_key_value().is_none_or(|((first, _), _)| rank < *first);
            if is_next && let Ok(share) = Share::take(budget, 1) {
                return Turn { queue: self.clone(), share: Some(share) };
            }
            let (sender, turn) = oneshot::channel();
            waiting.waited += 1;
            let place = (rank, waiting.waited);
            waiting.waiters.insert(place, Waiter { budget: budget.clone(), turn: sender });
            (Place { queue: self, place }, turn)
        };
        waits();
        let given = turn.await;
        drop(place);
        match given {
            Ok(turn) => turn,
            // A sender is only dropped with the queue itself, which `self` keeps.
            Err(_) => std::future::pending().await,
        }
    }
}

impl<R: Ord> Queue<R> {
    fn waiting(&self) -> MutexGuard<'_, Waiting<R>> {
        // Nothing panics while it is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives those at the front their turn, as long as the budget gives them a share.
    fn advance(&self) {
        while let Some((waiter, share)) = self.next() {
            // If it has given up just now, the turn comes back and is dropped.
            let _gone = waiter.turn.send(Turn { queue: self.clone(), share: Some(share) });
        }
    }

    fn next(&self) -> Option<(Waiter<R>, Share)> {
        let mut waiting = self.waiting();
        let first = waiting.waiters.first_entry()?;
        let share = Share::take(&first.get().budget, 1).ok()?;
        Some((first.remove(), share))
    }
}

impl<R: Ord> Drop for Turn<R> {
    fn drop(&mut self) {
        self.share = None;
        self.queue.advance();
    }
}

/// A place in the queue, for as long as its owner waits.
struct Place<'a, R: Ord> {
    queue: &'a Queue<R>,
    place: (R, u64),
}

impl<R: Ord> Drop for Place<'_, R> {
    fn drop(&mut self) {
        let left = self.queue.waiting().waiters.remove(&self.place);
        // It may have been at the front, and have waited for more than the next one needs.
        if left.is_some() {
            self.queue.advance();
        }
    }
}

#[cfg(test)]
mod tests;
