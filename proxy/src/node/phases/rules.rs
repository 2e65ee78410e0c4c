//! The installed rules of a pod, and the process that owns them.

use underpass_config::{Hint as _, OnExit};

use crate::node::pod_error::PodError;
use crate::rules::capture::Capture;

/// The process that keeps or removes the rules at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RulesOwner {
    ThisProcess,
    /// The other process of a take-over.
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
                tracing::info!("keeping the rules: another process owns them");
                Ok(())
            }
        }
    }

    /// Keeps or removes the rules according to `interception.on_exit`. Returns `cause`, the reason.
    pub(super) async fn leave_after<E>(self, cause: E) -> E {
        let on_exit = self.capture.on_exit();
        if let Err(failure) = self.leave(on_exit).await {
            let (error, hint) = (crate::error::chain(&failure), failure.hint());
            let hint = hint.as_deref();
            tracing::error!(
                error,
                hint,
                "cannot keep or remove the rules according to interception.on_exit"
            );
        }
        cause
    }
}
