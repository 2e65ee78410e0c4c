//! Repeats the self-test after any program has changed netfilter rules, ip rules or routes.
//!
//! Even if the proxy's rules are intact, another program's rules can act before them and let
//! traffic bypass the proxy. The proxy is unready while the test fails. Foreign rules are logged
//! when they change. Most are harmless, so they do not affect readiness.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout, timeout_at};
use underpass_interception::{Changes, ForeignRule, InterceptionError, NamespaceAccess};

use underpass_config::Hint as _;

use crate::error::chain;
use crate::process::pause_gate::PauseGate;
use crate::rules::capture::{Capture, SelfTestSockets};
use crate::rules::health::RulesHealth;
use crate::rules::self_test::{Arrivals, SelfTestError};

/// The time without changes that ends a series of changes.
const SETTLE_TIME: Duration = Duration::from_millis(300);
/// The maximum wait for the end of a series of changes.
const MAX_SETTLE_TIME: Duration = Duration::from_secs(3);
/// The pause before the next test while the rules are not intact, or after a failed test.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// Timeout for each connection of the test.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(3);

/// Repeats the self-test of one pod.
#[derive(Debug, Clone)]
pub(crate) struct Retest {
    pub(crate) capture: Capture,
    pub(crate) arrivals: Arc<dyn Arrivals>,
    pub(crate) probes: Arc<SelfTestSockets>,
    pub(crate) health: RulesHealth,
    /// Closed while another process takes over.
    pub(crate) gate: PauseGate,
}

impl Retest {
    /// Tests after each change. Never returns. `changes` reports changes by all programs since
    /// before the last test; `None` if they cannot be watched.
    pub(crate) async fn run(&self, changes: Option<Changes>) {
        let Some(mut changes) = changes else { return };
        let mut foreign = Vec::new();
        self.report_foreign(&mut foreign).await;
        let mut must_repeat = false;
        loop {
            if must_repeat {
                // Changes during the pause do not shorten it.
                sleep(RETRY_DELAY).await;
            } else if let Err(error) = changes.next().await {
                tracing::debug!(%error, "the kernel does not report changes of the rules");
                sleep(RETRY_DELAY).await;
            }
            until_settled(&mut changes).await;
            must_repeat = match self.gate.pass(self.test()).await {
                Some(passed) => !passed,
                None => true,
            };
            self.report_foreign(&mut foreign).await;
        }
    }

    /// Compares rules that no reconciler repairs, and logs when they are changed.
    async fn compare_unrepaired(&self) {
        if self.capture.repairs() {
            return;
        }
        let difference = match self.capture.difference().await {
            Ok(difference) => difference,
            // For example, this process has kept no capability.
            Err(error) => return tracing::debug!(%error, "cannot read the rules"),
        };
        let were_changed = self.health.set_unrepaired(difference.is_some());
        match difference {
            Some(difference) if !were_changed => {
                let (missing, unexpected) = difference.missing_and_unexpected();
                tracing::error!(
                    missing,
                    unexpected,
                    hint =
                        "find that program, and restart the proxy, which installs its rules again",
                    "another program has changed the rules, and interception.repair is off: traffic may bypass the proxy\n{difference}"
                );
            }
            None if were_changed => tracing::info!("the rules are as planned again"),
            _ => {}
        }
    }

    /// Runs the test. Returns `false` if it must be repeated without waiting for a change.
    async fn test(&self) -> bool {
        self.compare_unrepaired().await;
        if self.health.are_lost() {
            // The test would fail until the reconciler has repaired the rules.
            return false;
        }
        let outcome = self.capture.test(&*self.arrivals, &self.probes, CONNECTION_TIMEOUT).await;
        let passed = match outcome {
            // For example, no file descriptors are left: no failure of the rules.
            Err(error) if error.could_not_run() => {
                let (error, hint) = (chain(&error), error.hint());
                tracing::debug!(error, hint = hint.as_deref(), "cannot repeat the self-test");
                return false;
            }
            Err(_) if self.health.are_lost() => return false,
            Err(error) => {
                self.report_failure(&error).await;
                false
            }
            Ok(is_tested) => {
                self.health.set_self_tested(is_tested);
                true
            }
        };
        let had_failed = self.health.set_self_test_failed(!passed);
        if passed && had_failed {
            tracing::info!("the self-test of the rules passes again");
        }
        passed
    }

    /// Logs the first failure of a series.
    async fn report_failure(&self, error: &SelfTestError) {
        if self.health.has_self_test_failed() {
            return;
        }
        let suspects = self.capture.suspects().await.join("; ");
        let (error, hint) = (chain(error), error.hint());
        tracing::error!(
            error,
            hint = hint.as_deref(),
            suspects,
            "the self-test of the rules failed: traffic may not be caught"
        );
    }

    async fn report_foreign(&self, known: &mut Vec<ForeignRule>) {
        let found = match self.capture.foreign_rules().await {
            Ok(found) => found,
            Err(error) => return tracing::debug!(%error, "cannot list foreign rules"),
        };
        self.health.set_foreign_rules(found.len());
        for rule in found.iter().filter(|rule| !known.contains(rule)) {
            tracing::warn!(
                location = rule.location,
                rule = rule.rule,
                effect = rule.effect.name(),
                "a rule of another program precedes the rules of underpass"
            );
        }
        *known = found;
    }
}

/// Subscribes to changes of all programs' rules in this namespace. Without a subscription the
/// self-test is not repeated.
pub(crate) async fn subscribe(access: &NamespaceAccess) -> Option<Changes> {
    let changes = Changes::of_all_programs(access).await;
    let warn = |error: &InterceptionError| {
        let (error, hint) = (chain(error), error.hint());
        tracing::warn!(
            error,
            hint = hint.as_deref(),
            "cannot watch the rules of other programs: the self-test is not repeated"
        );
    };
    changes.inspect_err(warn).ok()
}

/// Waits for the end of a series of changes, at most for [`MAX_SETTLE_TIME`].
async fn until_settled(changes: &mut Changes) {
    let deadline = Instant::now() + MAX_SETTLE_TIME;
    let no_change = async { while let Ok(Ok(())) = timeout(SETTLE_TIME, changes.next()).await {} };
    let _still_changing = timeout_at(deadline, no_change).await;
}
