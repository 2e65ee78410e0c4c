//! A pod that is served: its rules are tested and watched.

use std::time::Duration;

use underpass_config::OnExit;

use super::rules::{OwnedRules, RulesOwner};
use crate::node::data_plane::{CertificateState, ServedPod};
use crate::node::pod_error::PodError;
use crate::process::supervise::Task;
use crate::rules::capture::Capture;

/// A pod that is served. Dropping it closes its listeners and leaves the rules.
#[derive(Debug)]
pub(crate) struct ServingPod {
    served: Box<dyn ServedPod>,
    rules: OwnedRules,
    /// Repairs and tests the rules; `None` once the pod drains.
    watch: Option<Task>,
}

impl ServingPod {
    pub(super) fn new(served: Box<dyn ServedPod>, rules: OwnedRules, watch: Task) -> Self {
        Self { served, rules, watch: Some(watch) }
    }

    /// The state of its certificate.
    pub(crate) fn certificate(&self) -> CertificateState {
        self.served.certificate()
    }

    /// The rules and the means to change them.
    pub(crate) fn capture(&self) -> &Capture {
        &self.rules.capture
    }

    /// Fails if the rules are not those of the current settings.
    pub(crate) async fn verify(&self) -> Result<(), PodError> {
        self.rules.capture.verify().await
    }

    /// Installs the rules again if they differ.
    ///
    /// # Errors
    ///
    /// The kernel rejected the operation.
    pub(crate) async fn restore_rules(&self) -> Result<(), PodError> {
        self.rules.capture.install().await
    }

    /// Leaves the rules to the process that has taken over.
    pub(crate) fn disown_rules(&mut self) {
        self.rules.owner = RulesOwner::OtherProcess;
    }

    /// Closes the listeners and stops watching the rules. Open connections go on; tunnels take no
    /// new streams.
    pub(crate) async fn stop_accepting(&mut self) {
        self.watch = None;
        self.served.stop_accepting().await;
    }

    /// Waits until `deadline` for the end of the connections, and terminates the rest. Returns how
    /// many. Cancel-safe until the deadline.
    pub(crate) async fn drain(&self, deadline: Duration) -> usize {
        self.served.drain(deadline).await
    }

    /// Terminates the connections that are left, closes the tunnels and sockets, and keeps or
    /// removes the rules.
    ///
    /// # Errors
    ///
    /// The rules cannot be left as `interception.on_exit` says.
    pub(crate) async fn leave(self) -> Result<(), PodError> {
        let on_exit = self.rules.capture.on_exit();
        self.leave_with(on_exit).await
    }

    /// As [`leave`](Self::leave), with another treatment of the rules than that of the settings.
    ///
    /// # Errors
    ///
    /// The rules cannot be kept or removed.
    pub(crate) async fn leave_with(self, on_exit: OnExit) -> Result<(), PodError> {
        let Self { served, rules, watch } = self;
        drop(watch);
        served.stop_accepting().await;
        served.close().await;
        rules.leave(on_exit).await
    }
}
