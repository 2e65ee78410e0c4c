//! Compiled rules: a sequence of conditions, each with the next step for both outcomes.
//!
//! All values of a policy are in a few contiguous allocations. The program is read for every
//! connection and usually not in the CPU cache if there are many policies. Evaluation allocates
//! nothing.

mod decompile;

use std::net::IpAddr;
use std::ops::Range;

use ipnet::IpNet;

use super::{Condition, Connection, Match, StringMatch, Values};
use crate::cidr;
use crate::identity::spiffe::{SpiffeId, TrustDomain};

/// The end of the program with a match. No step has this index.
const MATCH: usize = usize::MAX;
const NO_MATCH: usize = usize::MAX - 1;

/// The conditions of all rules of a policy, with their values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Program {
    /// The index of the first step.
    start: usize,
    steps: Vec<Step>,
    ports: Vec<u16>,
    /// The first and last addresses of ranges. Those of one step are sorted and disjoint.
    ranges: Vec<(IpAddr, IpAddr)>,
    texts: Vec<Text>,
    /// The concatenation of all texts.
    letters: String,
}

/// One condition.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Step {
    field: Field,
    negated: bool,
    /// The indexes of the step's values in `ports`, `ranges` or `texts`.
    values: Range<usize>,
    /// The next step if the condition holds.
    then: usize,
    /// The next step if the condition does not hold.
    otherwise: usize,
    end: End,
}

/// The largest part of a rule whose last condition a step is. `decompile.rs` reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Condition,
    Match,
    Clause,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Field {
    DestinationPort,
    SourceIp,
    DestinationIp,
    Namespace,
    ServiceAccount,
    Principal,
}

/// A [`StringMatch`] whose text is in `letters`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Text {
    kind: Kind,
    letters: Range<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Exact,
    Prefix,
    Suffix,
    Presence,
}

impl Default for Program {
    fn default() -> Self {
        Self::compile(Vec::new())
    }
}

impl Program {
    /// Compiles rules from last to first, so that each step knows its successors.
    pub(super) fn compile(rules: Vec<Vec<Vec<Match>>>) -> Self {
        let mut program = Self {
            start: NO_MATCH,
            steps: Vec::new(),
            ports: Vec::new(),
            ranges: Vec::new(),
            texts: Vec::new(),
            letters: String::new(),
        };
        for rule in rules.into_iter().rev() {
            // If a rule fails, the next one is evaluated. If all its clauses match, the policy
            // matches.
            let otherwise = program.start;
            program.start = MATCH;
            for clause in rule.into_iter().rev().filter(|clause| !clause.is_empty()) {
                program.start = program.clause(clause, program.start, otherwise);
            }
        }
        program.shrink();
        program
    }

    /// Adds a clause, and returns its first step.
    fn clause(&mut self, matches: Vec<Match>, then: usize, mut otherwise: usize) -> usize {
        let mut end = End::Clause;
        for Match(mut conditions) in matches.into_iter().rev() {
            // A match without conditions fails, so the next match is evaluated.
            if conditions.is_empty() {
                continue;
            }
            // Steps are added from last to first, so that cheap conditions are evaluated first.
            conditions.sort_by_key(|condition| std::cmp::Reverse(cost(&condition.values)));
            let mut first = then;
            for condition in conditions {
                first = self.condition(condition, first, otherwise, end);
                end = End::Condition;
            }
            (otherwise, end) = (first, End::Match);
        }
        otherwise
    }

    /// Adds a condition, and returns its step.
    fn condition(
        &mut self,
        Condition { values, negated }: Condition,
        then: usize,
        otherwise: usize,
        end: End,
    ) -> usize {
        let (field, values) = match values {
            Values::DestinationPorts(ports) => (Field::DestinationPort, self.add_ports(ports)),
            Values::SourceIps(cidrs) => (Field::SourceIp, self.add_ranges(cidrs)),
            Values::DestinationIps(cidrs) => (Field::DestinationIp, self.add_ranges(cidrs)),
            Values::Namespaces(matches) => (Field::Namespace, self.add_texts(matches)),
            Values::ServiceAccounts(accounts) => {
                // Names contain no '/', so two accounts never have the same text.
                let path =
                    |(namespace, name)| StringMatch::Exact(format!("/ns/{namespace}/sa/{name}"));
                (Field::ServiceAccount, self.add_texts(accounts.into_iter().map(path).collect()))
            }
            Values::Principals(matches) => (Field::Principal, self.add_texts(matches)),
        };
        self.steps.push(Step { field, negated, values, then, otherwise, end });
        self.steps.len() - 1
    }

    fn add_ports(&mut self, mut ports: Vec<u16>) -> Range<usize> {
        ports.sort_unstable();
        ports.dedup();
        append(&mut self.ports, ports)
    }

    fn add_ranges(&mut self, cidrs: Vec<IpNet>) -> Range<usize> {
        let cidrs: Vec<_> = cidrs.into_iter().map(cidr::canonical).collect();
        let disjoint = IpNet::aggregate(&cidrs).into_iter();
        let mut ranges: Vec<_> = disjoint.map(|cidr| (cidr.network(), cidr.broadcast())).collect();
        ranges.sort_unstable();
        append(&mut self.ranges, ranges)
    }

