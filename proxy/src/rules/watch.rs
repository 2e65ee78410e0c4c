//! Watches the rules of one pod in one task: repairs them, repeats the self-test, and counts exempt
//! probes.

use std::sync::Arc;
use std::time::Duration;

use underpass_interception::{Changes, InterceptionError};

use underpass_config::Hint as _;

use crate::error::chain;
use crate::node::pod_error::PodError;
use crate::observe::metrics;
use crate::process::pause_gate::PauseGate;
use crate::rules::capture::{Capture, SelfTestSockets};
use crate::rules::health::RulesHealth;
use crate::rules::kubelet_probes;
use crate::rules::reconciler::{Event, RuleReconciler};
use crate::rules::retest;
use crate::rules::retest::Retest;
use crate::rules::self_test::Arrivals;

/// Watches the rules of one pod.
#[derive(Debug, Clone)]
pub(crate) struct RuleWatch {
    capture: Capture,
    health: RulesHealth,
    /// Closed while another process takes over.
    gate: PauseGate,
    retest: Retest,
}

/// Subscriptions to changes of the rules.
#[derive(Debug)]
pub(crate) struct Subscriptions {
    /// `None` if this proxy does not repair the rules.
    reconciler: Option<RuleReconciler>,
    /// Changes by all programs; `None` if they cannot be watched.
    changes: Option<Changes>,
}

impl Subscriptions {
    pub(crate) async fn new(capture: &Capture) -> Result<Self, PodError> {
        let changes = retest::subscribe(capture.access()).await;
        Ok(Self { reconciler: capture.reconciler().await?, changes })
    }
}

impl RuleWatch {
    pub(crate) fn new(
        capture: Capture,
        arrivals: Arc<dyn Arrivals>,
        probes: SelfTestSockets,
        health: RulesHealth,
        gate: PauseGate,
    ) -> Self {
        let retest = Retest {
            capture: capture.clone(),
            arrivals,
            probes: Arc::new(probes),
            health: health.clone(),
            gate: gate.clone(),
        };
        Self { capture, health, gate, retest }
    }

    /// Watches the rules. Never returns. `None` for `subscribed` means that an earlier run failed:
    /// the rules then count as lost until they are verified.
    pub(crate) async fn run(self, subscribed: Option<Subscriptions>) {
        let subscribed = match subscribed {
            Some(subscribed) => Ok(subscribed),
            None => self.subscribe_again().await,
        };
        let Subscriptions { reconciler, changes } = match subscribed {
            Ok(subscribed) => subscribed,
            Err(error) => {
                let (error, hint) = (chain(&error), error.hint());
                return tracing::error!(error, hint = hint.as_deref(), "cannot watch the rules");
            }
        };
        let probes = kubelet_probes::watch(self.capture.exempting_probes());
        tokio::join!(self.reconcile(reconciler), self.retest.run(changes), probes);
        std::future::pending().await
    }

    async fn subscribe_again(&self) -> Result<Subscriptions, PodError> {
        let mut subscribed = Subscriptions::new(&self.capture).await?;
        if let Some(reconciler) = &mut subscribed.reconciler {
            self.health.set_intact(false);
            reconciler.assume_lost();
        }
        Ok(subscribed)
    }

    /// Runs the reconciler and applies changed settings. Never returns.
    async fn reconcile(&self, reconciler: Option<RuleReconciler>) {
        let Some(mut reconciler) = reconciler else { return };
        let mut settings = self.capture.current_settings();
        let access = reconciler.access();
        let mut has_failed = false;
        loop {
            // The gate waits for a started repair, because until its end no other process may
            // change the rules.
            let next = reconciler.next(&mut settings);
            let Some(event) = self.gate.pass_until(next, access.finish()).await else {
                // The process that tried to take over may have changed the rules.
                reconciler.verify_now();
                continue;
            };
            report(&event, has_failed);
            has_failed = matches!(event, Event::Failed { .. });
            if matches!(event, Event::Repaired { .. }) {
                self.health.repaired();
            }
            self.health.set_intact(event.is_intact());
        }
    }
}

/// Logs a failure, as an error if it is `repeated`. The first one can be the end of the pod:
/// container runtimes disable the loopback interface of a pod before they delete it.
fn report_failure(error: &InterceptionError, pause: Duration, repeated: bool) {
    let (error, hint) = (chain(error), error.hint());
    if repeated {
        tracing::error!(
            error,
            hint = hint.as_deref(),
            ?pause,
            "cannot watch or repair the rules, retrying"
        );
    } else {
        tracing::debug!(error, ?pause, "cannot watch or repair the rules once");
    }
}

/// Logs and counts an event. `has_failed`: the event before was a failure.
fn report(event: &Event, has_failed: bool) {
    match event {
        Event::Repaired { difference, took, fight } => {
            let (missing, unexpected) = difference.missing_and_unexpected();
            metrics::rules_repaired();
            if *fight {
                tracing::debug!(
                    missing,
                    unexpected,
                    ?took,
                    "repaired the rules again: another program changes them repeatedly"
                );
            } else {
                tracing::warn!(
                    missing,
                    unexpected,
                    ?took,
                    hint = "find that program: the level debug logs what it changed",
                    "repaired the rules, which another program had changed"
                );
            }
            tracing::debug!(
                "difference between the installed and the planned rules:\n{difference}"
            );
        }
        Event::Followed { rules, .. } => {
            tracing::info!(rules, "applied the changed settings to the rules atomically");
        }
        Event::Intact => {
            tracing::info!(
                "the rules are intact again: the workload's traffic is no longer blocked"
            );
        }
        Event::Fight { difference } => {
            let (missing, unexpected) = difference.missing_and_unexpected();
            tracing::error!(
                missing,
                unexpected,
                hint = "stop that program, or set interception.profile: none",
                "another program changes the rules repeatedly: the workload's traffic is blocked until it stops\n{difference}"
            );
        }
        Event::Failed { error, pause } => report_failure(error, *pause, has_failed),
    }
}
