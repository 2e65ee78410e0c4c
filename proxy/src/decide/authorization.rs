//! Evaluates the authorization policies of a workload for an inbound connection, in Istio's order.
//!
//! The config crate matches single policies; `proxy.mtls` decides on plaintext.

use std::fmt;
use std::sync::Arc;

use thiserror::Error;
use underpass_config::{Connection, Policy, PolicyAction, PolicyLayers, PolicySet};

/// The reason why policies deny a connection.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum Denial {
    /// A DENY policy matches.
    #[error("explicitly denied by: {0}")]
    By(Arc<Policy>),
    /// There are ALLOW policies, and none matches.
    #[error("allow policies exist, but none allowed")]
    NotAllowed,
}

/// The decision of a dry-run policy, which is not enforced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum DryRun {
    /// A DENY policy matches.
    Denied(Arc<Policy>),
    /// An ALLOW policy matches.
    Allowed(Arc<Policy>),
    /// There are ALLOW policies, and none matches.
    NotAllowed,
}

/// Decides as Istio documents it (AuthorizationPolicy): a matching DENY policy denies; otherwise,
/// if there are ALLOW policies, one must match. Dry-run policies are not enforced. Returns the
/// ALLOW policy that matches, if there are any.
pub(crate) fn decide<'a>(
    policies: PolicyLayers<'a>,
    connection: &Connection<'_>,
) -> Result<Option<&'a Arc<Policy>>, Denial> {
    policies.layers().try_fold(None, |allowing, layer| {
        let of_layer = decide_layer(layer, connection)?;
        Ok(of_layer.or(allowing))
    })
}

fn decide_layer<'a>(
    policies: PolicySet<'a>,
    connection: &Connection<'_>,
) -> Result<Option<&'a Arc<Policy>>, Denial> {
    if let Some(policy) = denying(policies, connection) {
        return Err(Denial::By(policy.clone()));
    }
    let mut allowing = policies.deciding(PolicyAction::Allow).peekable();
    if allowing.peek().is_none() {
        return Ok(None);
    }
    let matching = allowing.find(|policy| policy.matches(connection));
    matching.map(Some).ok_or(Denial::NotAllowed)
}

/// The decisions of dry-run policies in ztunnel's order: ALLOW policies are skipped if an enforced
/// policy denies.
pub(crate) fn dry_run(policies: PolicyLayers<'_>, connection: &Connection<'_>) -> Vec<DryRun> {
    policies.layers().flat_map(|layer| dry_run_of_layer(layer, connection)).collect()
}

fn dry_run_of_layer(policies: PolicySet<'_>, connection: &Connection<'_>) -> Vec<DryRun> {
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
