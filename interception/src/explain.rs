//! What the rules do to each kind of traffic: the question of everybody who meets such rules, and
//! the answer of `underpass rules explain`.
//!
//! Every path is walked through the plan ([`RulePlan::walk`]); none is written down by hand. Not
//! here: installing or reading anything, except the interfaces of a namespace
//! ([`Environment::of`]).

mod environment;
mod flows;
mod json;
mod mermaid;
mod packet;
mod scene;
mod text;

use std::fmt;

use underpass_config::InterceptionSettings;

use crate::RuleCounter;
use crate::plan::{
    Action, Answer, End, Environment, Match, Packet, Passage, Ports, Protocol, Rule, RulePlan,
    State, Table, Walk,
};

pub use packet::{PacketExplanation, Sender};

/// The rules of a profile, explained. `Display` is for a terminal of 100 columns.
#[derive(Debug, Clone)]
pub struct Explanation<'a> {
    settings: &'a InterceptionSettings,
    ports: Ports,
    ipv6: bool,
    plan: RulePlan,
    environment: &'a Environment,
    counters: Option<&'a [RuleCounter]>,
}

/// One kind of traffic: the packets that open its connections, one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flow<'p> {
    /// Its name: a number of the seed articles and their tests (`2`, `A7`), or the key of the
    /// setting that it is about.
    pub id: String,
    /// What it is.
    pub title: String,
    /// The path that the article about this profile gives, if it speaks of it.
    pub article: Option<&'static str>,
    /// What else there is to know, above all where the article is wrong or old.
    pub note: Option<&'static str>,
    /// Its packets.
    pub hops: Vec<Hop<'p>>,
}

/// One packet of a flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hop<'p> {
    /// Who sends it.
    pub from: Party,
    /// What is sent.
    pub packet: Packet,
    /// What becomes of it.
    pub walk: Walk<'p>,
    /// Who gets it; `None`: nobody.
    pub to: Option<Party>,
    /// What becomes of its answer, if it opens a connection and somebody gets it.
    pub answer: Option<Answer>,
}

/// Who takes part in a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Party {
    /// The workload.
    App,
    /// underpass.
    Proxy,
    /// A process beside the proxy, of the same user or group.
    Agent,
    /// Another pod, or anything outside.
    Remote,
    /// The kubelet, which probes.
    Kubelet,
    /// What reads metrics.
    Prometheus,
    /// The mesh's control plane.
    Istiod,
    /// A virtual machine or nested container in the pod.
    VirtualMachine,
    /// A DNS server.
    DnsServer,
}

impl<'a> Explanation<'a> {
    /// Explains the rules that `settings` ask for. `ipv6`: whether the kernel has IPv6
    /// ([`crate::ipv6_available`]). `counters`: those of the installed rules.
    #[must_use]
    pub fn new(
        settings: &'a InterceptionSettings,
        ports: Ports,
        ipv6: bool,
        environment: &'a Environment,
        counters: Option<&'a [RuleCounter]>,
    ) -> Self {
        let plan = RulePlan::new(settings, ports, ipv6);
        Self { settings, ports, ipv6, plan, environment, counters }
    }

    /// Each kind of traffic of the profile, and of the settings.
    #[must_use]
    pub fn flows(&self) -> Vec<Flow<'_>> {
        flows::all(self)
    }

    /// How often a rule matched, if it is installed.
    fn counter(&self, rule: &Rule) -> Option<&RuleCounter> {
        self.counters?.iter().find(|counter| counter.id == rule.id)
    }

    fn takes(&self, from: Party, packet: Packet, to: Party) -> Hop<'_> {
        Hop::new(&self.plan, self.environment, from, packet, to)
    }
}

impl<'p> Hop<'p> {
    /// `to`: who listens where the packet is going.
    fn new(
        plan: &'p RulePlan,
        environment: &Environment,
        from: Party,
        packet: Packet,
        to: Party,
    ) -> Self {
        let walk = plan.walk(&packet, environment);
        let to = match walk.end {
            End::Direct => Some(to),
            End::Redirected(_) | End::Tproxied(_) => Some(Party::Proxy),
            End::Rejected | End::Dropped => None,
        };
        let opens = packet.protocol == Protocol::Tcp && packet.state == State::New;
        let answer = plan.answer(&packet, &walk, environment).filter(|_| opens);
        Self { from, packet, walk, to, answer }
    }

    /// The rule that decided, if one did: where it only catches, the one that jumped to it.
    #[must_use]
    pub fn decided_by(&self) -> Option<&'p Rule> {
        let ended = |action: Action| match self.walk.end {
            End::Redirected(_) => matches!(action, Action::Redirect(_)),
            End::Tproxied(_) => matches!(action, Action::Tproxy(..)),
            End::Rejected => action == Action::Reject,
            End::Dropped => action == Action::Drop,
            End::Direct => matches!(action, Action::Accept | Action::Return),
        };
        // Nat decides where both do; what is left alone by name may be so elsewhere.
        let in_nat = |passage: &&&Passage<'p>| passage.chain.table == Table::Nat;
        let passages = &self.walk.passages;
        let nat_first = passages.iter().filter(|passage| in_nat(&passage));
        let others = passages.iter().rev().filter(|passage| !in_nat(&passage));
        nat_first.chain(others).find_map(|passage| {
            let (last, before) = passage.rules.split_last()?;
            if !ended(last.action) {
                return None;
            }
            let jump = |rule: &&&Rule| rule.action == Action::Jump(last.chain);
            let jumped = before.iter().rev().find(jump);
            let caught =
                jumped.filter(|rule| self.walk.end != End::Direct && tells_apart(rule, passage));
            Some(*caught.unwrap_or(last))
        })
    }

    /// The passages that say something: those of nat, and those where more than a jump matched.
    fn telling(&self) -> impl Iterator<Item = &Passage<'p>> {
        self.walk.passages.iter().filter(|passage| {
            let jump = |rule: &&Rule| matches!(rule.action, Action::Jump(_));
            passage.chain.table == Table::Nat || !passage.rules.iter().all(jump)
        })
    }
}

/// Whether a jump chooses packets, rather than hand all of a base chain to ours.
fn tells_apart(jump: &Rule, passage: &Passage<'_>) -> bool {
    let by_protocol =
        |condition: &Match| matches!(condition, Match::Protocol(_) | Match::TcpModule);
    jump.chain != passage.chain || !jump.matches.iter().all(by_protocol)
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::App => "app",
            Self::Proxy => "proxy",
            Self::Agent => "agent",
            Self::Remote => "remote",
            Self::Kubelet => "kubelet",
            Self::Prometheus => "Prometheus",
            Self::Istiod => "istiod",
            Self::VirtualMachine => "VM",
            Self::DnsServer => "DNS server",
        })
    }
}

#[cfg(test)]
mod tests;
