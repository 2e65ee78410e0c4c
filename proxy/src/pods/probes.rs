//! Maintains rules in the host's namespace for kubelet probes (`node.probes: translate`). They give
//! the node's connections to its own pods a source address that the pods' rules exempt.
//!
//! The interception crate defines these rules, and the exemption in each pod
//! (`interception.kubelet_probes`).

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use underpass_config::OnExit;
use underpass_interception::{Changes, HostPlan, HostRules, InterceptionError, NamespaceAccess};

use crate::error::chain;
use crate::process::pause_gate::PauseGate;

/// The minimum interval of checks after changes by other programs, some of which replace rules of
/// the host continuously.
const MIN_CHECK_INTERVAL: Duration = Duration::from_millis(250);
/// The delay after a failure.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// The rules for kubelet probes in the host's namespace.
#[derive(Debug)]
pub(crate) struct ProbeTranslation {
    access: NamespaceAccess,
    rules: HostRules,
    changes: Changes,
    pods: watch::Receiver<BTreeSet<IpAddr>>,
    /// The last installed rules.
    applied: Option<HostPlan>,
    /// The last error, to report it once.
    error: Option<String>,
    /// Closed while another process takes over.
    gate: PauseGate,
}

impl ProbeTranslation {
    /// Installs the rules in the namespace of `access`, which must be the host's.
    ///
    /// # Errors
    /// The capability NET_ADMIN is missing, or the kernel lacks nf_tables or rejects the
    /// rules.
    pub(crate) async fn start(
        access: NamespaceAccess,
        pods: watch::Receiver<BTreeSet<IpAddr>>,
        gate: PauseGate,
    ) -> Result<Self, InterceptionError> {
        let rules = HostRules::prepare(access.clone()).await?;
        let changes = rules.changes().await?;
        let mut started = Self { access, rules, changes, pods, applied: None, error: None, gate };
        started.reconcile().await?;
        Ok(started)
    }

    /// The rules, to remove them at the end.
    pub(crate) fn rules(&self) -> HostRules {
        self.rules.clone()
    }

    /// Updates the rules when pods change, and repairs changes by other programs. Returns when
    /// the registry of pods is dropped.
    pub(crate) async fn run(mut self) {
        let gate = self.gate.clone();
        let mut have_only_pods_changed = false;
        let mut next_check = Instant::now();
        loop {
            let access = self.access.clone();
            let follow = self.follow(have_only_pods_changed);
            let Some(outcome) = gate.pass_until(follow, access.finish()).await else {
                have_only_pods_changed = false;
                continue;
            };
            let failed = self.report(outcome);
            // Pods that change all the time do not postpone the next check.
            if failed || !have_only_pods_changed {
                let pause = if failed { RETRY_DELAY } else { MIN_CHECK_INTERVAL };
                next_check = Instant::now() + pause;
            }
            let (changes, rules) = (&mut self.changes, &self.rules);
            let changed = async {
                sleep_until(next_check).await;
                if !failed && changes.next().await.is_err() {
                    // The kernel ended the subscription. If the renewal fails too, the next
                    // check fails and reports it.
                    if let Ok(renewed) = rules.changes().await {
                        *changes = renewed;
                    }
                }
            };
            have_only_pods_changed = tokio::select! {
                changed = self.pods.changed() => match changed {
                    Ok(()) => !failed,
                    Err(_) => return,
                },
                () = changed => false,
            };
        }
    }

    /// Updates the rules. If only pods have changed, only their addresses are replaced:
    /// notifications report changes of the rules, which are then verified.
    async fn follow(&mut self, have_only_pods_changed: bool) -> Result<(), InterceptionError> {
        if let Some(old) = self.applied.clone().filter(|_| have_only_pods_changed) {
            let new = self.plan();
            if let Ok(true) = self.rules.update(old, new.clone()).await {
                self.applied = Some(new);
                return Ok(());
            }
        }
        self.reconcile().await
    }

    fn plan(&mut self) -> HostPlan {
        HostPlan::new(self.pods.borrow_and_update().iter().copied())
    }

    async fn reconcile(&mut self) -> Result<(), InterceptionError> {
        let plan = self.plan();
        let Some(difference) = self.rules.verify(plan.clone()).await? else { return Ok(()) };
        self.rules.apply(plan.clone()).await?;
        if self.applied.as_ref() == Some(&plan) {
            let (missing, unexpected) = difference.missing_and_unexpected();
            tracing::warn!(
                missing,
                unexpected,
                "another program changed the rules for kubelet probes in the host's namespace: repaired"
            );
        } else {
            let pods = plan.pods().len();
            tracing::debug!(pods, "installed the rules for kubelet probes");
        }
        self.applied = Some(plan);
        Ok(())
    }

    /// Reports a new error once, and the recovery. Returns whether the outcome is an error.
    fn report(&mut self, outcome: Result<(), InterceptionError>) -> bool {
        let error = outcome.err().map(|error| chain(&error));
        match &error {
            Some(error) if self.error.as_ref() != Some(error) => {
                let hint =
                    "strict pods refuse the kubelet's probes meanwhile; underpass tries again";
                tracing::error!(error, hint, "cannot install the rules for kubelet probes");
            }
            None if self.error.is_some() => {
                tracing::info!("the rules for kubelet probes are installed again");
            }
            Some(_) | None => {}
        }
        self.error = error;
        self.error.is_some()
    }
}

/// Removes the rules of a process that was taken over, if it had any.
pub(crate) async fn remove_rules(access: NamespaceAccess) {
    // Without nf_tables there are none.
    if let Ok(rules) = HostRules::prepare(access).await {
        leave(&rules, OnExit::Remove).await;
    }
}

/// Removes the rules at the end, unless `interception.on_exit` keeps the pods' rules.
pub(crate) async fn leave(rules: &HostRules, on_exit: OnExit) {
    if on_exit == OnExit::Keep {
        return;
    }
    if let Err(error) = rules.remove().await {
        let hint = "remove them with `nft delete table inet underpass_host`";
        tracing::error!(error = chain(&error), hint, "cannot remove the rules for kubelet probes");
    }
}
