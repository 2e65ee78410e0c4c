//! The status of a pod: its state, what it waits for, and why it is not served.

use std::fmt;

use tokio::time::Instant;
use underpass_config::{PodUid, Quoted};

use crate::pods::annotations::NotEnrolled;
use crate::pods::enrolment::{EnrolError, Trouble};

/// The status of a pod.
#[derive(Debug, Clone)]
pub(crate) struct PodStatus {
    pub(crate) uid: PodUid,
    /// `NAMESPACE/NAME`.
    pub(crate) pod: String,
    pub(crate) state: PodState,
}

/// The state of a pod.
#[derive(Debug, Clone)]
pub(crate) enum PodState {
    /// Not served yet.
    Pending {
        since: Instant,
        step: Step,
        error: Option<EnrolError>,
    },
    Serving(Option<Trouble>),
    /// Exempt.
    LeftAlone(NotEnrolled),
    /// Not served, and not tried again.
    Failed(EnrolError),
    /// Removed; its connections end.
    Leaving,
}

impl PodState {
    pub(crate) const PENDING: &'static str = "pending";
    pub(crate) const SERVING: &'static str = "serving";
    pub(crate) const LEFT_ALONE: &'static str = "left_alone";
    pub(crate) const FAILED: &'static str = "failed";
    pub(crate) const LEAVING: &'static str = "leaving";

    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Pending { .. } => Self::PENDING,
            Self::Serving(_) => Self::SERVING,
            Self::LeftAlone(_) => Self::LEFT_ALONE,
            Self::Failed(_) => Self::FAILED,
            Self::Leaving => Self::LEAVING,
        }
    }
}

/// The step that a pending pod waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Its turn.
    Queued,
    /// The end of the pod that had its namespace.
    Predecessor,
    /// The end of an attempt.
    Enrolling,
    /// The next attempt.
    BackOff,
}

impl fmt::Display for PodStatus {
    /// `shop/web-1 6f1b8a42 pending for 12 s: back-off: cannot ...`.
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
            PodState::Serving(Some(trouble)) => write!(f, ": {trouble}"),
            PodState::LeftAlone(reason) => write!(f, ": {reason}"),
            PodState::Failed(error) => write!(f, ": {}", Quoted::chain(error)),
            PodState::Serving(None) | PodState::Leaving => Ok(()),
        }
    }
}

impl Step {
    fn text(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Predecessor => "waiting for the pod that had its network namespace",
            Self::Enrolling => "enrolling",
            Self::BackOff => "waiting to try again",
        }
    }
}
