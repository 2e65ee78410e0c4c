//! Lookups on demand (`mesh.xds.on_demand`): connections wait for the answers of the control plane
//! to the addresses and names that they need.
//!
//! ```text
//! connection ── resolve ──> Lookups ── asked ──> follower ──> control plane
//!     ^                                             │
//!     └────────── snapshot with the answers <───────┘
//! ```
//!
//! A connection holds a [`LookupLease`] as long as it is open. A lookup without a lease is let go
//! some minutes later (`schedule.rs`).

pub(super) mod schedule;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout_at};
use underpass_config::Lookup;

use crate::decide::snapshot::Snapshot;

/// The maximum number of lookups: a client that scans addresses must not exhaust memory.
const MAX_LOOKUPS: usize = 16_384;
/// The maximum number of lookups that one pod has asked for first, so that it cannot use up the
/// room of the other pods.
const MAX_LOOKUPS_OF_POD: usize = MAX_LOOKUPS / 4;

/// The reason why a lookup has no answer.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum LookupError {
    #[error("the control plane has not answered the lookup of {lookup} within {} s", after.as_secs_f32())]
    Unanswered { lookup: Lookup, after: Duration },
    #[error("{MAX_LOOKUPS} lookups are in use")]
    TooMany,
    #[error("{MAX_LOOKUPS_OF_POD} lookups of the pod are in use")]
    TooManyOfPod,
}

impl LookupError {
    pub(crate) fn hint(&self) -> &'static str {
        match self {
            Self::Unanswered { .. } => {
                "check that the control plane answers (underpass_control_plane_connected)"
            }
            Self::TooMany | Self::TooManyOfPod => {
                "check for a client that scans addresses or names"
            }
        }
    }
}

/// The lookups of the process, as one pod uses them. Without lookups on demand every lookup is
/// answered at once.
#[derive(Debug, Clone, Default)]
pub(crate) struct Lookups {
    shared: Option<Arc<Shared>>,
    share: Share,
}

/// The share of a pod.
#[derive(Debug, Clone, Default)]
struct Share(Arc<AskedFirst>);

/// Counts the lookups that a pod has asked for first: each of them holds a reference.
#[derive(Debug, Default)]
struct AskedFirst(Arc<()>);

#[derive(Debug, Default)]
struct Shared {
    leased: Mutex<HashMap<Lookup, Arc<Leased>>>,
    /// The lookups without an answer that connections wait for.
    asked: Mutex<HashSet<Lookup>>,
    /// The lookups that were removed from `leased` to make room.
    evicted: Mutex<HashSet<Lookup>>,
    wake: Notify,
}

/// The use of a lookup. More than one reference means that it is in use.
#[derive(Debug)]
struct Leased {
    /// The share of the pod that has asked for it first.
    share: Arc<()>,
    /// Whether a connection has used it since the last check.
    was_used: AtomicBool,
    /// The number of checks since its last use.
    unused_checks: AtomicU32,
}

/// How long a connection waits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wait {
    pub(crate) since: Instant,
    pub(crate) within: Duration,
}

impl Wait {
    pub(crate) fn end(self) -> Instant {
        self.since + self.within
    }
}

/// Keeps lookups in use. Empty without lookups on demand.
#[derive(Debug, Default)]
pub(crate) struct LookupLease {
    _leased: Box<[Arc<Leased>]>,
}

impl Lookups {
    /// Lookups on demand.
    pub(crate) fn on_demand() -> Self {
        Self { shared: Some(Arc::default()), share: Share::default() }
    }

    /// The same lookups, as another pod uses them.
    pub(crate) fn of_pod(&self) -> Self {
        Self { shared: self.shared.clone(), share: Share::default() }
    }

    pub(crate) fn are_on_demand(&self) -> bool {
        self.shared.is_some()
    }

