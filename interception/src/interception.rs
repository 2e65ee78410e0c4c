//! Interception in one namespace: prepares, installs, verifies, repairs and removes the rules, from
//! any thread.
//!
//! `rules` performs the operations; `sockets::socket` opens the sockets that the rules recognize.

use std::sync::Arc;

use underpass_config::{InterceptionSettings, Profile};

use crate::backend::Backend;
use crate::backend::changes::Changes;
use crate::backend::foreign::ForeignRule;
use crate::backend::iptables::RemovalScope;
use crate::backend::leftovers::Leftover;
use crate::backend::nftables::RuleCounter;
use crate::backend::verify::Difference;
use crate::error::InterceptionError;
use crate::namespace::ipv6::ipv6_available;
use crate::plan::{Ports, RulePlan};
use crate::privileged::{NamespaceAccess, Reply, RuleOperation};
use crate::rules::RuleSettings;
use crate::shared_plan::{PlanInputs, SharedPlan};

/// Interception in one namespace, which [`prepare`](Self::prepare) has checked. Every operation
/// runs in that namespace, whatever the caller's namespace is.
#[derive(Debug, Clone)]
pub struct Interception {
    access: NamespaceAccess,
    rules: Arc<RuleSettings>,
    planned: Arc<SharedPlan>,
    /// True if IPv6 was enabled on the loopback interface at the last check.
    ipv6_on_loopback: bool,
}

impl Interception {
    /// Checks whether the rules can be installed in a namespace, and selects the backend. Changes
    /// nothing. `None` for the profile without rules.
    ///
    /// # Errors
    ///
    /// In this order: the capability NET_ADMIN is missing; this is the host's network namespace and
    /// `allow_host` is not set; the backend is unavailable.
    pub async fn prepare(
        access: &NamespaceAccess,
        settings: &InterceptionSettings,
        ports: Ports,
    ) -> Result<Option<Self>, InterceptionError> {
        if settings.profile == Profile::None {
            return Ok(None);
        }
        let backend = access.prepare_rules(settings).await?;
        let ipv6_on_loopback = access.ipv6_on_loopback().await?;
        let settings = settings.clone();
        let inputs = PlanInputs { settings, ports, backend, ipv6: ipv6_available() };
        let planned = SharedPlan::of_inputs(inputs.clone());
        let rules = Arc::new(RuleSettings { inputs, owner: None });
        Ok(Some(Self { access: access.clone(), rules, planned, ipv6_on_loopback }))
    }

    /// Sets the owner that is recorded in the nftables table.
    #[must_use]
    pub fn owned_by(self, owner: String) -> Self {
        let rules = RuleSettings { owner: Some(owner), ..(*self.rules).clone() };
        Self { rules: Arc::new(rules), ..self }
    }

    /// Replaces the settings. Namespace and backend stay.
    #[must_use]
    pub fn with_settings(&self, settings: &InterceptionSettings) -> Self {
        let inputs = PlanInputs { settings: settings.clone(), ..self.rules.inputs.clone() };
        let planned = SharedPlan::of_inputs(inputs.clone());
        let rules = Arc::new(RuleSettings { inputs, owner: self.rules.owner.clone() });
        Self { planned, rules, ..self.clone() }
    }

    /// Access to the namespace of the rules.
    #[must_use]
    pub fn access(&self) -> &NamespaceAccess {
        &self.access
    }

    /// The rules that [`install`](Self::install) installs.
    #[must_use]
    pub fn plan(&self) -> &RulePlan {
        &self.planned.plan
    }

    /// The backend that installs the rules.
    #[must_use]
    pub fn backend(&self) -> Backend {
        self.rules.inputs.backend
    }

    /// Returns true if the kernel lacks IPv6: only IPv4 is captured, whatever the settings are.
    #[must_use]
    pub fn ipv6_absent(&self) -> bool {
        !self.rules.inputs.ipv6
    }

    /// Returns true if the kernel supports IPv6 but it is disabled on the loopback interface. The
    /// rules exist then, but captured IPv6 packets are not delivered.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Namespace`].
    pub async fn ipv6_disabled(&self) -> Result<bool, InterceptionError> {
        Ok(self.rules.inputs.ipv6 && !self.access.ipv6_on_loopback().await?)
    }

    /// Returns true if IPv6 was enabled or disabled on the loopback interface since the last call
    /// of [`follow_ipv6`](Self::follow_ipv6). That may explain a difference.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Namespace`].
    pub async fn ipv6_has_changed(&self) -> Result<bool, InterceptionError> {
        Ok(self.access.ipv6_on_loopback().await? != self.ipv6_on_loopback)
    }

    /// Installs the routes and addresses that need IPv6 on the loopback interface, if IPv6 was
    /// enabled since the last call. Returns true if it was.
    ///
    /// # Errors
    ///
    /// The kernel rejected them. The next call tries again.
    pub async fn follow_ipv6(&mut self) -> Result<bool, InterceptionError> {
        let was_enabled = self.ipv6_on_loopback;
        let enabled = self.access.ipv6_on_loopback().await?;
        if enabled && !was_enabled {
            self.perform(RuleOperation::InstallRoutes).await?;
        }
        self.ipv6_on_loopback = enabled;
        Ok(enabled && !was_enabled)
    }

    /// Finds rules that would capture the same traffic: of an earlier run with another backend, or
    /// of Istio or OSM.
    ///
    /// # Errors
    ///
    /// The kernel refused to list the rules.
    pub async fn leftovers(&self) -> Result<Vec<Leftover>, InterceptionError> {
        self.ask(RuleOperation::Leftovers, |answer| match answer {
            Reply::Leftovers(leftovers) => Ok(leftovers),
            other => Err(other),
        })
        .await
    }

