//! How many requests are under way at once, and which of those that wait is next.
//!
//! Not here: what is asked, and of whom.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// How urgent a certificate is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Somebody waits for it.
    RealTime,
    /// It will be needed.
    Warmup,
    /// There is one, and it is still valid.
    Background,
}

/// Admits so many at once, the more urgent before the less, and among equals the first.
#[derive(Debug)]
pub(super) struct PriorityLimit(Mutex<State>);

#[derive(Debug)]
struct State {
    free: usize,
    waiting: BTreeMap<(Priority, u64), oneshot::Sender<Admission>>,
    /// How many have waited, for their order.
    waited: u64,
}

/// A place. Dropping it makes room for the next.
#[derive(Debug)]
pub(super) struct Admission(Arc<PriorityLimit>);

impl PriorityLimit {
    pub(super) fn new(places: usize) -> Arc<Self> {
        Arc::new(Self(Mutex::new(State { free: places, waiting: BTreeMap::new(), waited: 0 })))
    }

    /// Waits for a place. Cancel-safe.
    pub(super) async fn admit(self: &Arc<Self>, priority: Priority) -> Admission {
        let admitted = {
            let mut state = self.state();
            if state.free > 0 {
                state.free -= 1;
                return Admission(self.clone());
            }
            let (admit, admitted) = oneshot::channel();
            state.waited += 1;
            let place = (priority, state.waited);
            state.waiting.insert(place, admit);
            admitted
        };
        match admitted.await {
            Ok(admission) => admission,
            // A sender is only dropped with the limit itself, which `self` keeps.
            Err(_) => std::future::pending().await,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next who still waits; a place is free if there is none.
    fn next(&self) -> Option<oneshot::Sender<Admission>> {
        let mut state = self.state();
        while let Some((_, next)) = state.waiting.pop_first() {
            if !next.is_closed() {
                return Some(next);
            }
        }
        state.free += 1;
        None
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        if let Some(next) = self.0.next() {
            // If it went away just now, the place that comes back with the error is dropped, and goes to the next one.
            let _gone = next.send(Self(self.0.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;
    use tokio::task::{JoinHandle, yield_now};

    use super::*;

    type Admitted = mpsc::UnboundedReceiver<(&'static str, Admission)>;

    /// Queues these, in this order, and tells who is admitted.
    async fn queue(
        limit: &Arc<PriorityLimit>,
        requests: &[(&'static str, Priority)],
    ) -> (Vec<JoinHandle<()>>, Admitted) {
        let (tell, admitted) = mpsc::unbounded_channel();
        let mut tasks = Vec::new();
        for &(name, priority) in requests {
            let (limit, tell) = (limit.clone(), tell.clone());
            tasks.push(tokio::spawn(async move {
                let admission = limit.admit(priority).await;
                tell.send((name, admission)).unwrap();
            }));
            yield_now().await;
        }
        (tasks, admitted)
    }

    const MIXED: [(&str, Priority); 5] = [
        ("late", Priority::Background),
        ("soon", Priority::Warmup),
        ("first", Priority::RealTime),
        ("second", Priority::RealTime),
        ("later", Priority::Background),
    ];

    #[tokio::test]
    async fn the_more_urgent_are_first_and_equals_in_turn() {
        let limit = PriorityLimit::new(1);
        let mut held = limit.admit(Priority::Background).await;
        let (_tasks, mut admitted) = queue(&limit, &MIXED).await;
        for expected in ["first", "second", "soon", "late", "later"] {
            assert!(admitted.try_recv().is_err(), "one at a time");
            drop(held);
            let (name, admission) = admitted.recv().await.unwrap();
            assert_eq!(name, expected);
            held = admission;
        }
        drop(held);
        assert_eq!(limit.state().free, 1);
    }

    #[tokio::test]
    async fn a_place_is_not_lost_with_whoever_gives_up() {
        let limit = PriorityLimit::new(2);
        let held = [limit.admit(Priority::RealTime).await, limit.admit(Priority::Warmup).await];
        let (tasks, mut admitted) = queue(&limit, &MIXED).await;
        // One gives up while it waits, one with the place on its way.
        tasks[2].abort();
        yield_now().await;
        drop(held);
        tasks[3].abort();
        yield_now().await;
        let mut names = Vec::new();
        while let Ok((name, admission)) = admitted.try_recv() {
            names.push(name);
            drop(admission);
            yield_now().await;
        }
        assert_eq!(names, ["soon", "late", "later"]);
        assert_eq!(limit.state().free, 2);
        assert!(limit.state().waiting.is_empty());
    }
}
