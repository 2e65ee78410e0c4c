//! Authorization policies: which connections a workload takes.
//!
//! Not here: the decision, in which order policies of both kinds are asked. That belongs to the proxy.

mod rules;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

pub use rules::{Condition, Match, Rules, StringMatch, Values};

use super::names::Name;
use crate::{SpiffeId, TrustDomain};

/// Whom a policy is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PolicyScope {
    /// Every workload of the mesh, whatever namespace the policy is in.
    Global,
    /// Every workload of its namespace.
    Namespace,
    /// The workloads that name it.
    WorkloadSelector,
}

/// What a policy does with a connection that it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PolicyAction {
    /// Lets it through.
    Allow,
    /// Refuses it.
    Deny,
}

/// One authorization policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Its name, unique in its namespace.
    pub name: Name,
    /// Its namespace.
    pub namespace: Name,
    /// Whom it is for.
    pub scope: PolicyScope,
    /// What it does.
    pub action: PolicyAction,
    /// Whether it only says what it would do.
    pub dry_run: bool,
    /// What it matches.
    pub rules: Rules,
}

/// What policies judge a connection by.
#[derive(Debug, Clone, Copy)]
pub struct Connection<'a> {
    /// The address of the TCP peer.
    pub source: IpAddr,
    /// Where the connection shall end: the workload's address and port, not those of the tunnel.
    pub destination: SocketAddr,
    /// Who the peer has proven to be; `None`: it came in plain.
    pub identity: Option<&'a SpiffeId>,
    /// Trust domains that are the same as the identity's: with several, principals of policies
    /// speak of the peer in any of their names. The identity's own may be among them.
    pub aliases: &'a [TrustDomain],
}

impl Policy {
    /// Whether `connection` is one that this policy speaks of.
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

/// The policies that hold for one workload.
#[derive(Debug, Clone, Copy)]
pub struct PolicySet<'a> {
    pub(super) global: &'a [Arc<Policy>],
    pub(super) namespace: &'a [Arc<Policy>],
    pub(super) workload: &'a [Arc<Policy>],
}

impl<'a> PolicySet<'a> {
    /// Every policy of the set; one that a workload names and that holds for its namespace too comes twice.
    pub fn iter(self) -> impl Iterator<Item = &'a Arc<Policy>> {
        self.global.iter().chain(self.namespace).chain(self.workload)
    }

    /// Those that decide, and do so by this action.
    pub fn deciding(self, action: PolicyAction) -> impl Iterator<Item = &'a Arc<Policy>> {
        self.iter().filter(move |policy| policy.action == action && !policy.dry_run)
    }

    /// Those that only say what they would do, and would do so by this action.
    pub fn dry_run(self, action: PolicyAction) -> impl Iterator<Item = &'a Arc<Policy>> {
        self.iter().filter(move |policy| policy.action == action && policy.dry_run)
    }
}

impl PartialEq for PolicySet<'_> {
    /// Whether both decide the same, whatever snapshot they are of.
    fn eq(&self, other: &Self) -> bool {
        // `Arc` compares by address before it compares by value.
        self.iter().eq(other.iter())
    }
}

#[cfg(test)]
mod tests;
