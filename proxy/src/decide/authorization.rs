//! Whether a workload takes a connection: the order in which its policies are asked.
//!
//! Not here: what a policy matches (the config crate), where the connection is going (routing), and whether it may be in plain
//! (`proxy.mtls`).

use std::fmt;
use std::sync::Arc;

use thiserror::Error;
use underpass_config::{Connection, Policy, PolicyAction, PolicySet};

/// Why a connection is not taken.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum Denial {
    /// A policy denies it.
    #[error("explicitly denied by: {0}")]
    By(Arc<Policy>),
    /// There are policies that allow some connections, and this is none of them.
    #[error("allow policies exist, but none allowed")]
    NotAllowed,
}

/// What a policy would do if it were not a dry run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum DryRun {
    /// It would deny the connection.
    Denied(Arc<Policy>),
    /// It would allow it.
    Allowed(Arc<Policy>),
    /// It, and others like it, would allow other connections, and so deny this one.
    NotAllowed,
}

/// Decides as Istio documents it (AuthorizationPolicy, "Authorization Policy"): whatever is denied is not taken; else, if anything is
/// allowed by name, nothing else is. Dry-run policies decide nothing.
pub(crate) fn decide(policies: PolicySet<'_>, connection: &Connection<'_>) -> Result<(), Denial> {
    if let Some(policy) = denying(policies, connection) {
        return Err(Denial::By(policy.clone()));
    }
    let mut allowing = policies.deciding(PolicyAction::Allow).peekable();
    if allowing.peek().is_none() || allowing.any(|policy| policy.matches(connection)) {
        return Ok(());
    }
    Err(Denial::NotAllowed)
}

/// What dry-run policies would have done, in ztunnel's order: one that would allow is not asked about what is denied anyway.
pub(crate) fn dry_run(policies: PolicySet<'_>, connection: &Connection<'_>) -> Vec<DryRun> {
    let matching = |action| {
        policies.dry_run(action).filter(|policy| policy.matches(connection)).map(Arc::clone)
    };
    let mut results: Vec<_> = matching(PolicyAction::Deny).map(DryRun::Denied).collect();
    let mut allowing = policies.dry_run(PolicyAction::Allow).peekable();
    if allowing.peek().is_none() || denying(policies, connection).is_some() {
        return results;
    }
    let before = results.len();
    results.extend(matching(PolicyAction::Allow).map(DryRun::Allowed));
    let nothing_decides = policies.deciding(PolicyAction::Allow).next().is_none();
    if results.len() == before && nothing_decides {
        results.push(DryRun::NotAllowed);
    }
    results
}

fn denying<'a>(policies: PolicySet<'a>, connection: &Connection<'_>) -> Option<&'a Arc<Policy>> {
    policies.deciding(PolicyAction::Deny).find(|policy| policy.matches(connection))
}

impl fmt::Display for DryRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Denied(policy) => write!(f, "dry run: would be denied by: {policy}"),
            Self::Allowed(policy) => write!(f, "dry run: would be allowed by: {policy}"),
            Self::NotAllowed => f.write_str("dry run: would not be allowed by any policy"),
        }
    }
}

#[cfg(test)]
mod tests;
