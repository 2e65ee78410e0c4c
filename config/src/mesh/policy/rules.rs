//! What a policy matches, as it is told: rules are alternatives, all clauses of a rule must hold, the matches of a clause are
//! alternatives, all conditions of a match must hold.
//!
//! This is Istio's `istio.security.Authorization`, as ztunnel understands it (`src/rbac.rs`). Not here: the form in which rules are
//! asked (`rules/program.rs`).

mod program;

use ipnet::IpNet;

use super::Connection;
use program::Program;

/// Whatever a policy matches. By default, nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules(Program);

/// Conditions that must all hold. Without any it matches nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Match(Vec<Condition>);

/// Values of one kind, of which one must apply, or none may.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    values: Values,
    negated: bool,
}

/// What a condition can speak of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Values {
    /// The port that the connection is meant for.
    DestinationPorts(Vec<u16>),
    /// The peer's address.
    SourceIps(Vec<IpNet>),
    /// The address that the connection is meant for.
    DestinationIps(Vec<IpNet>),
    /// The namespace in the peer's identity; empty if it has no identity, or one without a namespace.
    Namespaces(Vec<StringMatch>),
    /// The namespace and service account in the peer's identity, in whatever trust domain.
    ServiceAccounts(Vec<(String, String)>),
    /// The peer's identity without `spiffe://`, also in the name of an alias of its trust domain;
    /// without an identity, none applies.
    Principals(Vec<StringMatch>),
}

/// What a text must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StringMatch {
    /// This.
    Exact(String),
    /// This, or longer at its end.
    Prefix(String),
    /// This, or longer at its beginning.
    Suffix(String),
    /// Anything but empty.
    Presence,
}

impl Rules {
    pub(super) fn matches(&self, connection: &Connection<'_>) -> bool {
        self.0.matches(connection)
    }
}

impl From<Vec<Vec<Vec<Match>>>> for Rules {
    /// The rules, their clauses, and the matches of these.
    fn from(rules: Vec<Vec<Vec<Match>>>) -> Self {
        Self(Program::of(rules))
    }
}

impl FromIterator<Condition> for Match {
    /// A condition without values says nothing, and is left out: as if it were not there.
    fn from_iter<T: IntoIterator<Item = Condition>>(conditions: T) -> Self {
        Self(conditions.into_iter().filter(|condition| !condition.values.is_empty()).collect())
    }
}

impl Condition {
    /// One of `values` must apply.
    pub fn any_of(values: Values) -> Self {
        Self { values, negated: false }
    }

    /// None of `values` may apply.
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
