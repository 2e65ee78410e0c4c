//! Explains the rules of a profile: the path of each kind of traffic through them.
//!
//! `underpass rules explain` prints it. Every path is computed by evaluating the plan
//! ([`RulePlan::walk`]); only the interfaces are read from a namespace ([`Environment::of`]).
//!
//! Each profile has an article, a published description of the rules that the profile imitates,
//! such as Jimmy Song's on the rules of Istio's sidecar.

mod environment;
mod flows;
mod json;
mod mermaid;
mod network;
mod packet;
mod text;

use std::fmt;

use underpass_config::InterceptionSettings;

use crate::backend::nftables::RuleCounter;
use crate::plan::{
    Action, ConntrackState, Environment, Match, Packet, Ports, Protocol, ReplyOutcome, Rule,
    RulePlan, Table, TraversedChain, Verdict, Walk,
};

pub use packet::{PacketExplanation, Sender};

/// The explanation of a profile's rules. `Display` formats it for a terminal of 100 columns.
#[derive(Debug, Clone)]
pub struct Explanation<'a> {
    settings: &'a InterceptionSettings,
    ports: Ports,
    ipv6: bool,
    plan: RulePlan,
    environment: &'a Environment,
    counters: Option<&'a [RuleCounter]>,
}

/// One kind of traffic: the packets that open its connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flow<'p> {
    /// The id: a number of the profile's article and its tests (`2`, `A7`), or the key of the
    /// setting that the flow is about.
    pub id: String,
    /// The kind of traffic, as a sentence.
    pub title: String,
    /// The path according to the profile's article, if the article describes this flow.
    pub article: Option<&'static str>,
    /// Additional facts, for example where the article is wrong or outdated.
    pub note: Option<&'static str>,
    /// The packets in order.
    pub hops: Vec<Hop<'p>>,
}

/// One packet of a flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hop<'p> {
    /// The sender.
    pub from: Party,
    /// The packet when it is sent.
    pub packet: Packet,
    /// The path of the packet through the rules.
    pub walk: Walk<'p>,
    /// The receiver. `None` if the packet is not delivered.
    pub to: Option<Party>,
    /// The outcome of the reply. `None` if the packet opens no connection or is not delivered.
    pub reply: Option<ReplyOutcome>,
}

/// A sender or receiver in a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Party {
    /// The workload.
    App,
    /// underpass.
    Proxy,
    /// A process beside the proxy with the same user or group.
    Agent,
    /// Another pod, or any host outside of the pod.
    Remote,
    /// The kubelet, which probes the workload.
    Kubelet,
    /// Prometheus, which reads metrics.
    Prometheus,
    /// The mesh's control plane.
    Istiod,
    /// A virtual machine or nested container in the pod.
    VirtualMachine,
    /// A DNS server.
    DnsServer,
}

impl<'a> Explanation<'a> {
    /// Explains the rules for `settings`. `ipv6` is true if the kernel supports IPv6
    /// ([`crate::namespace::ipv6::ipv6_available`]). `counters` are the counters of the installed
    /// rules.
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

    /// The flows of the profile, then the flows about exceptions in the settings.
    #[must_use]
    pub fn flows(&self) -> Vec<Flow<'_>> {
        flows::all(self)
    }

    /// The counter of a rule, if it is installed.
    fn counter(&self, rule: &Rule) -> Option<&RuleCounter> {
        self.counters?.iter().find(|counter| counter.id == rule.id)
    }

    fn evaluate_hop(&self, from: Party, packet: Packet, to: Party) -> Hop<'_> {
        Hop::new(&self.plan, self.environment, from, packet, to)
    }
}

impl<'p> Hop<'p> {
    /// Evaluates a packet. `to` listens at its destination.
    fn new(
        plan: &'p RulePlan,
        environment: &Environment,
        from: Party,
        packet: Packet,
        to: Party,
    ) -> Self {
        let walk = plan.walk(&packet, environment);
        let to = match walk.end {
            Verdict::Direct => Some(to),
            Verdict::Redirected(_) | Verdict::Tproxied(_) => Some(Party::Proxy),
            Verdict::Rejected | Verdict::Dropped => None,
        };
        let opens = packet.protocol == Protocol::Tcp && packet.state == ConntrackState::New;
        let reply = plan.reply(&packet, &walk, environment).filter(|_| opens);
        Self { from, packet, walk, to, reply }
    }

    /// The rule that decided the packet's verdict. For a redirect, this is the rule that jumped to
    /// the redirect.
    #[must_use]
    pub fn decided_by(&self) -> Option<&'p Rule> {
        let causes_verdict = |action: Action| match self.walk.end {
            Verdict::Redirected(_) => matches!(action, Action::Redirect(_)),
            Verdict::Tproxied(_) => matches!(action, Action::Tproxy(..)),
            Verdict::Rejected => action == Action::Reject,
            Verdict::Dropped => action == Action::Drop,
            Verdict::Direct => matches!(action, Action::Accept | Action::Return),
        };
        // If a nat rule and another rule both exempt the packet, the nat rule decides.
        let in_nat = |passage: &&&TraversedChain<'p>| passage.chain.table == Table::Nat;
        let traversed = &self.walk.traversed;
        let nat_first = traversed.iter().filter(|passage| in_nat(&passage));
        let others = traversed.iter().rev().filter(|passage| !in_nat(&passage));
        nat_first.chain(others).find_map(|passage| {
            let (last, before) = passage.rules.split_last()?;
            if !causes_verdict(last.action) {
                return None;
            }
            let jump = |rule: &&&Rule| rule.action == Action::Jump(last.chain);
            let jumped = before.iter().rev().find(jump);
            let caught = jumped.filter(|rule| {
                self.walk.end != Verdict::Direct && is_conditional_jump(rule, passage)
            });
            Some(*caught.unwrap_or(last))
        })
    }

    /// The chains to print: nat chains, and chains in which more than a jump matched.
    fn notable_chains(&self) -> impl Iterator<Item = &TraversedChain<'p>> {
        self.walk.traversed.iter().filter(|passage| {
            let jump = |rule: &&Rule| matches!(rule.action, Action::Jump(_));
            passage.chain.table == Table::Nat || !passage.rules.iter().all(jump)
        })
    }
}

/// Returns true for a jump with a condition, false for a jump that matches every packet.
fn is_conditional_jump(jump: &Rule, passage: &TraversedChain<'_>) -> bool {
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
