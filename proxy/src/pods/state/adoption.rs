//! Adopting pods from the running process: no other pod is enrolled meanwhile, because that process
//! still serves it.

use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::time::Instant;
use underpass_config::PodUid;
use underpass_interception::Namespace;

use super::{AnswerSender, Phase, Pods};
use crate::pods::enrolment::LeaveReason;
use crate::pods::facts::PodFacts;
use crate::pods::take_over::handed::Handed;

impl Pods {
    /// From now on only pods that are handed over are enrolled.
    pub(in crate::pods) fn begin_adoption(&mut self) {
        self.is_adopting = true;
    }

    /// Adds a pod of the running process. Returns whether an attempt adopts it with the `handed`
    /// parts.
    pub(in crate::pods) fn adopt(
        &mut self,
        now: Instant,
        facts: Arc<PodFacts>,
        namespace: Namespace,
        handed: Option<Handed>,
        answer: AnswerSender,
    ) -> bool {
        let uid = facts.uid.clone();
        let is_new = !self.pods.contains_key(&uid);
        self.add(now, facts, namespace, answer);
        let adopts = is_new && handed.is_some();
        if let Some(entry) = self.pods.get_mut(&uid).filter(|_| adopts) {
            entry.handed = handed;
        }
        adopts
    }

    /// Removes a pod that the running process has removed. Returns receivers of its end.
    pub(in crate::pods) fn release(&mut self, uid: &PodUid) -> Vec<oneshot::Receiver<()>> {
        self.withdraw(uid, LeaveReason::RemovedByOther);
        self.end_receivers(|leaving| leaving.uid == *uid)
    }

    /// Also enrols the other pods, at once.
    pub(in crate::pods) fn finish_adoption(&mut self, now: Instant) {
        self.is_adopting = false;
        let waiting = |(uid, entry): (_, &super::Entry)| match entry.phase {
            Phase::Waiting { turn, .. } => Some((turn, uid)),
            _ => None,
        };
        let waiting: Vec<_> =
            self.pods.iter().map(|(uid, entry)| (uid.clone(), entry)).filter_map(waiting).collect();
        for (turn, uid) in waiting {
            self.queue.remove(&turn);
            let due = self.turn(now, &uid);
            let Some(entry) = self.pods.get_mut(&uid) else { continue };
            entry.failures = 0;
            if let Phase::Waiting { turn, .. } = &mut entry.phase {
                *turn = due;
            }
        }
    }
}
