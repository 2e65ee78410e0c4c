//! Passing the pods to another process that takes over: which pod is next, and which work is paused
//! meanwhile.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::convert::Infallible;
use std::sync::Arc;

use tokio::sync::oneshot;
use underpass_config::PodUid;
use underpass_interception::{Namespace, NamespaceId};

use super::{Phase, Pods};
use crate::pods::enrolment::{EnrolledPod, LeaveReason, Operation, Release};
use crate::pods::facts::PodFacts;
use crate::traffic::listeners::NamedListeners;

/// The progress of passing the pods to the other process.
#[derive(Debug, Default)]
pub(super) struct Moving {
    passed: HashMap<PodUid, (NamespaceId, Arc<PodFacts>)>,
    /// Pods that were passed and then removed, which the other process does not know yet.
    gone: BTreeMap<PodUid, Occupied>,
    /// Removed pods that the other process knows of, but whose listeners it may still have, in the
    /// order of their removal. A pod that is added again in another namespace can be removed again.
    releasing: Vec<(PodUid, Occupied)>,
    /// The passed pods that the other process leaves alone.
    exempt: BTreeSet<PodUid>,
    /// The source is paused: no attempt starts, so that pods change no longer.
    is_frozen: bool,
}

/// The namespace of a removed pod, in which the other process may have listeners.
#[derive(Debug)]
struct Occupied {
    namespace: NamespaceId,
    /// Ends the [`Release`] when it is dropped.
    _release: oneshot::Sender<Infallible>,
}

/// The next change that the other process learns.
#[derive(Debug)]
pub(in crate::pods) enum Moved {
    Pod(MovedPod),
    /// A pod that was passed has been removed.
    Gone(PodUid),
}

/// A pod to pass: a new one, or one whose facts have changed since it was passed.
#[derive(Debug)]
pub(in crate::pods) struct MovedPod {
    pub(in crate::pods) facts: Arc<PodFacts>,
    pub(in crate::pods) namespace: Namespace,
    /// `None` if the pod is not served.
    pub(in crate::pods) listeners: Option<NamedListeners>,
}

impl Moving {
    /// Whether the other process enrols the pod.
    pub(super) fn holds(&self, uid: &PodUid) -> bool {
        self.is_frozen || self.passed.contains_key(uid)
    }

    /// Whether the other process may have listeners of a removed pod in the namespace.
    pub(super) fn occupies(&self, namespace: NamespaceId) -> bool {
        let releasing = self.releasing.iter().map(|(_, occupied)| occupied);
        self.gone.values().chain(releasing).any(|one| one.namespace == namespace)
    }

    /// Records that the pod has been removed. Another one of its uid and namespace may follow.
    /// Returns the release of its namespace by the other process, before which its rules stay.
    pub(super) fn removed(&mut self, uid: &PodUid) -> Release {
        self.exempt.remove(uid);
        let Some((namespace, _)) = self.passed.remove(uid) else { return Release::default() };
        let (_release, release) = Release::channel();
        self.gone.insert(uid.clone(), Occupied { namespace, _release });
        release
    }
}

impl Pods {
    /// The next change to pass; `None` if there is none now. Pods that are not served are passed
    /// once the source is paused: until then this process enrols them.
    pub(in crate::pods) fn next_moved(&mut self) -> Option<Moved> {
        let moving = self.moving.get_or_insert_default();
        if let Some((uid, occupied)) = moving.gone.pop_first() {
            moving.releasing.push((uid.clone(), occupied));
            return Some(Moved::Gone(uid));
        }
        let (uid, pod) = self.pods.iter().find_map(|(uid, entry)| {
            if moving.passed.get(uid).is_some_and(|(_, facts)| *facts == entry.facts) {
                return None;
            }
            let (namespace, listeners) = match &entry.phase {
                Phase::Serving { namespace, pod } => (namespace, Some(pod.listeners())),
                Phase::Waiting { namespace, .. } | Phase::Enrolling { namespace, .. }
                    if moving.holds(uid) =>
                {
                    (namespace, None)
                }
                _ => return None,
            };
            let (facts, namespace) = (entry.facts.clone(), namespace.clone());
            Some((uid.clone(), MovedPod { facts, namespace, listeners }))
        })?;
        // The other process decides again with these facts.
        moving.exempt.remove(&uid);
        moving.passed.insert(uid, (pod.namespace.id(), pod.facts.clone()));
        Some(Moved::Pod(pod))
    }

    /// Whether the other process may still have the listeners of a removed pod.
    pub(in crate::pods) fn has_gone(&self) -> bool {
        let has_gone = |moving: &Moving| !moving.gone.is_empty() || !moving.releasing.is_empty();
        self.moving.as_ref().is_some_and(has_gone)
    }

    /// Records that the other process has closed the listeners of a removed pod. If the pod was
    /// removed several times, this is the end of the first removal in progress.
    pub(in crate::pods) fn released(&mut self, uid: &PodUid) {
        if let Some(moving) = &mut self.moving
            && let Some(first) = moving.releasing.iter().position(|(other, _)| other == uid)
        {
            moving.releasing.remove(first);
        }
    }

    /// Starts no attempts from now on.
    pub(in crate::pods) fn freeze(&mut self) {
        self.moving.get_or_insert_default().is_frozen = true;
    }

    /// Receivers of the ends of all removals in progress.
    pub(in crate::pods) fn removals(&mut self) -> Vec<oneshot::Receiver<()>> {
        self.end_receivers(|_| true)
    }

    /// The removals of the rules of the served pods that the other process leaves alone.
    pub(in crate::pods) fn exempt_rules_removals(&self) -> Vec<Operation<()>> {
        let exempt = self.moving.iter().flat_map(|moving| &moving.exempt);
        exempt.filter_map(|uid| Some(self.served(uid).ok()?.remove_rules())).collect()
    }

    /// Ends the take-over: this process enrols its pods again.
    pub(in crate::pods) fn stop_moving(&mut self) {
        self.moving = None;
    }

    /// Marks a pod that the other process leaves alone.
    pub(in crate::pods) fn exempt(&mut self, uid: &PodUid) {
        self.moving.get_or_insert_default().exempt.insert(uid.clone());
    }

    /// The pods that are served.
    pub(in crate::pods) fn all_served(&self) -> impl Iterator<Item = &dyn EnrolledPod> {
        self.pods.values().filter_map(|entry| match &entry.phase {
            Phase::Serving { pod, .. } => Some(&**pod),
            _ => None,
        })
    }

    /// Drains every pod, whose rules the other process keeps, and refuses new ones.
    pub(in crate::pods) fn hand_over(&mut self) -> Vec<oneshot::Receiver<()>> {
        self.stop_with(LeaveReason::HandedOver)
    }
}

#[cfg(test)]
mod tests;
