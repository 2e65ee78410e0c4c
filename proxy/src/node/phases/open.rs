//! A pod that accepts connections, before the self-test of its rules.

use std::time::Duration;

use tracing::{Instrument as _, Span};

use super::rules::{OwnedRules, RulesOwner};
use super::serving::ServingPod;
use crate::node::data_plane::ServedPod;
use crate::node::pod_error::PodError;
use crate::process::pause_gate::PauseGate;
use crate::process::supervise;
use crate::rules::capture::SelfTestSockets;
use crate::rules::health::RulesHealth;
use crate::rules::kubelet_probes;
use crate::rules::watch::{RuleWatch, Subscriptions};
use crate::traffic::listeners::ListenerInodes;

/// A pod that accepts connections, before the self-test of its rules.
#[derive(Debug)]
pub(crate) struct OpenPod {
    pub(super) served: Box<dyn ServedPod>,
    pub(super) rules: OwnedRules,
    pub(super) listeners: ListenerInodes,
    pub(super) probes: SelfTestSockets,
    pub(super) subscribed: Subscriptions,
    pub(super) health: RulesHealth,
}

impl OpenPod {
    /// Tests whether the rules direct connections to the listeners.
    ///
    /// # Errors
    ///
    /// They do not, or the test cannot run.
    pub(crate) async fn test(&self) -> Result<(), PodError> {
        let arrivals = self.served.arrivals();
        let is_tested = self.rules.capture.test_at_start(&*arrivals, &self.probes).await?;
        self.health.set_self_tested(is_tested);
        Ok(())
    }

    /// Makes this process the owner of the rules, after the process that it takes over from has
    /// agreed.
    pub(crate) fn own_rules(&mut self) {
        self.rules.owner = RulesOwner::ThisProcess;
    }

    /// Starts to watch the rules. `gate` pauses their repair.
    pub(crate) fn watch(self, gate: PauseGate) -> ServingPod {
        let Self { served, rules, listeners, probes, subscribed, health } = self;
        kubelet_probes::warn(&rules.capture.current_settings().borrow());
        let watch = RuleWatch::new(rules.capture.clone(), served.arrivals(), probes, health, gate);
        let (mut subscribed, span) = (Some(subscribed), Span::current());
        let task = supervise::restarting("watch of the rules", move || {
            watch.clone().run(subscribed.take()).instrument(span.clone())
        });
        ServingPod::new(served, rules, listeners, task)
    }

    /// Drains the connections until `deadline`, and keeps or removes the rules. Returns `error`,
    /// the reason.
    pub(crate) async fn abandon<E>(self, deadline: Duration, error: E) -> E {
        let Self { served, rules, .. } = self;
        served.stop_accepting().await;
        served.drain(deadline).await;
        served.close().await;
        rules.leave_after(error).await
    }
}
