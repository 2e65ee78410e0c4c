//! The status of a pod for operators: its state, its current step, and its error.

use tokio::time::Instant;
use underpass_config::{Hint, PodUid, Quoted};

use crate::admin::api::states;
use crate::admin::api::status::Pod;
use crate::pods::annotations::ExemptReason;
use crate::pods::enrolment::{EnrolError, PodProblem};

/// The status of a pod.
#[derive(Debug, Clone)]
pub(crate) struct PodStatus {
    pub(crate) uid: PodUid,
    /// `NAMESPACE/NAME`.
    pub(crate) pod: String,
    pub(crate) state: PodState,
}

/// The state of a pod, as reported to operators.
#[derive(Debug, Clone)]
pub(crate) enum PodState {
    /// Not served yet.
    Pending {
        since: Instant,
        step: Step,
        error: Option<EnrolError>,
    },
    Serving(Option<PodProblem>),
    /// Exempt from enrolment.
    Exempt(ExemptReason),
    /// Not served, and not retried.
    Failed(EnrolError),
    /// Removed; its connections are draining.
    Leaving,
}

impl PodState {
    pub(crate) fn shown(&self) -> states::PodState {
        match self {
            Self::Pending { .. } => states::PodState::Pending,
            Self::Serving(Some(PodProblem::Draining | PodProblem::Drained)) => {
                states::PodState::Draining
            }
            Self::Serving(_) => states::PodState::Serving,
            Self::Exempt(_) => states::PodState::Exempt,
            Self::Failed(_) => states::PodState::Failed,
            Self::Leaving => states::PodState::Leaving,
        }
    }
}

/// The step that a pending pod waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// A free attempt.
    Queued,
    /// The drain of the previous pod of its namespace.
    Predecessor,
    /// The end of an attempt.
    Enrolling,
    /// The end of the back-off.
    BackOff,
}

impl From<&PodStatus> for Pod {
    fn from(PodStatus { uid, pod, state }: &PodStatus) -> Self {
        let (uid, pod) = (uid.as_str().to_owned(), pod.clone());
        let known = Self { uid, pod, state: state.shown(), ..Self::default() };
        match state {
            PodState::Pending { since, step, error } => {
                let cause = error.as_ref().map(|error| format!(": {}", Quoted::chain(error)));
                let detail = format!("{}{}", step.text(), cause.unwrap_or_default());
                let for_seconds = Some(since.elapsed().as_secs());
                let has_failed = error.is_some();
                let hint = error.as_ref().and_then(Hint::hint).map(Into::into);
                Self { for_seconds, detail: Some(detail), hint, has_failed, ..known }
            }
            PodState::Serving(None) => known,
            PodState::Serving(Some(problem)) => problem.of(known),
            PodState::Exempt(reason) => Self { detail: Some(reason.to_string()), ..known },
            PodState::Failed(error) => {
                let detail = Some(Quoted::chain(error).to_string());
                Self { detail, hint: error.hint().map(Into::into), has_failed: true, ..known }
            }
            PodState::Leaving => known,
        }
    }
}

impl PodProblem {
    /// The status of a served pod with this problem.
    pub(crate) fn of(self, pod: Pod) -> Pod {
        let state = PodState::Serving(Some(self)).shown();
        let (detail, hint) = (Some(self.to_string()), self.hint().map(str::to_owned));
        Pod { state, detail, hint, ..pod }
    }
}

impl Step {
    fn text(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Predecessor => "waiting for the previous pod of its namespace to leave",
            Self::Enrolling => "enrolling",
            Self::BackOff => "waiting for the next attempt",
        }
    }
}
