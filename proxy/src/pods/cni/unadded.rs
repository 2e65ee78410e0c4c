//! Finds pods that run although the runtime has not called the plugin for them.
//!
//! Such a pod bypasses the mesh: the network configuration had no plugin when the pod was created,
//! or the runtime did not read it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;
use underpass_config::PodUid;

use crate::pods::facts::PodFacts;

/// The time that a pod may run before a missing addition is reported: the API server learns of the
/// end of a container later than the runtime.
const GRACE: Duration = Duration::from_secs(5);

/// The pods that run without an addition.
#[derive(Debug, Default)]
pub(in crate::pods::cni) struct UnaddedPods {
    since: BTreeMap<PodUid, Instant>,
    /// The reported pods, with their names.
    reported: BTreeMap<PodUid, String>,
}

/// The changes of the reported pods.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::pods::cni) struct UnaddedChange {
    /// Pods that are reported from now on.
    pub(in crate::pods::cni) new: Vec<PodFacts>,
    /// Reported pods that have been added or have ended.
    pub(in crate::pods::cni) gone: Vec<PodUid>,
    /// The end of the next pod's grace time.
    pub(in crate::pods::cni) next: Option<Instant>,
}

impl UnaddedPods {
    /// Updates the pods. `running` are those that should have been added and were not.
    pub(in crate::pods::cni) fn update(
        &mut self,
        now: Instant,
        running: Vec<PodFacts>,
    ) -> UnaddedChange {
        let uids: BTreeSet<PodUid> = running.iter().map(|pod| pod.uid.clone()).collect();
        self.since.retain(|uid, _| uids.contains(uid));
        let gone = self.reported.extract_if(.., |uid, _| !uids.contains(uid));
        let gone = gone.map(|(uid, _)| uid).collect();
        let mut change = UnaddedChange { gone, ..UnaddedChange::default() };
        for pod in running {
            let grace_end = *self.since.entry(pod.uid.clone()).or_insert(now) + GRACE;
            if grace_end > now {
                change.next = Some(change.next.map_or(grace_end, |next| next.min(grace_end)));
            } else if self.reported.insert(pod.uid.clone(), pod.full_name()).is_none() {
                change.new.push(pod);
            }
        }
        change
    }

    /// Whether no pod runs without an addition, reported or not.
    pub(in crate::pods::cni) fn is_empty(&self) -> bool {
        self.since.is_empty()
    }

    /// The names of the reported pods.
    pub(in crate::pods::cni) fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.reported.values().map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::facts::tests::facts;

    fn pod(name: &str) -> PodFacts {
        PodFacts { uid: name.parse().unwrap(), ..facts() }
    }

    #[test]
    fn pod_is_reported_after_its_grace_until_it_is_added_or_ends() {
        let (mut pods, start) = (UnaddedPods::default(), Instant::now());
        let change = pods.update(start, vec![pod("a")]);
        assert_eq!((change.new, change.next), (vec![], Some(start + GRACE)));
        let later = start + GRACE / 2;
        let change = pods.update(later, vec![pod("a"), pod("b")]);
        assert_eq!(change.next, Some(start + GRACE), "the earliest one");
        let change = pods.update(start + GRACE, vec![pod("a"), pod("b")]);
        assert_eq!((change.new, change.next), (vec![pod("a")], Some(later + GRACE)));
        let change = pods.update(later + GRACE, vec![pod("a"), pod("b")]);
        assert_eq!((change.new, pods.names().len()), (vec![pod("b")], 2));
        let change = pods.update(later + GRACE, vec![pod("b")]);
        assert_eq!((change.gone, change.new, pods.names().len()), (vec![pod("a").uid], vec![], 1));
        // The pod runs again without an addition.
        let change = pods.update(later + GRACE, vec![pod("a"), pod("b")]);
        assert_eq!(change.next, Some(later + GRACE + GRACE));
    }
}
