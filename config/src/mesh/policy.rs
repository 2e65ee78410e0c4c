//! Authorization policies, which restrict the connections to a workload. The proxy evaluates allow
//! and deny policies in their order.

mod rules;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

pub use rules::{Condition, Match, Rules, StringMatch, Values};

use super::names::Name;
use crate::identity::spiffe::{SpiffeId, TrustDomain};

/// The workloads to which a policy applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PolicyScope {
    /// All workloads of the mesh, regardless of the policy's namespace.
    Global,
    /// All workloads of the policy's namespace.
    Namespace,
    /// The workloads that reference the policy.
    WorkloadSelector,
}

/// The effect of a policy on a matching connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PolicyAction {
    /// Allows the connection.
    Allow,
    /// Denies the connection.
    Deny,
}

/// One authorization policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// The name, unique within the namespace.
    pub name: Name,
    /// The policy's namespace.
    pub namespace: Name,
    /// The workloads to which the policy applies.
    pub scope: PolicyScope,
    /// Whether a match allows or denies the connection.
    pub action: PolicyAction,
    /// Whether the policy only logs its decision.
    pub dry_run: bool,
    /// The conditions of the policy.
    pub rules: Rules,
}

/// The properties of a connection that policies evaluate.
#[derive(Debug, Clone, Copy)]
pub struct Connection<'a> {
    /// The address of the TCP peer.
    pub source: IpAddr,
    /// The destination within the workload, not that of the tunnel.
    pub destination: SocketAddr,
    /// The authenticated identity of the peer; `None` for plaintext.
    pub identity: Option<&'a SpiffeId>,
    /// Aliases of the identity's trust domain. Principals of policies match the peer under each of
    /// these names. The domain itself may be included.
    pub aliases: &'a [TrustDomain],
}

impl Policy {
    /// Whether the policy matches `connection`.
    #[must_use]
    pub fn matches(&self, connection: &Connection<'_>) -> bool {
        self.rules.matches(connection)
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl Policy {
    /// A substitute for a policy that is unknown or was rejected. It denies every connection, so
    /// that no connection is allowed that the real policy might deny.
    pub(crate) fn denying(namespace: Name, name: &str, scope: PolicyScope) -> Self {
        let (action, rules) = (PolicyAction::Deny, Rules::from(vec![Vec::new()]));
        Self { name: name.into(), namespace, scope, action, dry_run: false, rules }
    }
}

/// The policies of a control plane and of a mesh file beside it. Both must allow a connection, so
/// that the file cannot widen what the control plane allows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PolicyLayers<'a>(pub(super) [PolicySet<'a>; 2]);

impl<'a> PolicyLayers<'a> {
    /// The layers. Each layer decides, and the first one that denies is the reason.
    pub fn layers(self) -> impl Iterator<Item = PolicySet<'a>> {
        self.0.into_iter()
    }

    /// The policies of the control plane and of the file.
    pub fn iter(self) -> impl Iterator<Item = &'a Arc<Policy>> {
        self.layers().flat_map(PolicySet::iter)
    }
}

/// The policies of one layer that apply to a workload.
#[derive(Debug, Clone, Copy, Default)]
pub struct PolicySet<'a> {
    pub(super) global: &'a [Arc<Policy>],
    pub(super) namespace: &'a [Arc<Policy>],
    pub(super) workload: &'a [Arc<Policy>],
}

impl<'a> PolicySet<'a> {
    /// All policies. A policy occurs twice if a workload references it and it also applies to the
    /// namespace.
    pub fn iter(self) -> impl Iterator<Item = &'a Arc<Policy>> {
        self.global.iter().chain(self.namespace).chain(self.workload)
    }

    /// The enforced policies with this action.
    pub fn deciding(self, action: PolicyAction) -> impl Iterator<Item = &'a Arc<Policy>> {
        self.iter().filter(move |policy| policy.action == action && !policy.dry_run)
    }

    /// The dry-run policies with this action.
    pub fn dry_run(self, action: PolicyAction) -> impl Iterator<Item = &'a Arc<Policy>> {
        self.iter().filter(move |policy| policy.action == action && policy.dry_run)
    }
}

impl PartialEq for PolicySet<'_> {
    /// Whether both sets decide equally, even if they belong to different snapshots.
    fn eq(&self, other: &Self) -> bool {
        // `Arc` compares addresses before values.
        self.iter().eq(other.iter())
    }
}

#[cfg(test)]
mod tests;
