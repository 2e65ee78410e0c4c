//! Keeps the rules in the host's namespace that give the node's own connections to its pods the
//! source address of kubelet probes (`node.probes: translate`).
//!
//! Not here: the rules (the interception crate), and the exemption of that address in each pod
//! (`interception.kubelet_probes`).

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use underpass_config::OnExit;
use underpass_interception::{Changes, HostPlan, HostRules, InterceptionError, NamespaceAccess};

use crate::error::chain;

/// The minimum time between checks for changes by other programs: some replace rules of the host
/// all the time.
const PAUSE: Duration = Duration::from_millis(250);
/// The pause after a failure.
const RETRY: Duration = Duration::from_secs(1);

/// The rules in the host's namespace, for the pods that are served.
#[derive(Debug)]
pub(crate) struct ProbeTranslation {
    rules: HostRules,
    changes: Changes,
    pods: watch::Receiver<BTreeSet<IpAddr>>,
    /// The rules that were installed last.
    applied: Option<HostPlan>,
    /// The last error, which is reported once.
    error: Option<String>,
}

impl ProbeTranslation {
    /// Installs the rules in the namespace of `access`, which must be that of the node's own
    /// sockets.
    ///
    /// # Errors
    /// The capability NET_ADMIN is missing, or the kernel lacks nf_tables or refuses.
    pub(crate) async fn start(
        access: NamespaceAccess,
        pods: watch::Receiver<BTreeSet<IpAddr>>,
    ) -> Result<Self, InterceptionError> {
        let rules = HostRules::prepare(access).await?;
        let changes = rules.changes().await?;
        let mut started = Self { rules, changes, pods, applied: None, error: None };
        started.reconcile().await?;
        Ok(started)
    }

    /// The rules, to remove them at the end.
    pub(crate) fn rules(&self) -> HostRules {
        self.rules.clone()
    }

    /// Follows the pods, and repairs changes by other programs. Ends with the registry of pods.
    pub(crate) async fn run(mut self) {
        loop {
            let outcome = self.reconcile().await;
            let failed = self.report(outcome);
            let later = Instant::now() + if failed { RETRY } else { PAUSE };
            let (changes, rules) = (&mut self.changes, &self.rules);
            let changed = async {
                sleep_until(later).await;
                if !failed && changes.next().await.is_err() {
                    // The subscription has ended. If there is no new one, the next check fails too.
                    if let Ok(renewed) = rules.changes().await {
                        *changes = renewed;
                    }
                }
            };
            tokio::select! {
                changed = self.pods.changed() => if changed.is_err() { return },
                () = changed => {}
            }
        }
    }

    async fn reconcile(&mut self) -> Result<(), InterceptionError> {
        let plan = HostPlan::new(self.pods.borrow_and_update().iter().copied());
        let Some(difference) = self.rules.verify(plan.clone()).await? else { return Ok(()) };
        self.rules.apply(plan.clone()).await?;
        if self.applied.as_ref() == Some(&plan) {
            let (missing, unexpected) = difference.counts();
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

    /// Reports an error once, and its end. Returns whether there is one.
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

/// Removes the rules at the end, unless pods stay closed (`interception.on_exit`).
pub(crate) async fn leave(rules: &HostRules, on_exit: OnExit) {
    if on_exit == OnExit::Keep {
        return;
    }
    if let Err(error) = rules.remove().await {
        let hint = "remove them with `nft delete table inet underpass_host`";
        tracing::error!(error = chain(&error), hint, "cannot remove the rules for kubelet probes");
    }
}
