//! The installed rules of a pod, and which process they belong to.

use underpass_config::{Hint as _, OnExit};

use crate::node::pod_error::PodError;
use crate::rules::capture::Capture;

/// Which process keeps or removes the rules at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RulesOwner {
    ThisProcess,
    /// The process that this one takes over from, or that has taken over from this one.
    OtherProcess,
}

/// The installed rules of a pod.
#[derive(Debug)]
pub(super) struct OwnedRules {
    pub(super) capture: Capture,
    pub(super) owner: RulesOwner,
}

impl OwnedRules {
    /// Keeps or removes the rules.
    pub(super) async fn leave(self, on_exit: OnExit) -> Result<(), PodError> {
        match self.owner {
            RulesOwner::ThisProcess => self.capture.leave(on_exit).await,
            RulesOwner::OtherProcess => {
                tracing::info!("the rules belong to another process, and stay");
                Ok(())
            }
        }
    }

    /// Leaves the rules as `interception.on_exit` says, after `cause`, which is returned.
    pub(super) async fn leave_after<E>(self, cause: E) -> E {
        let on_exit = self.capture.on_exit();
        if let Err(left) = self.leave(on_exit).await {
            let (error, hint) = (crate::error::chain(&left), left.hint());
            let hint = hint.as_deref();
            tracing::error!(error, hint, "cannot leave the rules as interception.on_exit says");
        }
        cause
    }
}
