//! The health of endpoints: counts open connections, and ejects endpoints after a failure to
//! connect.
//!
//! All workers share it. `route/load_balancing.rs` selects endpoints accordingly.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use underpass_config::Name;

/// An endpoint: a workload and its port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct EndpointKey {
    /// The UID of the workload.
    pub(crate) uid: Name,
    /// The endpoint's own port, not the service's.
    pub(crate) port: u16,
}

/// The health of all endpoints. Endpoints without open connections and ejection have no entry.
#[derive(Debug, Default)]
pub(crate) struct EndpointHealth {
    known: Mutex<KnownEndpoints>,
    /// The number of ejected endpoints, read without the lock: usually 0.
    ejected_count: AtomicUsize,
}

#[derive(Debug, Default)]
struct KnownEndpoints {
    open: HashMap<EndpointKey, u32>,
    ejected: HashMap<EndpointKey, Instant>,
    /// The end of the next ejection to expire.
    next_return: Option<Instant>,
}

/// Counts one open connection until it is dropped.
#[derive(Debug)]
pub(crate) struct OpenConnection {
    health: Arc<EndpointHealth>,
    endpoint: EndpointKey,
}

impl EndpointHealth {
    /// Counts a connection to `endpoint` until the value is dropped. Call it before dialling, so
    /// that a burst of connections spreads over the endpoints.
    pub(crate) fn open(self: &Arc<Self>, endpoint: EndpointKey) -> OpenConnection {
        let mut known = self.lock();
        let open = known.open.entry(endpoint.clone()).or_default();
        *open = open.saturating_add(1);
        drop(known);
        OpenConnection { health: self.clone(), endpoint }
    }

    /// Ejects `endpoint` after a failure to connect: it is selected last for `pause`.
    pub(crate) fn eject(&self, endpoint: EndpointKey, pause: Duration) {
        let mut known = self.lock();
        let end = Instant::now() + pause;
        known.ejected.insert(endpoint, end);
        known.next_return = Some(known.next_return.map_or(end, |next| next.min(end)));
        self.ejected_count.store(known.ejected.len(), Ordering::Relaxed);
    }

    /// Ends the ejection of `endpoint` after a successful connection.
    pub(crate) fn restore(&self, endpoint: &EndpointKey) {
        if self.ejected_count.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut known = self.lock();
        known.ejected.remove(endpoint);
        self.ejected_count.store(known.ejected.len(), Ordering::Relaxed);
    }

    /// Whether `endpoint` is ejected.
    pub(crate) fn is_ejected(&self, endpoint: &EndpointKey) -> bool {
        self.lock().ejected.contains_key(endpoint)
    }

    /// Whether any endpoint is ejected; cheaper than a lookup of each.
    pub(crate) fn any_ejected(&self) -> bool {
        self.ejected_count.load(Ordering::Relaxed) > 0
    }

    /// The number of open connections to `endpoint`.
    pub(crate) fn open_connections(&self, endpoint: &EndpointKey) -> u32 {
        self.lock().open.get(endpoint).copied().unwrap_or_default()
    }

    /// Locks the state, and ends the ejections that have expired.
    fn lock(&self) -> MutexGuard<'_, KnownEndpoints> {
        // No code panics between related changes, so the counts are consistent in a poisoned lock.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(next) = known.next_return {
            let now = Instant::now();
            if next <= now {
                known.ejected.retain(|_, end| *end > now);
                known.next_return = known.ejected.values().min().copied();
                self.ejected_count.store(known.ejected.len(), Ordering::Relaxed);
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
    async fn ejected_endpoint_returns_after_pause_or_connection() {
        let health = EndpointHealth::default();
        for index in 0..3 {
            health.eject(endpoint(index), PAUSE * u32::from(index + 1));
        }
        health.restore(&endpoint(2));
        let ejected = || [0, 1, 2].map(|index| health.is_ejected(&endpoint(index)));
        assert_eq!(ejected(), [true, true, false]);
        advance(PAUSE - Duration::from_millis(1)).await;
        assert_eq!(ejected(), [true, true, false]);
        advance(Duration::from_millis(1)).await;
        assert_eq!(ejected(), [false, true, false]);
        health.eject(endpoint(1), PAUSE * 2);
        advance(PAUSE).await;
        assert_eq!(ejected(), [false, true, false]);
        advance(PAUSE).await;
        assert_eq!(ejected(), [false, false, false]);
        assert!(!health.any_ejected());
    }

    #[derive(Debug, Clone)]
    enum Step {
        Open(u16),
        Close(usize),
        Eject(u16, u64),
        Restore(u16),
        Wait(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (0..5_u16).prop_map(Step::Open),
            3 => any::<usize>().prop_map(Step::Close),
            2 => (0..5_u16, 0..20_u64).prop_map(|(endpoint, pause)| Step::Eject(endpoint, pause)),
            1 => (0..5_u16).prop_map(Step::Restore),
            1 => (0..15_u64).prop_map(Step::Wait),
        ]
    }

    proptest! {
        #[test]
        fn removes_endpoint_without_connection_and_ejection(
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
        let mut ejected_until: HashMap<u16, Instant> = HashMap::new();
        for step in steps {
            match step {
                Step::Open(index) => open.push(health.open(endpoint(index))),
                Step::Close(_) if open.is_empty() => {}
                Step::Close(at) => drop(open.swap_remove(at % open.len())),
                Step::Eject(index, pause) => {
                    let pause = Duration::from_secs(pause);
                    health.eject(endpoint(index), pause);
                    ejected_until.insert(index, Instant::now() + pause);
                }
                Step::Restore(index) => {
                    health.restore(&endpoint(index));
                    ejected_until.remove(&index);
                }
                Step::Wait(seconds) => advance(Duration::from_secs(seconds)).await,
            }
            let now = Instant::now();
            ejected_until.retain(|_, until| *until > now);
            for index in 0..5 {
                let held = open.iter().filter(|held| held.endpoint == endpoint(index)).count();
                assert_eq!(health.open_connections(&endpoint(index)) as usize, held);
                assert_eq!(health.is_ejected(&endpoint(index)), ejected_until.contains_key(&index));
            }
            assert_eq!(health.any_ejected(), !ejected_until.is_empty());
        }
        open.clear();
        advance(Duration::from_secs(20)).await;
        let known = health.lock();
        assert!(known.open.is_empty() && known.ejected.is_empty() && known.next_return.is_none());
    }
}
