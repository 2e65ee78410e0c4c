//! Interception in one namespace: checked, installed, compared with the plan, repaired and removed,
//! from any thread.
//!
//! Not here: how any of it is done (`rules.rs`), and the sockets that fit the rules (`socket.rs`).

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
use crate::planned::{PlanInputs, Planned};
use crate::privileged::{NamespaceAccess, Reply, RuleOperation};
use crate::rules::RuleSettings;

/// Interception in one namespace that has been checked and can be installed. Every operation runs
/// in that namespace, whatever namespace its caller is in.
#[derive(Debug, Clone)]
pub struct Interception {
    access: NamespaceAccess,
    rules: Arc<RuleSettings>,
    planned: Arc<Planned>,
    /// Whether IPv6 was enabled on the loopback interface at the last look.
    ipv6_on_loopback: bool,
}

impl Interception {
    /// Checks whether and how the rules can be installed in a namespace, and changes nothing.
    /// `None` for the profile without rules.
    ///
    /// # Errors
    ///
    /// In this order: the capability NET_ADMIN is missing, this is the host's own namespace (and
    /// `allow_host` is off), the backend is not there.
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
        let planned = Planned::shared(inputs.clone());
        let rules = Arc::new(RuleSettings { inputs, owner: None });
        Ok(Some(Self { access: access.clone(), rules, planned, ipv6_on_loopback }))
    }

    /// The same, which leaves in nftables who installed the rules.
    #[must_use]
    pub fn owned_by(self, owner: String) -> Self {
        let rules = RuleSettings { owner: Some(owner), ..(*self.rules).clone() };
        Self { rules: Arc::new(rules), ..self }
    }

    /// The same interception of other connections: where it is and what it is installed with stay.
    #[must_use]
    pub fn with_settings(&self, settings: &InterceptionSettings) -> Self {
        let inputs = PlanInputs { settings: settings.clone(), ..self.rules.inputs.clone() };
        let planned = Planned::shared(inputs.clone());
        let rules = Arc::new(RuleSettings { inputs, owner: self.rules.owner.clone() });
        Self { planned, rules, ..self.clone() }
    }

    /// Where the rules are.
    #[must_use]
    pub fn access(&self) -> &NamespaceAccess {
        &self.access
    }

    /// The rules that [`install`](Self::install) installs.
    #[must_use]
    pub fn plan(&self) -> &RulePlan {
        &self.planned.plan
    }

    /// What they are installed with.
    #[must_use]
    pub fn backend(&self) -> Backend {
        self.rules.inputs.backend
    }

    /// Whether the kernel has no IPv6, so that only IPv4 is caught whatever the settings say.
    #[must_use]
    pub fn ipv6_absent(&self) -> bool {
        !self.rules.inputs.ipv6
    }

    /// Whether the kernel has IPv6, and the loopback interface has it disabled now: rules exist,
    /// and what they capture goes nowhere.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Namespace`].
    pub async fn ipv6_disabled(&self) -> Result<bool, InterceptionError> {
        Ok(self.rules.inputs.ipv6 && !self.access.ipv6_on_loopback().await?)
    }

    /// Whether IPv6 has been enabled or disabled on the loopback interface since the last call of
    /// [`follow_ipv6`](Self::follow_ipv6), so that a difference found since may be of that.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Namespace`].
    pub async fn ipv6_has_changed(&self) -> Result<bool, InterceptionError> {
        Ok(self.access.ipv6_on_loopback().await? != self.ipv6_on_loopback)
    }

    /// Installs the routes and addresses that wait for IPv6 on the loopback interface, if it has
    /// been enabled there since the last call; whether it has.
    ///
    /// # Errors
    ///
    /// The kernel refused; the next call tries again.
    pub async fn follow_ipv6(&mut self) -> Result<bool, InterceptionError> {
        let was_enabled = self.ipv6_on_loopback;
        let enabled = self.access.ipv6_on_loopback().await?;
        if enabled && !was_enabled {
            self.done(RuleOperation::InstallRoutes).await?;
        }
        self.ipv6_on_loopback = enabled;
        Ok(enabled && !was_enabled)
    }

    /// Rules that would catch the same traffic: of an older run by another backend, or of Istio or
    /// OSM.
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

    /// Rules of other programs that act on packets before ours do.
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

    /// Installs the routes, then the rules in one transaction. Whatever an earlier run left is
    /// replaced, and its blackhole removed.
    ///
    /// Routes first: rules without them would strand the replies to imitated clients.
    ///
    /// # Errors
    ///
    /// The kernel refused; what this call had added is removed again, and rules of an earlier run
    /// still stand.
    pub async fn install(&self) -> Result<(), InterceptionError> {
        self.done(RuleOperation::Install).await
    }

    /// Installs as [`install`](Self::install) does, and leaves the blackhole in place.
    ///
    /// # Errors
    ///
    /// As [`install`](Self::install).
    pub async fn repair(&self) -> Result<(), InterceptionError> {
        self.done(RuleOperation::Repair).await
    }

    /// Writes beside the rules who installed them. Without it they are the same, so that a failure
    /// is logged only.
    pub async fn mark_owner(&self) {
        if let Err(error) = self.done(RuleOperation::MarkOwner).await {
            tracing::debug!(%error, "the owner of the rules is not marked");
        }
    }

    /// How what is installed differs from the plan, by expression and order; `None` if it does not.
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

    /// Installs the blackhole: what the rules would catch is refused until
    /// [`unblock`](Self::unblock).
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub async fn block(&self) -> Result<(), InterceptionError> {
        self.done(RuleOperation::Block).await
    }

    /// Removes the blackhole; `false` if there was none.
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub async fn unblock(&self) -> Result<bool, InterceptionError> {
        self.is(RuleOperation::Unblock).await
    }

    /// Whether the blackhole is installed.
    ///
    /// # Errors
    ///
    /// The kernel refused to list the rules.
    pub async fn is_blocked(&self) -> Result<bool, InterceptionError> {
        self.is(RuleOperation::IsBlocked).await
    }

    /// Wake-ups after changes in the namespace, from now on.
    ///
    /// # Errors
    ///
    /// The kernel does not let us listen.
    pub async fn changes(&self) -> Result<Changes, InterceptionError> {
        Changes::of_rules(&self.access, self.rules.inputs.backend).await
    }

    /// How often each rule that is installed matched, in the order of the rules; empty if there are
    /// none.
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub async fn counters(&self) -> Result<Vec<RuleCounter>, InterceptionError> {
        self.ask(RuleOperation::Counters, |answer| match answer {
            Reply::Counters(counters) => Ok(counters),
            other => Err(other),
        })
        .await
    }

    /// Removes the rules, the routes and the blackhole. What is already gone is no error.
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub async fn remove(&self) -> Result<(), InterceptionError> {
        self.done(RuleOperation::Remove).await
    }

    async fn done(&self, operation: RuleOperation) -> Result<(), InterceptionError> {
        let done = |answer| if let Reply::Done = answer { Ok(()) } else { Err(answer) };
        self.ask(operation, done).await
    }

    async fn is(&self, operation: RuleOperation) -> Result<bool, InterceptionError> {
        let is = |answer| if let Reply::Is(so) = answer { Ok(so) } else { Err(answer) };
        self.ask(operation, is).await
    }

    /// Asks for an operation on the rules, and takes what `expected` takes out of the answer.
    async fn ask<T>(
        &self,
        operation: RuleOperation,
        expected: impl FnOnce(Reply) -> Result<T, Reply>,
    ) -> Result<T, InterceptionError> {
        let answer = self.access.rules(&self.rules, operation).await?;
        expected(answer).map_err(|other| InterceptionError::UnexpectedReply(format!("{other:?}")))
    }
}

/// How often each rule of our nftables table in a namespace matched, in the order of the rules;
/// empty if there is none.
///
/// # Errors
///
/// The kernel refused.
pub async fn counters(access: &NamespaceAccess) -> Result<Vec<RuleCounter>, InterceptionError> {
    access.table_counters().await
}

/// Removes whatever underpass ever installed in a namespace, by whichever backend and profile: the
/// table, the profiles' chains in iptables, the ip rules, routes and addresses, the blackhole.
/// `false` if there was nothing.
///
/// # Errors
///
/// This is the host's own namespace, and not `allow_host`. The kernel or a program refused
/// something; all else is removed.
pub async fn remove_everything(
    access: &NamespaceAccess,
    scope: RemovalScope,
    allow_host: bool,
) -> Result<bool, InterceptionError> {
    access.remove_everything(scope, allow_host).await
}
