//! The interface of the pods that are taken over: the fixed pod of `run`, or the pods of a node.

use std::fmt;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use super::{BUSY, OK, PREPARE_TIMEOUT, REFUSED, RULES};
use crate::process::pause_gate::{Pausable, PauseGate};

/// The pods that are taken over.
pub(crate) trait Subject {
    /// The requests that [`perform`](Self::perform) knows, as an error names them.
    const REQUESTS: &'static str;

    /// Performs a request of the new process; `None` if it is no valid one.
    fn perform(&mut self, request: &str) -> impl Future<Output = Option<Reply>>;

    /// Timeout for the next request.
    fn timeout(&self) -> Duration;

    /// Pauses the work that only one process may do, before the new process is ready.
    fn pause(&mut self) -> impl Future<Output = ()>;

    /// Finishes the work that would disturb the new process, before that learns of the completion.
    fn complete(&mut self) -> impl Future<Output = ()>;

    /// Resumes everything: the new process has failed.
    fn resume(&mut self);
}

/// The answer to a request.
pub(crate) struct Reply {
    pub(super) line: String,
    pub(super) attached: Vec<Attached>,
    /// Whether the request was progress, after which the new process has its whole time again.
    pub(super) is_progress: bool,
}

type Attached = Box<dyn AsFd + Send + Sync>;

impl Reply {
    /// The request is performed.
    pub(crate) fn done() -> Self {
        Self::new(OK.to_owned())
    }

    /// The request is refused, and the take-over fails.
    pub(crate) fn refused(reason: &str) -> Self {
        Self::new(format!("{REFUSED} {reason}"))
    }

    /// The request cannot be performed now, and the take-over fails.
    pub(crate) fn busy(reason: &str) -> Self {
        Self::new(format!("{BUSY} {reason}"))
    }

    /// A line, which contains no line break.
    pub(crate) fn new(line: String) -> Self {
        Self { line, attached: Vec::new(), is_progress: true }
    }

    /// The answer to a request that the new process repeats while it waits for something else.
    pub(crate) fn idle(line: String) -> Self {
        Self { is_progress: false, ..Self::new(line) }
    }

    /// Also passes these descriptors.
    pub(crate) fn with(mut self, attached: impl IntoIterator<Item = Attached>) -> Self {
        self.attached.extend(attached);
        self
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply")
            .field("line", &self.line)
            .field("attached", &self.attached.len())
            .finish()
    }
}

/// The work of `run` that only one of the two processes may do at a time.
#[derive(Debug, Clone)]
pub(crate) struct FixedPod {
    /// Accepting on all listeners, including readiness and metrics.
    pub(crate) accepting: Arc<dyn Pausable>,
    /// Repairing and testing the rules.
    pub(crate) rules: PauseGate,
}

impl Subject for FixedPod {
    const REQUESTS: &'static str = RULES;

    async fn perform(&mut self, request: &str) -> Option<Reply> {
        if request != RULES {
            return None;
        }
        self.rules.close().await;
        Some(Reply::done())
    }

    fn timeout(&self) -> Duration {
        PREPARE_TIMEOUT
    }

    async fn pause(&mut self) {
        self.rules.close().await;
        self.accepting.pause().await;
    }

    async fn complete(&mut self) {}

    fn resume(&mut self) {
        self.accepting.resume();
        self.rules.open();
    }
}
