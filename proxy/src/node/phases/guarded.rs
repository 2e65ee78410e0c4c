//! A pod with installed rules.

use std::time::Duration;

use super::open::OpenPod;
use super::rules::OwnedRules;
use super::serving::ServingPod;
use crate::node::data_plane::{DataPlane, PodToServe};
use crate::node::pod_error::PodError;
use crate::process::pause_gate::PauseGate;
use crate::rules::capture::{Capture, SelfTestSockets};
use crate::rules::health::RulesHealth;
use crate::rules::watch::Subscriptions;

/// A pod whose rules are installed. Its connections wait in the accept queues of its listeners.
/// Dropping it leaves the rules.
#[derive(Debug)]
pub(crate) struct GuardedPod {
    pod: PodToServe,
    rules: OwnedRules,
    probes: SelfTestSockets,
    health: RulesHealth,
}

impl GuardedPod {
    /// Opens the sockets of the self-test. They need privileges, so this precedes the change to the
    /// proxy's user.
    pub(super) async fn new(
        pod: PodToServe,
        rules: OwnedRules,
        health: RulesHealth,
    ) -> Result<Self, PodError> {
        match rules.capture.probes().await {
            Ok(probes) => Ok(Self { pod, rules, probes, health }),
            Err(error) => Err(rules.leave_after(error).await),
        }
    }

    pub(crate) fn capture(&self) -> &Capture {
        &self.rules.capture
    }

    /// Gives the listeners to the data plane, which then accepts connections.
    ///
    /// # Errors
    ///
    /// Changes of the rules cannot be watched, or the data plane cannot accept. The rules are kept
    /// or removed.
    pub(crate) async fn open(self, data_plane: &dyn DataPlane) -> Result<OpenPod, PodError> {
        let Self { pod, rules, probes, health } = self;
        // Subscribe before the self-test, so that no change after the test is missed.
        let subscribed = match Subscriptions::new(&rules.capture).await {
            Ok(subscribed) => subscribed,
            Err(error) => return Err(rules.leave_after(error).await),
        };
        let listeners = match pod.listeners.inodes() {
            Ok(listeners) => listeners,
            Err(error) => return Err(rules.leave_after(PodError::Accept(error)).await),
        };
        match data_plane.serve(pod).await {
            Ok(served) => Ok(OpenPod { served, rules, listeners, probes, subscribed, health }),
            Err(error) => Err(rules.leave_after(error).await),
        }
    }

    /// Opens the pod, tests its rules and watches them. `gate` pauses the repair of rules.
    ///
    /// # Errors
    ///
    /// The rules do not catch the traffic. The connections are terminated, and the rules are kept
    /// or removed.
    pub(crate) async fn serve(
        self,
        data_plane: &dyn DataPlane,
        gate: PauseGate,
    ) -> Result<ServingPod, PodError> {
        let open = self.open(data_plane).await?;
        match open.test().await {
            Ok(()) => Ok(open.watch(gate)),
            Err(error) => Err(open.abandon(Duration::ZERO, error).await),
        }
    }

    /// Closes the listeners, and keeps or removes the rules.
    ///
    /// # Errors
    ///
    /// The rules cannot be kept or removed according to `interception.on_exit`.
    pub(crate) async fn leave(self) -> Result<(), PodError> {
        let rules = self.close();
        let on_exit = rules.capture.on_exit();
        rules.leave(on_exit).await
    }

    /// Closes the listeners, and keeps or removes the rules. Returns `error`, the reason.
    pub(crate) async fn abandon<E>(self, error: E) -> E {
        self.close().leave_after(error).await
    }

    fn close(self) -> OwnedRules {
        self.rules
    }
}
