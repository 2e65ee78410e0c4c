//! The registry while another process takes over from this one, and while this one takes over.

use std::sync::Arc;

use futures_util::future::join_all;
use tokio::sync::oneshot;
use tokio::time::Instant;
use underpass_config::PodUid;
use underpass_interception::Namespace;

use super::{Enrolment, PodRegistry, Removal};
use crate::pods::enrolment::{EnrolledPod, Pause};
use crate::pods::facts::PodFacts;
use crate::pods::state::Pods;
use crate::pods::state::moving::Moved;
use crate::pods::take_over::handed::Handed;

/// Passing all pods to another process that takes over.
impl PodRegistry {
    /// The next change that the other process learns; `None` if there is none now.
    pub(in crate::pods) fn next_moved(&self) -> Option<Moved> {
        self.pods().next_moved()
    }

    /// Records that the other process has closed the listeners of a removed pod.
    pub(in crate::pods) fn released(&self, uid: &PodUid) {
        self.change(|pods| pods.released(uid));
    }

    /// Whether the other process may still have the listeners of a removed pod.
    pub(in crate::pods) fn has_gone(&self) -> bool {
        self.pods().has_gone()
    }

    /// Waits until the other process may have the listeners of a removed pod. Cancel-safe.
    pub(in crate::pods) async fn wait_for_gone(&self) {
        while !self.has_gone() {
            self.0.has_gone.notified().await;
        }
    }

    /// Whether the pod is served and has a certificate, or needs none.
    pub(in crate::pods) async fn has_certificate(&self, uid: &PodUid) -> bool {
        let certificate = self.pods().served(uid).map(EnrolledPod::has_certificate);
        match certificate {
            Ok(certificate) => certificate.await,
            Err(_) => false,
        }
    }

    /// Pauses a part of a pod's work, if the pod is served.
    pub(in crate::pods) async fn pause(&self, uid: &PodUid, part: Pause) {
        let pause = self.pods().served(uid).map(|pod| pod.pause(part));
        if let Ok(pause) = pause {
            pause.await;
        }
    }

    /// Resumes the work of a pod.
    pub(in crate::pods) fn resume(&self, uid: &PodUid) {
        self.pods().served(uid).map(EnrolledPod::resume).ok();
    }

    /// Marks a pod that the other process leaves alone: `finish_rules` removes its rules.
    pub(in crate::pods) fn exempt(&self, uid: &PodUid) {
        self.pods().exempt(uid);
    }

    /// Starts no attempts from now on. Returns the removals in progress: each one still changes the
    /// rules in a namespace where the other process may enrol another pod.
    pub(in crate::pods) fn freeze(&self) -> Removal {
        let mut pods = self.pods();
        pods.freeze();
        Removal(pods.removals())
    }

    /// Changes the rules for the last time: finishes removals, and removes the rules of the pods
    /// that the other process leaves alone.
    pub(in crate::pods) async fn finish_rules(&self) {
        let removals = Removal(self.pods().removals());
        removals.gone().await;
        let removals = self.pods().exempt_rules_removals();
        join_all(removals).await;
    }

    /// Resumes the work of all pods.
    pub(in crate::pods) fn resume_all(&self) {
        self.change(|pods| {
            pods.stop_moving();
            pods.all_served().for_each(EnrolledPod::resume);
        });
    }

    /// Drains every pod, whose rules belong to the other process.
    pub(crate) fn hand_over(&self) -> Removal {
        Removal(self.change(Pods::hand_over))
    }
}

/// Adopting the pods of the running process.
impl PodRegistry {
    /// From now on only pods that are handed over are enrolled.
    pub(in crate::pods) fn begin_adoption(&self) {
        self.pods().begin_adoption();
    }

    /// Adds a pod of the running process. Returns the attempt to adopt it with the `handed` parts,
    /// if there is one.
    pub(in crate::pods) fn adopt(
        &self,
        facts: PodFacts,
        namespace: Namespace,
        handed: Option<Handed>,
    ) -> Option<Enrolment> {
        let (answer, outcome) = oneshot::channel();
        let (now, facts) = (Instant::now(), Arc::new(facts));
        let adopts = self.change(|pods| pods.adopt(now, facts, namespace, handed, answer));
        adopts.then_some(Enrolment(outcome))
    }

    /// Removes a pod that the running process has removed, and leaves the rules to that process.
    pub(in crate::pods) fn release(&self, uid: &PodUid) -> Removal {
        Removal(self.change(|pods| pods.release(uid)))
    }

    /// Also enrols the pods that were not adopted.
    pub(crate) fn finish_adoption(&self) {
        self.change(|pods| pods.finish_adoption(Instant::now()));
    }
}