    /// Waits until the mesh has an answer to every lookup that is `needed`, at most for `wait`.
    /// An answer may refer to further needed names. Returns the mesh with the answers, and the
    /// lease that keeps them up to date. Without lookups on demand, returns `current` at once.
    ///
    /// # Errors
    /// A lookup has no answer.
    pub(crate) async fn resolve(
        &self,
        current: Arc<Snapshot>,
        mesh: &watch::Receiver<Arc<Snapshot>>,
        needed: impl Fn(&Snapshot) -> Vec<Lookup>,
        wait: Wait,
    ) -> Result<(Arc<Snapshot>, LookupLease), LookupError> {
        let Some(shared) = &self.shared else { return Ok((current, LookupLease::default())) };
        let (mut current, mut mesh) = (current, mesh.clone());
        loop {
            let lookups = needed(&current);
            let lease = shared.lease(&self.share, &current, &lookups)?;
            let unanswered = |snapshot: &Snapshot| {
                lookups.iter().find(|lookup| !snapshot.mesh.is_answered(lookup)).cloned()
            };
            let Some(lookup) = unanswered(&current) else { return Ok((current, lease)) };
            shared.ask(lookups.iter().filter(|lookup| !current.mesh.is_answered(lookup)));
            let answered = mesh.wait_for(|snapshot| unanswered(snapshot).is_none());
            current = match timeout_at(wait.end(), answered).await {
                Ok(Ok(snapshot)) => snapshot.clone(),
                // Out of time, or the process ends.
                Ok(Err(_)) | Err(_) => {
                    return Err(LookupError::Unanswered { lookup, after: wait.within });
                }
            };
        }
    }

    /// The number of these lookups that the control plane must be asked for: those that are not
    /// leased, and those without an answer for which nothing waits, such as an absent name whose
    /// time has passed.
    pub(crate) fn count_unasked(&self, current: &Snapshot, lookups: &[Lookup]) -> usize {
        let Some(shared) = &self.shared else { return 0 };
        let leased = lock(&shared.leased);
        let is_asked = |lookup: &Lookup| {
            let lease = leased.get(lookup);
            lease.is_some_and(|lease| current.mesh.is_answered(lookup) || lease.is_in_use())
        };
        let unasked: HashSet<_> = lookups.iter().filter(|lookup| !is_asked(lookup)).collect();
        unasked.len()
    }

    /// Waits for lookups without an answer. Returns all of them.
    pub(crate) async fn asked(&self) -> Vec<Lookup> {
        let Some(shared) = &self.shared else { return std::future::pending().await };
        loop {
            let asked = std::mem::take(&mut *lock(&shared.asked));
            if !asked.is_empty() {
                return asked.into_iter().collect();
            }
            shared.wake.notified().await;
        }
    }

    /// All lookups that are in use, or were lately.
    pub(super) fn all(&self) -> Vec<Lookup> {
        let shared = self.shared.as_ref();
        shared.map(|shared| lock(&shared.leased).keys().cloned().collect()).unwrap_or_default()
    }

    /// Removes the lookups that no connection has used during the last `checks` calls. Returns them
    /// and those that were evicted.
    pub(crate) fn take_unused(&self, checks: u32) -> Vec<Lookup> {
        let Some(shared) = &self.shared else { return Vec::new() };
        let mut leased = lock(&shared.leased);
        let unused = leased.extract_if(|_, lease| lease.is_unused_for(checks));
        let mut gone: Vec<_> = unused.map(|(lookup, _)| lookup).collect();
        gone.extend(shared.take_evicted(&leased));
        gone
    }

    /// The lookups that were evicted since the last call of this or `take_unused`.
    pub(super) fn take_evicted(&self) -> Vec<Lookup> {
        let Some(shared) = &self.shared else { return Vec::new() };
        shared.take_evicted(&lock(&shared.leased))
    }
}

