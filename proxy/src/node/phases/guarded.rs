//! A pod whose rules are installed.

use std::sync::Arc;
use std::time::Duration;

use super::open::OpenPod;
use super::rules::OwnedRules;
use super::serving::ServingPod;
use crate::node::identities::CredentialLease;
use crate::node::pod::Pod;
use crate::node::pod_error::PodError;
use crate::node::workers::Workers;
use crate::process::pause_gate::PauseGate;
use crate::rules::capture::{Capture, Probes};
use crate::rules::health::RulesHealth;
use crate::rules::watch::Subscriptions;
use crate::traffic::listeners::{Kind, Listeners};

/// A pod whose rules are installed: its connections wait in the accept queues of its listeners.
/// Dropping it leaves the rules.
#[derive(Debug)]
pub(crate) struct GuardedPod {
    pod: Pod,
    rules: OwnedRules,
    listeners: Listeners<Kind>,
    probes: Probes,
    health: RulesHealth,
}

impl GuardedPod {
    /// Opens the sockets of the self-test, which must happen before the process becomes the proxy's
    /// user.
    pub(super) async fn new(
        pod: Pod,
        rules: OwnedRules,
        listeners: Listeners<Kind>,
        health: RulesHealth,
    ) -> Result<Self, PodError> {
        match rules.capture.probes().await {
            Ok(probes) => Ok(Self { pod, rules, listeners, probes, health }),
            Err(error) => Err(rules.leave_after(error).await),
        }
    }

    /// The rules and the means to change them.
    pub(crate) fn capture(&self) -> &Capture {
        &self.rules.capture
    }

    /// Whether the credentials of its tunnels are set.
    pub(crate) fn has_credentials(&self) -> bool {
        self.pod.credentials.is_some()
    }

    /// Sets the credentials that its tunnels use.
    pub(crate) fn set_credentials(&mut self, credentials: Option<CredentialLease>) {
        self.pod.credentials = credentials;
    }

    /// Gives the listeners to the workers, which accept connections from now on.
    ///
    /// # Errors
    ///
    /// Changes of the rules cannot be watched, or the workers cannot accept; the rules are left.
    pub(crate) async fn open(self, workers: &Workers) -> Result<OpenPod, PodError> {
        let Self { pod, rules, listeners, probes, health } = self;
        // Subscribes before the self-test, so that no change after the test is missed.
        let subscribed = match Subscriptions::new(&rules.capture).await {
            Ok(subscribed) => subscribed,
            Err(error) => return Err(rules.leave_after(error).await),
        };
        let pod = Arc::new(pod);
        let added = workers.add_listeners(&pod, listeners.into_kinds()).await;
        let open = OpenPod::new(pod, workers.clone(), rules, probes, subscribed, health);
        match added {
            Ok(()) => Ok(open),
            Err(error) => Err(open.abandon(Duration::ZERO, PodError::Accept(error)).await),
        }
    }

    /// Opens the pod, tests its rules and watches them. `gate` pauses the repair of rules.
    ///
    /// # Errors
    ///
    /// The rules do not catch the traffic: the connections are terminated and the rules are left.
    pub(crate) async fn serve(
        self,
        workers: &Workers,
        gate: PauseGate,
    ) -> Result<ServingPod, PodError> {
        let open = self.open(workers).await?;
        match open.test().await {
            Ok(()) => Ok(open.watch(gate)),
            Err(error) => Err(open.abandon(Duration::ZERO, error).await),
        }
    }

    /// Closes the listeners, and keeps or removes the rules.
    ///
    /// # Errors
    ///
    /// The rules cannot be left as `interception.on_exit` says.
    pub(crate) async fn leave(self) -> Result<(), PodError> {
        let rules = self.close();
        let on_exit = rules.capture.on_exit();
        rules.leave(on_exit).await
    }

    /// Closes the listeners, and keeps or removes the rules, after `error`, which is returned.
    pub(crate) async fn abandon<E>(self, error: E) -> E {
        self.close().leave_after(error).await
    }

    fn close(self) -> OwnedRules {
        self.rules
    }
}