    /// Lists rules of other programs that act on packets before underpass's rules do.
    ///
    /// # Errors
    ///
    /// The kernel refused to list the rules.
    pub async fn foreign_rules(&self) -> Result<Vec<ForeignRule>, InterceptionError> {
        self.ask(RuleOperation::ForeignRules, |answer| match answer {
            Reply::ForeignRules(rules) => Ok(rules),
            other => Err(other),
        })
        .await
    }

    /// Installs the routes, then the rules in one transaction. Replaces rules of an earlier run and
    /// removes its blackhole.
    ///
    /// The routes come first: without them, the rules would lose the replies to preserved client
    /// addresses.
    ///
    /// # Errors
    ///
    /// The kernel rejected a change. Changes of this call are reverted; rules of an earlier run
    /// stay.
    pub async fn install(&self) -> Result<(), InterceptionError> {
        self.perform(RuleOperation::Install).await
    }

    /// Like [`install`](Self::install), unless the rules are installed already. Then it only
    /// records the owner and removes the blackhole. Returns `true` if it installed them, `false` if
    /// they were already installed.
    ///
    /// # Errors
    ///
    /// As [`install`](Self::install), or the kernel refused to list the rules.
    pub async fn install_if_different(&self) -> Result<bool, InterceptionError> {
        self.ask_bool(RuleOperation::InstallIfDifferent).await
    }

    /// Like [`install`](Self::install), but keeps the blackhole.
    ///
    /// # Errors
    ///
    /// As [`install`](Self::install).
    pub async fn repair(&self) -> Result<(), InterceptionError> {
        self.perform(RuleOperation::Repair).await
    }

    /// Compares the installed rules with the plan, by expression and order. `None` if they are
    /// equal.
    ///
    /// # Errors
    ///
    /// The kernel refused to list the rules.
    pub async fn verify(&self) -> Result<Option<Difference>, InterceptionError> {
        self.ask(RuleOperation::Verify, |answer| match answer {
            Reply::Difference(difference) => Ok(difference),
            other => Err(other),
        })
        .await
    }

    /// Installs the blackhole: traffic that the rules would capture is refused until
    /// [`unblock`](Self::unblock).
    ///
    /// # Errors
    ///
    /// The kernel rejected the operation.
    pub async fn block(&self) -> Result<(), InterceptionError> {
        self.perform(RuleOperation::Block).await
    }

    /// Removes the blackhole. Returns `false` if it was not installed.
    ///
    /// # Errors
    ///
    /// The kernel rejected the operation.
    pub async fn unblock(&self) -> Result<bool, InterceptionError> {
        self.ask_bool(RuleOperation::Unblock).await
    }

    /// Returns true if the blackhole is installed.
    ///
    /// # Errors
    ///
    /// The kernel refused to list the rules.
    pub async fn is_blocked(&self) -> Result<bool, InterceptionError> {
        self.ask_bool(RuleOperation::IsBlocked).await
    }

    /// Subscribes to changes in the namespace.
    ///
    /// # Errors
    ///
    /// The kernel rejected the subscription.
    pub async fn changes(&self) -> Result<Changes, InterceptionError> {
        Changes::of_rules(&self.access, self.rules.inputs.backend).await
    }

    /// Reads the counters of the installed rules, in their order. Empty if no rules are installed.
    ///
    /// # Errors
    ///
    /// The kernel rejected the operation.
    pub async fn counters(&self) -> Result<Vec<RuleCounter>, InterceptionError> {
        self.ask(RuleOperation::Counters, |answer| match answer {
            Reply::Counters(counters) => Ok(counters),
            other => Err(other),
        })
        .await
    }

    /// Removes the rules, the routes and the blackhole, if they are installed.
    ///
    /// # Errors
    ///
    /// The kernel rejected the operation.
    pub async fn remove(&self) -> Result<(), InterceptionError> {
        self.perform(RuleOperation::Remove).await
    }

    async fn perform(&self, operation: RuleOperation) -> Result<(), InterceptionError> {
        let done = |answer| if let Reply::Done = answer { Ok(()) } else { Err(answer) };
        self.ask(operation, done).await
    }

    async fn ask_bool(&self, operation: RuleOperation) -> Result<bool, InterceptionError> {
        let is = |answer| if let Reply::Is(so) = answer { Ok(so) } else { Err(answer) };
        self.ask(operation, is).await
    }

    /// Performs an operation on the rules, and extracts the result with `expected`.
    async fn ask<T>(
        &self,
        operation: RuleOperation,
        expected: impl FnOnce(Reply) -> Result<T, Reply>,
    ) -> Result<T, InterceptionError> {
        let answer = self.access.rules(&self.rules, operation).await?;
        expected(answer).map_err(|other| InterceptionError::UnexpectedReply(format!("{other:?}")))
    }
}

/// Reads the counters of underpass's nftables table in a namespace, in the order of the rules.
/// Empty if there is no table.
///
/// # Errors
///
/// The kernel rejected the operation.
pub async fn counters(access: &NamespaceAccess) -> Result<Vec<RuleCounter>, InterceptionError> {
    access.table_counters().await
}

/// Removes everything that underpass installed in a namespace, with any backend and profile: table,
/// iptables chains, ip rules, routes, addresses, and blackhole. Returns `false` if there was
/// nothing.
///
/// # Errors
///
/// This is the host's network namespace and `allow_host` is false, or the kernel or a program
/// rejected a removal. Everything else is removed.
pub async fn remove_everything(
    access: &NamespaceAccess,
    scope: RemovalScope,
    allow_host: bool,
) -> Result<bool, InterceptionError> {
    access.remove_everything(scope, allow_host).await
}
