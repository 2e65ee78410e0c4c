//! The conditions of a policy: rules are alternatives, all clauses of a rule must match, the
//! matches of a clause are alternatives, and all conditions of a match must hold.
//!
//! The semantics are those of Istio's `istio.security.Authorization` in ztunnel (`src/rbac.rs`).
//! `rules/program.rs` contains the compiled form.

mod program;

use ipnet::IpNet;

use super::Connection;
use program::Program;

/// The rules of a policy. The default matches nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules(Program);

/// Conditions that must all hold. A match without conditions matches nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Match(Vec<Condition>);

/// Values of one kind. One of them must match, or none of them may match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    values: Values,
    negated: bool,
}

/// The values of a condition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Values {
    /// The destination port.
    DestinationPorts(Vec<u16>),
    /// The address of the peer.
    SourceIps(Vec<IpNet>),
    /// The destination address.
    DestinationIps(Vec<IpNet>),
    /// The namespace of the peer's identity; empty without an identity or namespace.
    Namespaces(Vec<StringMatch>),
    /// The namespace and service account of the peer's identity, in any trust domain.
    ServiceAccounts(Vec<(String, String)>),
    /// The peer's identity without `spiffe://`, under each alias of its trust domain. Matches
    /// nothing without an identity.
    Principals(Vec<StringMatch>),
}

/// A condition on a string.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StringMatch {
    /// Equal to this text.
    Exact(String),
    /// Starts with this text.
    Prefix(String),
    /// Ends with this text.
    Suffix(String),
    /// Not empty.
    Presence,
}

impl Rules {
    pub(super) fn matches(&self, connection: &Connection<'_>) -> bool {
        self.0.matches(connection)
    }

    /// The rules, to show them: each is a list of clauses, and each clause a list of matches. Rules
    /// that never match are omitted.
    pub fn to_lists(&self) -> Vec<Vec<Vec<Match>>> {
        self.0.rules()
    }
}

impl From<Vec<Vec<Vec<Match>>>> for Rules {
    /// Each rule is a list of clauses, and each clause a list of matches.
    fn from(rules: Vec<Vec<Vec<Match>>>) -> Self {
        Self(Program::compile(rules))
    }
}

impl Match {
    /// The conditions.
    pub fn conditions(&self) -> &[Condition] {
        &self.0
    }
}

impl FromIterator<Condition> for Match {
    /// Ignores conditions without values.
    fn from_iter<T: IntoIterator<Item = Condition>>(conditions: T) -> Self {
        Self(conditions.into_iter().filter(|condition| !condition.values.is_empty()).collect())
    }
}

impl Condition {
    /// The values, one of which must match, or none of which may match if the second value is true.
    pub fn values(&self) -> (&Values, bool) {
        (&self.values, self.negated)
    }

    /// A condition that holds if one of `values` matches.
    pub fn any_of(values: Values) -> Self {
        Self { values, negated: false }
    }

    /// A condition that holds if none of `values` matches.
    pub fn none_of(values: Values) -> Self {
        Self { values, negated: true }
    }
}

impl Values {
    fn is_empty(&self) -> bool {
        match self {
            Self::DestinationPorts(ports) => ports.is_empty(),
            Self::SourceIps(cidrs) | Self::DestinationIps(cidrs) => cidrs.is_empty(),
            Self::Namespaces(matches) | Self::Principals(matches) => matches.is_empty(),
            Self::ServiceAccounts(accounts) => accounts.is_empty(),
        }
    }
}
