//! What connections tell of endpoints: how many are open, and who could not be connected to and is set aside for a while.
//!
//! Shared by all workers. Not here: who is chosen in the light of it (`route/load_balancing.rs`).

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::route::EndpointKey;

/// What is known of endpoints. Who has no connection and is not set aside is not remembered.
#[derive(Debug, Default)]
pub(crate) struct EndpointHealth {
    known: Mutex<Known>,
    /// How many are set aside, to be read without the lock: mostly none.
    aside: AtomicUsize,
}

#[derive(Debug, Default)]
struct Known {
    open: HashMap<EndpointKey, u32>,
    set_aside: HashMap<EndpointKey, Instant>,
    /// When the first of those set aside comes back.
    next_back: Option<Instant>,
}

/// An open connection; dropping it closes it.
#[derive(Debug)]
pub(crate) struct OpenConnection {
    health: Arc<EndpointHealth>,
    endpoint: EndpointKey,
}

impl EndpointHealth {
    /// Counts a connection to `endpoint` until it is dropped; to be called before it is dialled, so that a burst is spread.
    pub(crate) fn open(self: &Arc<Self>, endpoint: EndpointKey) -> OpenConnection {
        let mut known = self.lock();
        let open = known.open.entry(endpoint.clone()).or_default();
        *open = open.saturating_add(1);
        drop(known);
        OpenConnection { health: self.clone(), endpoint }
    }

    /// Has `endpoint`, which could not be connected to, be chosen last for `pause`.
    pub(crate) fn set_aside(&self, endpoint: EndpointKey, pause: Duration) {
        let mut known = self.lock();
        let back = Instant::now() + pause;
        known.set_aside.insert(endpoint, back);
        known.next_back = Some(known.next_back.map_or(back, |next| next.min(back)));
        self.aside.store(known.set_aside.len(), Ordering::Relaxed);
    }

    /// Takes `endpoint` back, which was connected to.
    pub(crate) fn take_back(&self, endpoint: &EndpointKey) {
        if self.aside.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut known = self.lock();
        known.set_aside.remove(endpoint);
        self.aside.store(known.set_aside.len(), Ordering::Relaxed);
    }

    /// Whether `endpoint` is set aside.
    pub(crate) fn is_set_aside(&self, endpoint: &EndpointKey) -> bool {
        self.lock().set_aside.contains_key(endpoint)
    }

    /// Whether anybody is set aside; cheaper than asking for each.
    pub(crate) fn any_set_aside(&self) -> bool {
        self.aside.load(Ordering::Relaxed) > 0
    }

    /// How many connections to `endpoint` are open.
    pub(crate) fn open_connections(&self, endpoint: &EndpointKey) -> u32 {
        self.lock().open.get(endpoint).copied().unwrap_or_default()
    }

    /// The state without those who are back.
    fn lock(&self) -> MutexGuard<'_, Known> {
        // No code panics while it holds the lock, and counts would be right even then.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(next) = known.next_back {
            let now = Instant::now();
            if next <= now {
                known.set_aside.retain(|_, back| *back > now);
                known.next_back = known.set_aside.values().min().copied();
                self.aside.store(known.set_aside.len(), Ordering::Relaxed);
            }
        }
        known
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        let mut known = self.health.lock();
        let left = known.open.get_mut(&self.endpoint).map(|open| {
            *open = open.saturating_sub(1);
            *open
        });
        if left == Some(0) {
            known.open.remove(&self.endpoint);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::time::advance;

    use super::*;

    const PAUSE: Duration = Duration::from_secs(10);

    fn endpoint(index: u16) -> EndpointKey {
        EndpointKey { uid: "workload".into(), port: index }
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_set_aside_comes_back_after_the_pause_or_once_connected_to() {
        let health = EndpointHealth::default();
        for index in 0..3 {
            health.set_aside(endpoint(index), PAUSE * u32::from(index + 1));
        }
        health.take_back(&endpoint(2));
        let aside = || [0, 1, 2].map(|index| health.is_set_aside(&endpoint(index)));
        assert_eq!(aside(), [true, true, false]);
        advance(PAUSE - Duration::from_millis(1)).await;
        assert_eq!(aside(), [true, true, false]);
        advance(Duration::from_millis(1)).await;
        assert_eq!(aside(), [false, true, false]);
        health.set_aside(endpoint(1), PAUSE * 2);
        advance(PAUSE).await;
        assert_eq!(aside(), [false, true, false]);
        advance(PAUSE).await;
        assert_eq!(aside(), [false, false, false]);
        assert!(!health.any_set_aside());
    }

    #[derive(Debug, Clone)]
    enum Step {
        Open(u16),
        Close(usize),
        SetAside(u16, u64),
        TakeBack(u16),
        Wait(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (0..5_u16).prop_map(Step::Open),
            3 => any::<usize>().prop_map(Step::Close),
            2 => (0..5_u16, 0..20_u64).prop_map(|(endpoint, pause)| Step::SetAside(endpoint, pause)),
            1 => (0..5_u16).prop_map(Step::TakeBack),
            1 => (0..15_u64).prop_map(Step::Wait),
        ]
    }

    proptest! {
        #[test]
        fn nothing_is_remembered_of_who_has_no_connection_and_is_not_set_aside(
            steps in proptest::collection::vec(step(), 0..100),
        ) {
            let builder = &mut tokio::runtime::Builder::new_current_thread();
            let runtime = builder.enable_time().start_paused(true).build().unwrap();
            runtime.block_on(follow(steps));
        }
    }

    async fn follow(steps: Vec<Step>) {
        let health = Arc::new(EndpointHealth::default());
        let mut open: Vec<OpenConnection> = Vec::new();
        let mut back: HashMap<u16, Instant> = HashMap::new();
        for step in steps {
            match step {
                Step::Open(index) => open.push(health.open(endpoint(index))),
                Step::Close(_) if open.is_empty() => {}
                Step::Close(at) => drop(open.swap_remove(at % open.len())),
                Step::SetAside(index, pause) => {
                    let pause = Duration::from_secs(pause);
                    health.set_aside(endpoint(index), pause);
                    back.insert(index, Instant::now() + pause);
                }
                Step::TakeBack(index) => {
                    health.take_back(&endpoint(index));
                    back.remove(&index);
                }
                Step::Wait(seconds) => advance(Duration::from_secs(seconds)).await,
            }
            let now = Instant::now();
            back.retain(|_, until| *until > now);
            for index in 0..5 {
                let held = open.iter().filter(|held| held.endpoint == endpoint(index)).count();
                assert_eq!(health.open_connections(&endpoint(index)) as usize, held);
                assert_eq!(health.is_set_aside(&endpoint(index)), back.contains_key(&index));
            }
            assert_eq!(health.any_set_aside(), !back.is_empty());
        }
        open.clear();
        advance(Duration::from_secs(20)).await;
        let known = health.lock();
        assert!(known.open.is_empty() && known.set_aside.is_empty() && known.next_back.is_none());
    }
}
