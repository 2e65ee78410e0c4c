//! The mutual trust between a pod and other pods of the process. It is verified once for many
//! connections, like that between the ends of a tunnel.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use underpass_config::SpiffeId;
use underpass_hbone::{Credentials, MutualTrust, MutualTrustError};

use crate::node::pod::{Pod, PodId};

/// The time before a failed verification is repeated. The outcome can change with time: a
/// certificate becomes valid, or a revocation list is replaced.
const FAILURE_REMEMBERED: Duration = Duration::from_secs(1);

/// The pods to which a seat has connected without a tunnel.
#[derive(Debug, Default)]
pub(crate) struct Neighbours(Mutex<HashMap<Key, Neighbour>>);

/// A destination pod, and the identities of which it must prove one.
type Key = (PodId, Arc<[SpiffeId]>);

#[derive(Debug)]
struct Neighbour {
    pod: Weak<Pod>,
    trust: Result<Arc<MutualTrust>, Failure>,
}

#[derive(Debug)]
struct Failure {
    generations: [Credentials; 2],
    at: Instant,
    distrust: MutualTrustError,
}

/// The reason why two pods do not trust each other.
#[derive(Debug)]
pub(crate) struct Untrusted {
    pub(crate) distrust: MutualTrustError,
    /// Whether it was verified just now, so that the destination records it.
    pub(crate) is_new: bool,
}

impl Neighbours {
    /// Verifies the mutual trust between a pod with the credentials `own` and `pod` with the
    /// credentials `its`. `pod` must prove one of the identities `expected`.
    pub(crate) fn trust(
        &self,
        own: &watch::Receiver<Credentials>,
        pod: &Arc<Pod>,
        its: &watch::Receiver<Credentials>,
        expected: &Arc<[SpiffeId]>,
    ) -> Result<Arc<MutualTrust>, Box<Untrusted>> {
        // Only the worker's thread locks it, and never across an await. No code panics while it
        // holds the lock.
        let mut neighbours = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (pod.id, expected.clone());
        let generations = || [own.borrow().clone(), its.borrow().clone()];
        if let Some(known) = neighbours.get(&key).and_then(|one| one.cached_trust(generations())) {
            return known;
        }
        neighbours.retain(|_, neighbour| neighbour.pod.strong_count() > 0);
        let before = generations();
        let trust = MutualTrust::establish(own, its, expected).map(Arc::new).map_err(|distrust| {
            Failure { generations: before, at: Instant::now(), distrust: *distrust }
        });
        let outcome = match &trust {
            Ok(trust) => Ok(trust.clone()),
            Err(Failure { distrust, .. }) => {
                Err(Box::new(Untrusted { distrust: distrust.clone(), is_new: true }))
            }
        };
        neighbours.insert(key, Neighbour { pod: Arc::downgrade(pod), trust });
        outcome
    }
}

impl Neighbour {
    /// The cached outcome of a verification; `None` if it may have changed.
    fn cached_trust(
        &self,
        [own, its]: [Credentials; 2],
    ) -> Option<Result<Arc<MutualTrust>, Box<Untrusted>>> {
        match &self.trust {
            Ok(trust) => trust.is_current(&own, &its).then(|| Ok(trust.clone())),
            Err(Failure { generations: [before, its_before], at, distrust }) => {
                let is_recent = at.elapsed() < FAILURE_REMEMBERED;
                let same = before.is_same(&own) && its_before.is_same(&its);
                let known =
                    || Err(Box::new(Untrusted { distrust: distrust.clone(), is_new: false }));
                (is_recent && same).then(known)
            }
        }
    }
}