impl Shared {
    fn lease(
        &self,
        share: &Share,
        current: &Snapshot,
        lookups: &[Lookup],
    ) -> Result<LookupLease, LookupError> {
        let mut leased = lock(&self.leased);
        let mut leases = Vec::with_capacity(lookups.len());
        let mut new = Vec::new();
        for lookup in lookups {
            if !leased.contains_key(lookup) {
                self.make_room(&mut leased, share, current)?;
                new.push(lookup);
            }
            let lease = leased.entry(lookup.clone()).or_insert_with(|| Leased::of(share));
            lease.was_used.store(true, Relaxed);
            leases.push(lease.clone());
        }
        drop(leased);
        // An answered lookup may have been let go since the snapshot.
        self.ask(new.into_iter());
        Ok(LookupLease { _leased: leases.into() })
    }

    /// Makes room for a lookup of a pod. Above its share, only its own lookups make room.
    fn make_room(
        &self,
        leased: &mut HashMap<Lookup, Arc<Leased>>,
        share: &Share,
        current: &Snapshot,
    ) -> Result<(), LookupError> {
        let is_own = |lease: &Leased| Arc::ptr_eq(&lease.share, &share.0.0);
        let (made, error) = if share.count() >= MAX_LOOKUPS_OF_POD {
            (self.evict_unused(leased, current, is_own), LookupError::TooManyOfPod)
        } else {
            let has_room = leased.len() < MAX_LOOKUPS;
            (has_room || self.evict_unused(leased, current, |_| true), LookupError::TooMany)
        };
        if made { Ok(()) } else { Err(error) }
    }

    /// Removes unused lookups without a resource; if there are none, all unused ones. Returns
    /// whether there were any.
    fn evict_unused(
        &self,
        leased: &mut HashMap<Lookup, Arc<Leased>>,
        current: &Snapshot,
        may_go: impl Fn(&Leased) -> bool,
    ) -> bool {
        let is_unused = |lease: &Arc<Leased>| Arc::strong_count(lease) == 1 && may_go(lease);
        let unknown = |lookup: &Lookup| !current.mesh.is_known(lookup);
        let evicted = leased.extract_if(|lookup, lease| is_unused(lease) && unknown(lookup));
        let mut unused: Vec<_> = evicted.map(|(lookup, _)| lookup).collect();
        if unused.is_empty() {
            let evicted = leased.extract_if(|_, lease| is_unused(lease));
            unused.extend(evicted.map(|(lookup, _)| lookup));
        }
        let mut asked = lock(&self.asked);
        for lookup in &unused {
            asked.remove(lookup);
        }
        let has_evicted = !unused.is_empty();
        lock(&self.evicted).extend(unused);
        has_evicted
    }

    /// The evicted lookups that are not leased again.
    fn take_evicted(&self, leased: &HashMap<Lookup, Arc<Leased>>) -> Vec<Lookup> {
        let evicted = std::mem::take(&mut *lock(&self.evicted));
        evicted.into_iter().filter(|lookup| !leased.contains_key(lookup)).collect()
    }

    fn ask<'a>(&self, lookups: impl Iterator<Item = &'a Lookup>) {
        let mut asked = lock(&self.asked);
        let before = asked.len();
        asked.extend(lookups.cloned());
        if asked.len() > before {
            self.wake.notify_one();
        }
    }
}

impl Share {
    fn count(&self) -> usize {
        Arc::strong_count(&self.0.0) - 1
    }
}

impl Leased {
    /// A new lookup of a pod.
    fn of(Share(share): &Share) -> Arc<Self> {
        let share = Arc::clone(&share.0);
        Arc::new(Self { share, was_used: AtomicBool::new(false), unused_checks: AtomicU32::new(0) })
    }

    /// Whether a query or a connection holds the lookup.
    fn is_in_use(self: &Arc<Self>) -> bool {
        Arc::strong_count(self) > 1
    }

    /// Counts a check. Returns whether there was no use during the last `checks`.
    fn is_unused_for(self: &Arc<Self>, checks: u32) -> bool {
        if self.was_used.swap(false, Relaxed) || self.is_in_use() {
            self.unused_checks.store(0, Relaxed);
            return false;
        }
        self.unused_checks.fetch_add(1, Relaxed) + 1 >= checks
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code panics while it holds the lock.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
