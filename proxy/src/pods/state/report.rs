//! Reports the state of the pods: addresses, counts and the status of each.

use std::collections::BTreeSet;
use std::net::IpAddr;

use tokio::time::Instant;

use super::{Entry, Phase, Pods};
use crate::admin::api::states;
use crate::pods::enrolment::EnrolError;
use crate::pods::status::{PodState, PodStatus, Step};

impl Pods {
    /// The addresses of the served pods.
    pub(in crate::pods) fn served_addresses(&self) -> BTreeSet<IpAddr> {
        let served =
            self.pods.values().filter(|entry| matches!(entry.phase, Phase::Serving { .. }));
        served.flat_map(|entry| entry.facts.ips.iter().copied()).collect()
    }

    /// The number of pods in each state.
    pub(in crate::pods) fn counts(&self) -> [(&'static str, usize); 5] {
        let count =
            |of: fn(&Phase) -> bool| self.pods.values().filter(|entry| of(&entry.phase)).count();
        let is_pending =
            |phase: &Phase| matches!(phase, Phase::Waiting { .. } | Phase::Enrolling { .. });
        [
            (states::PodState::Pending.text(), count(is_pending)),
            (
                states::PodState::Serving.text(),
                count(|phase| matches!(phase, Phase::Serving { .. })),
            ),
            (states::PodState::Exempt.text(), count(|phase| matches!(phase, Phase::Exempt(_)))),
            (states::PodState::Failed.text(), count(|phase| matches!(phase, Phase::Failed))),
            (states::PodState::Leaving.text(), self.leaving.len()),
        ]
    }

    /// The status of all pods, unsorted.
    pub(in crate::pods) fn status(&self, now: Instant) -> Vec<PodStatus> {
        let known = self.pods.iter().map(|(uid, entry)| PodStatus {
            uid: uid.clone(),
            pod: entry.facts.full_name(),
            state: self.state(entry, now),
        });
        let leaving = self.leaving.values().map(|leaving| PodStatus {
            uid: leaving.uid.clone(),
            pod: leaving.pod.clone(),
            state: PodState::Leaving,
        });
        known.chain(leaving).collect()
    }

    fn state(&self, entry: &Entry, now: Instant) -> PodState {
        let pending =
            |step| PodState::Pending { since: entry.since, step, error: entry.error.clone() };
        match &entry.phase {
            Phase::Waiting { namespace, .. } if self.leaving.contains_key(&namespace.id()) => {
                pending(Step::Predecessor)
            }
            Phase::Waiting { turn: (due, _), .. } if *due > now => pending(Step::BackOff),
            Phase::Waiting { .. } => pending(Step::Queued),
            Phase::Enrolling { .. } => pending(Step::Enrolling),
            Phase::Serving { pod, .. } => PodState::Serving(pod.problem()),
            Phase::Exempt(reason) => PodState::Exempt(*reason),
            Phase::Failed => PodState::Failed(entry.error.clone().unwrap_or(EnrolError::Pending)),
        }
    }
}
