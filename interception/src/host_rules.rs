//! Installs, verifies and removes the rules for kubelet probes in the host's network namespace,
//! from any thread.
//!
//! `plan::host` plans the rules; `backend::nftables::host` is their backend.

use crate::backend::Backend;
use crate::backend::changes::Changes;
use crate::backend::verify::Difference;
use crate::error::InterceptionError;
use crate::plan::host::HostPlan;
use crate::privileged::{HostRuleOperation, NamespaceAccess, Reply};

/// Access to the rules in the host's network namespace. They need nftables, since iptables has no
/// sets of addresses.
#[derive(Debug, Clone)]
pub struct HostRules {
    access: NamespaceAccess,
}

impl HostRules {
    /// Checks whether the rules can be installed. Changes nothing.
    ///
    /// # Errors
    ///
    /// The capability NET_ADMIN is missing, or the kernel lacks nf_tables.
    pub async fn prepare(access: NamespaceAccess) -> Result<Self, InterceptionError> {
        let rules = Self { access };
        rules.ask(HostRuleOperation::Check).await.map(|_| rules)
    }

    /// Installs the rules, or replaces them, in one transaction.
    ///
    /// # Errors
    ///
    /// The kernel rejected the change. The previous rules stay.
    pub async fn apply(&self, plan: HostPlan) -> Result<(), InterceptionError> {
        self.ask(HostRuleOperation::Apply(plan)).await.map(drop)
    }

    /// Changes the addresses of pods in the installed rules from those of `old` to those of `new`,
    /// in one transaction. Its cost depends on the changed addresses only. Returns `false` without
    /// a change if the plans have different rules: apply the new one then.
    ///
    /// # Errors
    ///
    /// The kernel rejected the change, for example because another program has changed the rules.
    pub async fn update(&self, old: HostPlan, new: HostPlan) -> Result<bool, InterceptionError> {
        match self.ask(HostRuleOperation::Update { old, new }).await? {
            Reply::Is(updated) => Ok(updated),
            other => Err(InterceptionError::UnexpectedReply(format!("{other:?}"))),
        }
    }

    /// Compares the installed rules with the plan. `None` if they are equal.
    ///
    /// # Errors
    ///
    /// The kernel refused to list the rules.
    pub async fn verify(&self, plan: HostPlan) -> Result<Option<Difference>, InterceptionError> {
        match self.ask(HostRuleOperation::Verify(plan)).await? {
            Reply::Difference(difference) => Ok(difference),
            other => Err(InterceptionError::UnexpectedReply(format!("{other:?}"))),
        }
    }

    /// Removes the rules, if they are installed.
    ///
    /// # Errors
    ///
    /// The kernel rejected the removal.
    pub async fn remove(&self) -> Result<(), InterceptionError> {
        self.ask(HostRuleOperation::Remove).await.map(drop)
    }

    /// Subscribes to changes of rules in the namespace.
    ///
    /// # Errors
    ///
    /// The kernel rejected the subscription.
    pub async fn changes(&self) -> Result<Changes, InterceptionError> {
        Changes::of_rules(&self.access, Backend::Nftables).await
    }

    async fn ask(&self, operation: HostRuleOperation) -> Result<Reply, InterceptionError> {
        self.access.host_rules(operation).await
    }
}
