//! The self-test again: whenever any program has changed netfilter's rules, ip rules or routes.
//!
//! Our own rules can be intact while another program's, in front of them, let traffic past. The
//! proxy is unready for as long as the test fails. Foreign rules that act before ours are logged
//! when they change; most are harmless, so that they alone change nothing.

use std::convert::Infallible;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use underpass_config::InterceptionSettings;
use underpass_interception::{Changes, ForeignRule, InterceptionError, NamespaceAccess};

use crate::admin::endpoints::Readiness;
use crate::error::chain;
use crate::observe::metrics;
use crate::process::pause_gate::PauseGate;
use crate::rules::capture::{Capture, Probes};
use crate::rules::self_test::{SelfTest, SelfTestError};

/// Changes are over when nothing changed for this long.
const QUIET: Duration = Duration::from_millis(300);
/// The test does not wait longer than this for the end of changes.
const LONGEST_WAIT: Duration = Duration::from_secs(3);
/// The pause before the next test while the rules are not intact, or after a test that failed.
const RETRY: Duration = Duration::from_secs(1);

/// For each connection of the test. Nothing is served meanwhile that should be caught.
const DEADLINE: Duration = Duration::from_secs(3);

/// All that the test needs.
#[derive(Debug)]
pub(crate) struct Retest {
    pub(crate) capture: Capture,
    pub(crate) self_test: SelfTest,
    pub(crate) probes: Probes,
    pub(crate) settings: watch::Receiver<InterceptionSettings>,
    pub(crate) readiness: Readiness,
    /// Closed while another process takes over.
    pub(crate) gate: PauseGate,
    /// Of all programs, since before the test at the start; `None` if they cannot be watched.
    pub(crate) changes: Option<Changes>,
}

impl Retest {
    /// Tests after each change. Cancelling it ends it.
    pub(crate) async fn run(mut self) -> Infallible {
        let Some(mut changes) = self.changes.take() else {
            return std::future::pending().await;
        };
        let mut foreign = Vec::new();
        self.report_foreign(&mut foreign).await;
        let mut again = false;
        loop {
            if again {
                // A change meanwhile is no reason to test earlier.
                sleep(RETRY).await;
            } else if let Err(error) = changes.next().await {
                tracing::debug!(%error, "the kernel does not report changes");
                sleep(RETRY).await;
            }
            quiet(&mut changes).await;
            again = match self.gate.pass(self.test()).await {
                Some(passed) => !passed,
                None => true,
            };
            self.report_foreign(&mut foreign).await;
        }
    }

    /// Whether the test is done until the next change.
    async fn test(&self) -> bool {
        if self.readiness.are_rules_lost() {
            // They are repaired; the test would fail.
            return false;
        }
        let settings = self.settings.borrow().clone();
        let outcome = self.capture.test(&self.self_test, &self.probes, &settings, DEADLINE).await;
        let passed = match outcome {
            // For want of descriptors, for example: this says nothing about the rules.
            Err(error) if error.is_ours() => {
                let error = chain(&error);
                tracing::debug!(error, "the self-test cannot run again");
                return false;
            }
            Err(_) if self.readiness.are_rules_lost() => return false,
            Err(error) => {
                self.report_failure(&error).await;
                false
            }
            Ok(()) => true,
        };
        let had_failed = self.readiness.self_test_failed(!passed);
        metrics::self_test_passed(passed);
        if passed && had_failed {
            tracing::info!("the self-test of the rules passes again");
        }
        passed
    }

    /// Once for each series of failures.
    async fn report_failure(&self, error: &SelfTestError) {
        if self.readiness.has_self_test_failed() {
            return;
        }
        let suspects = self.capture.suspects().await.join("; ");
        let error = chain(error);
        tracing::error!(
            error,
            suspects,
            "the self-test of the rules failed: traffic may not be caught"
        );
    }

    async fn report_foreign(&self, known: &mut Vec<ForeignRule>) {
        let found = match self.capture.foreign_rules().await {
            Ok(found) => found,
            Err(error) => return tracing::debug!(%error, "foreign rules cannot be listed"),
        };
        metrics::foreign_rules(found.len());
        for rule in found.iter().filter(|rule| !known.contains(rule)) {
            tracing::warn!(
                location = rule.location,
                rule = rule.rule,
                effect = rule.effect.name(),
                "a rule of another program acts before the rules of underpass"
            );
        }
        *known = found;
    }
}

/// Subscribes to changes of all programs' rules in this namespace. Without them the self-test does
/// not run again.
pub(crate) async fn subscribe(access: &NamespaceAccess) -> Option<Changes> {
    let changes = Changes::of_all_programs(access).await;
    let warn = |error: &InterceptionError| {
        let error = chain(error);
        tracing::warn!(
            error,
            "the rules of other programs cannot be watched: the self-test does not run again"
        );
    };
    changes.inspect_err(warn).ok()
}

/// Waits until nothing changes any longer.
async fn quiet(changes: &mut Changes) {
    let deadline = Instant::now() + LONGEST_WAIT;
    let until_quiet = async { while let Ok(Ok(())) = timeout(QUIET, changes.next()).await {} };
    let _still_changing = timeout_at(deadline, until_quiet).await;
}
