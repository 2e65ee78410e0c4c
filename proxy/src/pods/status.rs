//! The status of a pod for operators: its state, its current step, and its error.

use std::fmt;

use tokio::time::Instant;
use underpass_config::{PodUid, Quoted};

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
    pub(crate) const PENDING: &'static str = "pending";
    pub(crate) const SERVING: &'static str = "serving";
    pub(crate) const EXEMPT: &'static str = "exempt";
    pub(crate) const FAILED: &'static str = "failed";
    pub(crate) const LEAVING: &'static str = "leaving";

    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Pending { .. } => Self::PENDING,
            Self::Serving(_) => Self::SERVING,
            Self::Exempt(_) => Self::EXEMPT,
            Self::Failed(_) => Self::FAILED,
            Self::Leaving => Self::LEAVING,
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

impl fmt::Display for PodStatus {
    /// For example `shop/web-1 6f1b8a42 pending for 12 s: waiting for the next attempt: ...`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { uid, pod, state } = self;
        write!(f, "{pod} {uid} {}", state.name())?;
        match state {
            PodState::Pending { since, step, error } => {
                write!(f, " for {} s: {}", since.elapsed().as_secs(), step.text())?;
                match error {
                    Some(error) => write!(f, ": {}", Quoted::chain(error)),
                    None => Ok(()),
                }
            }
            PodState::Serving(Some(problem)) => write!(f, ": {problem}"),
            PodState::Exempt(reason) => write!(f, ": {reason}"),
            PodState::Failed(error) => write!(f, ": {}", Quoted::chain(error)),
            PodState::Serving(None) | PodState::Leaving => Ok(()),
        }
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
