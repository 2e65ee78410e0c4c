//! A pod in service: its rules are tested and watched.

use std::time::Duration;

use underpass_config::OnExit;

use super::rules::{OwnedRules, RulesOwner};
use crate::node::data_plane::ServedPod;
use crate::node::pod_error::PodError;
use crate::process::supervise::Task;
use crate::rules::capture::Capture;
use crate::traffic::listeners::ListenerInodes;

/// A pod in service. Dropping it closes its listeners and leaves the rules.
#[derive(Debug)]
pub(crate) struct ServingPod {
    served: Box<dyn ServedPod>,
    rules: OwnedRules,
    listeners: ListenerInodes,
    /// The task that repairs and tests the rules; `None` once the pod drains.
    watch: Option<Task>,
}

impl ServingPod {
    pub(super) fn new(
        served: Box<dyn ServedPod>,
        rules: OwnedRules,
        listeners: ListenerInodes,
        watch: Task,
    ) -> Self {
        Self { served, rules, listeners, watch: Some(watch) }
    }

    /// Its connections, in the data plane.
    pub(crate) fn served(&self) -> &dyn ServedPod {
        &*self.served
    }

    pub(crate) fn capture(&self) -> &Capture {
        &self.rules.capture
    }

    /// Fails if the installed rules differ from the current settings.
    pub(crate) async fn verify(&self) -> Result<(), PodError> {
        self.rules.capture.verify().await
    }

    /// Fails if a listener is closed, or the installed rules differ from the current settings.
    pub(crate) fn check(&self) -> impl Future<Output = Result<(), PodError>> + Send + use<> {
        let (capture, listeners) = (self.capture().clone(), self.listeners.clone());
        async move {
            let open = capture.access().listening().await?;
            match listeners.closed(&open) {
                Some((purpose, setting)) => Err(PodError::ListenerClosed { purpose, setting }),
                None => capture.verify().await,
            }
        }
    }

    /// Installs the rules again if they differ from the current settings.
    ///
    /// # Errors
    ///
    /// The kernel rejected the operation.
    pub(crate) async fn restore_rules(&self) -> Result<(), PodError> {
        self.rules.capture.install(Duration::ZERO).await
    }

    /// Leaves the rules to the process that has taken over.
    pub(crate) fn disown_rules(&mut self) {
        self.rules.owner = RulesOwner::OtherProcess;
    }

    /// Closes the listeners and stops watching the rules. Open connections continue; tunnels accept
    /// no new streams.
    pub(crate) async fn stop_accepting(&mut self) {
        self.watch = None;
        self.served.stop_accepting().await;
    }

    /// Waits until `deadline` for the end of the connections, and terminates the rest. Returns the
    /// number of terminated ones. Cancel-safe until the deadline.
    pub(crate) async fn drain(&self, deadline: Duration) -> usize {
        self.served.drain(deadline).await
    }

    /// Terminates the remaining connections, closes the tunnels and sockets, and keeps or removes
    /// the rules.
    ///
    /// # Errors
    ///
    /// The rules cannot be kept or removed according to `interception.on_exit`.
    pub(crate) async fn leave(self) -> Result<(), PodError> {
        let on_exit = self.rules.capture.on_exit();
        self.leave_with(on_exit).await
    }

    /// Like [`leave`](Self::leave), with `on_exit` instead of the setting.
    ///
    /// # Errors
    ///
    /// The rules cannot be kept or removed.
    pub(crate) async fn leave_with(self, on_exit: OnExit) -> Result<(), PodError> {
        let Self { served, rules, watch, .. } = self;
        drop(watch);
        served.stop_accepting().await;
        served.close().await;
        rules.leave(on_exit).await
    }
}