    fn add_texts(&mut self, matches: Vec<StringMatch>) -> Range<usize> {
        let texts = matches.into_iter().map(|one| {
            let (kind, text) = match one {
                StringMatch::Exact(text) => (Kind::Exact, text),
                StringMatch::Prefix(text) => (Kind::Prefix, text),
                StringMatch::Suffix(text) => (Kind::Suffix, text),
                StringMatch::Presence => (Kind::Presence, String::new()),
            };
            let first = self.letters.len();
            self.letters.push_str(&text);
            Text { kind, letters: first..self.letters.len() }
        });
        append(&mut self.texts, texts.collect())
    }

    fn shrink(&mut self) {
        self.steps.shrink_to_fit();
        self.ports.shrink_to_fit();
        self.ranges.shrink_to_fit();
        self.texts.shrink_to_fit();
        self.letters.shrink_to_fit();
    }
}

fn append<T>(all: &mut Vec<T>, more: Vec<T>) -> Range<usize> {
    let first = all.len();
    all.extend(more);
    first..all.len()
}

/// The relative cost of evaluating a condition.
fn cost(values: &Values) -> u8 {
    match values {
        Values::DestinationPorts(_) => 0,
        Values::SourceIps(_) | Values::DestinationIps(_) => 1,
        Values::Namespaces(_) | Values::ServiceAccounts(_) | Values::Principals(_) => 2,
    }
}

/// The parts of a connection that conditions compare.
struct Facts<'a> {
    port: u16,
    source: IpAddr,
    destination: IpAddr,
    namespace: &'a str,
    /// `/ns/NAMESPACE/sa/ACCOUNT`, if the identity has this form.
    service_account: Option<&'a str>,
    identity: Option<&'a SpiffeId>,
    aliases: &'a [TrustDomain],
}

impl<'a> Facts<'a> {
    fn new(connection: &Connection<'a>) -> Self {
        let identity = connection.identity;
        let istio = identity.and_then(|identity| identity.namespace_and_service_account());
        Self {
            port: connection.destination.port(),
            // An IPv4-mapped address would bypass denied IPv4 ranges.
            source: connection.source.to_canonical(),
            destination: connection.destination.ip().to_canonical(),
            namespace: istio.map(|(namespace, _)| namespace).unwrap_or_default(),
            service_account: identity.filter(|_| istio.is_some()).map(|identity| identity.path()),
            identity,
            aliases: connection.aliases,
        }
    }
}

impl Program {
    pub(super) fn matches(&self, connection: &Connection<'_>) -> bool {
        let facts = Facts::new(connection);
        let mut at = self.start;
        // Steps refer only to steps that were added before, so the loop terminates.
        while let Some(step) = self.steps.get(at) {
            let holds = self.applies(step, &facts) != step.negated;
            at = if holds { step.then } else { step.otherwise };
        }
        at == MATCH
    }

    /// Whether the connection matches one of the step's values.
    fn applies(&self, step: &Step, facts: &Facts<'_>) -> bool {
        match step.field {
            Field::DestinationPort => values(&self.ports, step).binary_search(&facts.port).is_ok(),
            Field::SourceIp => contains_address(values(&self.ranges, step), facts.source),
            Field::DestinationIp => contains_address(values(&self.ranges, step), facts.destination),
            Field::Namespace => self.any_text(step, facts.namespace),
            Field::ServiceAccount => {
                facts.service_account.is_some_and(|account| self.any_text(step, account))
            }
            Field::Principal => facts.identity.is_some_and(|identity| {
                self.any_text(step, identity.principal())
                    || facts.aliases.iter().any(|alias| self.any_alias(step, alias, identity))
            }),
        }
    }

    /// Whether one of the step's texts matches the identity under another trust domain. Istio
    /// instead compiles each principal for each alias (`pilot/pkg/trustdomain`), with the same
    /// result.
    fn any_alias(&self, step: &Step, alias: &TrustDomain, identity: &SpiffeId) -> bool {
        let (domain, path) = (alias.as_str().as_bytes(), identity.path().as_bytes());
        values(&self.texts, step).iter().any(|Text { kind, letters }| {
            let expected = self.letters.as_bytes().get(letters.clone()).unwrap_or_default();
            match kind {
                Kind::Exact => expected.strip_prefix(domain) == Some(path),
                Kind::Prefix => {
                    domain.starts_with(expected)
                        || expected.strip_prefix(domain).is_some_and(|rest| path.starts_with(rest))
                }
                Kind::Suffix => {
                    path.ends_with(expected)
                        || expected.strip_suffix(path).is_some_and(|rest| domain.ends_with(rest))
                }
                Kind::Presence => true,
            }
        })
    }

    fn any_text(&self, step: &Step, actual: &str) -> bool {
        let actual = actual.as_bytes();
        values(&self.texts, step).iter().any(|Text { kind, letters }| {
            // Most texts differ in length, which avoids fetching them.
            let (least, is_exact) = (letters.len(), *kind == Kind::Exact);
            if actual.len() < least || is_exact && actual.len() != least {
                return false;
            }
            let expected = self.letters.as_bytes().get(letters.clone()).unwrap_or_default();
            match kind {
                Kind::Exact => actual == expected,
                Kind::Prefix => actual.starts_with(expected),
                Kind::Suffix => actual.ends_with(expected),
                Kind::Presence => !actual.is_empty(),
            }
        })
    }
}

fn values<'a, T>(all: &'a [T], step: &Step) -> &'a [T] {
    all.get(step.values.clone()).unwrap_or_default()
}

fn contains_address(ranges: &[(IpAddr, IpAddr)], address: IpAddr) -> bool {
    let later = ranges.partition_point(|(first, _)| *first <= address);
    let nearest = later.checked_sub(1).and_then(|at| ranges.get(at));
    nearest.is_some_and(|(_, last)| address <= *last)
}
