//! The rules in the host's namespace, from any thread: installed, verified and removed.
//!
//! Not here: the rules (`plan/host.rs`), and their backend (`backend/nftables/host.rs`).

use crate::backend::Backend;
use crate::backend::changes::Changes;
use crate::backend::verify::Difference;
use crate::error::InterceptionError;
use crate::plan::host::HostPlan;
use crate::privileged::{HostRuleOperation, NamespaceAccess, Reply};

/// The rules in the host's namespace. They need nftables: iptables has no sets of addresses without
/// another program.
#[derive(Debug, Clone)]
pub struct HostRules {
    access: NamespaceAccess,
}

impl HostRules {
    /// Checks whether the rules can be installed in the namespace of `access`. Changes nothing.
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
    /// The kernel rejected the change; the rules before stay.
    pub async fn apply(&self, plan: HostPlan) -> Result<(), InterceptionError> {
        self.ask(HostRuleOperation::Apply(plan)).await.map(drop)
    }

    /// The difference between the installed rules and the plan; `None` if there is none.
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

    /// Removes the rules. Absent ones are no error.
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub async fn remove(&self) -> Result<(), InterceptionError> {
        self.ask(HostRuleOperation::Remove).await.map(drop)
    }

    /// Notifications of changes of rules in the namespace, from now on.
    ///
    /// # Errors
    ///
    /// The kernel rejects the subscription.
    pub async fn changes(&self) -> Result<Changes, InterceptionError> {
        Changes::of_rules(&self.access, Backend::Nftables).await
    }

    async fn ask(&self, operation: HostRuleOperation) -> Result<Reply, InterceptionError> {
        self.access.host_rules(operation).await
    }
}
