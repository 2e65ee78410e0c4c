//! What the profiles share in making their plans: the settings as rules need them, and a builder
//! that keeps ids, twins and origins consistent.
//!
//! Not here: which rules a profile has.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv6Net};
use underpass_config::{InboundMode, InterceptionSettings, Ipv6, PortRange};

use super::{
    Action, Chain, ChainId, Families, Hook, KUBELET_PROBE_V4, KUBELET_PROBE_V6, LoopbackAddress,
    Match, Origin, PolicyRoute, Ports, Protocol, Rule, RulePlan, Table,
};

pub(super) const TCP: Match = Match::Protocol(Protocol::Tcp);

/// So many networks of one length have a rule of their own, which looks up the masked address in a hash: the kernel fills that in a quarter of the
/// time that the ends of as many ranges take in a tree. A connection passes a rule for each such length, of which there are 33 or 129 at most.
pub(crate) const MANY: usize = 256;

/// The loopback interface's name.
pub(super) const LOOPBACK: &str = "lo";

/// The settings, as the profiles read them.
#[derive(Debug, Clone)]
pub(super) struct Inputs<'a> {
    pub(super) settings: &'a InterceptionSettings,
    pub(super) ports: Ports,
    /// The families whose connections are caught: each has its twin of a rule about addresses.
    pub(super) families: Vec<Family>,
    /// Whether the kernel has IPv6, enabled or not.
    pub(super) ipv6: bool,
    /// Whether inbound connections are caught by TPROXY.
    pub(super) tproxy: bool,
}

/// What differs between the twins of a rule.
#[derive(Debug, Clone, Copy)]
pub(super) struct Family {
    pub(super) v6: bool,
    pub(super) loopback: IpNet,
    pub(super) probe: IpAddr,
    /// Where the sidecar's last hop comes from.
    pub(super) last_hop: IpAddr,
}

impl<'a> Inputs<'a> {
    pub(super) fn new(settings: &'a InterceptionSettings, ports: Ports, ipv6: bool) -> Self {
        let v4 = Family {
            v6: false,
            loopback: settings.loopback_cidr.into(),
            probe: KUBELET_PROBE_V4.into(),
            last_hop: Ipv4Addr::new(127, 0, 0, 6).into(),
        };
        let mut families = vec![v4];
        if ipv6 && settings.ipv6 == Ipv6::Capture {
            families.push(V6);
        }
        let tproxy = settings.inbound.mode == InboundMode::Tproxy;
        Self { settings, ports, families, ipv6, tproxy }
    }

    /// The same for IPv6 alone, as if it were caught.
    pub(super) fn only_v6(&self) -> Self {
        Self { families: vec![V6], tproxy: false, ..self.clone() }
    }

    pub(super) fn rejects_v6(&self) -> bool {
        self.ipv6 && self.settings.ipv6 == Ipv6::Reject
    }

    /// The families of a rule that needs no twin.
    pub(super) fn neutral(&self) -> Families {
        match self.families.as_slice() {
            [family] if family.v6 => Families::V6,
            [_] => Families::V4,
            _ => Families::Both,
        }
    }

    /// The families of rules that serve the proxy's own connections: all that the kernel has.
    pub(super) fn served(&self) -> Families {
        let v6 = self.ipv6 && (self.families.len() > 1 || !self.settings.exact);
        if v6 { Families::Both } else { Families::V4 }
    }

    /// The values of one rule each: Istio's and OSM's own way is a rule for every value, ours is
    /// one for all of them. No rule without values.
    ///
    /// A value that is given twice counts once: iptables makes a rule of each, and what returns from
    /// the first one's chain would meet the second.
    pub(super) fn split<T: Clone + PartialEq>(&self, values: &[T]) -> Vec<Vec<T>> {
        if self.settings.exact {
            return values.iter().map(|value| vec![value.clone()]).collect();
        }
        let mut once: Vec<T> = Vec::new();
        for value in values {
            if !once.contains(value) {
                once.push(value.clone());
            }
        }
        if once.is_empty() { Vec::new() } else { vec![once] }
    }

    /// The same for those of `cidrs` that are of `family`; a network inside another one of them
    /// goes without saying, and [`MANY`] of one length have a rule of their own.
    pub(super) fn networks(&self, family: Family, cidrs: &[IpNet]) -> Vec<Vec<IpNet>> {
        let cidrs = family.of(cidrs);
        if self.settings.exact {
            return self.split(&cidrs);
        }
        let mut lists = by_length(outermost(cidrs));
        lists.retain(|list| !list.is_empty());
        lists
    }

    pub(super) fn destination_ports(&self, ports: &[PortRange]) -> Vec<Match> {
        let ports = self.split(ports).into_iter();
        ports.map(|ports| Match::DestinationPort(Protocol::Tcp, ports)).collect()
    }
}

/// The networks that are in no other one, in order: each sorts before all that it contains.
fn outermost(mut cidrs: Vec<IpNet>) -> Vec<IpNet> {
    cidrs.sort_unstable();
    let mut kept: Vec<IpNet> = Vec::with_capacity(cidrs.len());
    for cidr in cidrs {
        if kept.last().is_none_or(|last| !last.contains(&cidr)) {
            kept.push(cidr);
        }
    }
    kept
}

/// Those of a length that few have together, then those of each other length.
fn by_length(cidrs: Vec<IpNet>) -> Vec<Vec<IpNet>> {
    let mut lengths: BTreeMap<u8, Vec<IpNet>> = BTreeMap::new();
    for cidr in cidrs {
        lengths.entry(cidr.prefix_len()).or_default().push(cidr);
    }
    let (many, few): (Vec<_>, Vec<_>) = lengths.into_values().partition(|list| list.len() >= MANY);
    let mut few = few.concat();
    few.sort_unstable();
    [vec![few], many].concat()
}

const V6: Family = Family {
    v6: true,
    loopback: IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128)),
    probe: IpAddr::V6(KUBELET_PROBE_V6),
    last_hop: IpAddr::V6(Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6)),
};

impl Family {
    /// Those of `cidrs` that are of this family.
    pub(super) fn of(self, cidrs: &[IpNet]) -> Vec<IpNet> {
        cidrs.iter().filter(|cidr| cidr.addr().is_ipv6() == self.v6).copied().collect()
    }

    pub(super) fn families(self) -> Families {
        if self.v6 { Families::V6 } else { Families::V4 }
    }
}

/// A plan in the making.
#[derive(Debug, Default)]
pub(super) struct Builder {
    chains: Vec<Chain>,
    rules: Vec<Rule>,
    routes: Vec<PolicyRoute>,
    addresses: Vec<LoopbackAddress>,
    /// How many rules of a name and families there are.
    numbers: HashMap<String, usize>,
}

impl Builder {
    /// Begins a rule; its chain is made with the first of them. Both families, of the seed, until
    /// told otherwise.
    pub(super) fn rule(
        &mut self,
        chain: ChainId,
        id: impl Into<String>,
        reason: &'static str,
    ) -> RuleBuilder<'_> {
        let rule = Rule {
            id: id.into(),
            reason,
            origin: Origin::Seed,
            chain,
            families: Families::Both,
            matches: Vec::new(),
            action: Action::Return,
            nftables_only: false,
        };
        RuleBuilder { builder: self, rule, numbered: false }
    }

    pub(super) fn route(&mut self, route: PolicyRoute) {
        self.routes.push(route);
    }

    pub(super) fn address(&mut self, address: LoopbackAddress) {
        self.addresses.push(address);
    }

    /// Whether there is a rule of this name for these families.
    pub(super) fn has_rule(&self, name: &str, families: Families) -> bool {
        self.numbers.contains_key(&full_id(name, families))
    }

    /// Takes over finished rules.
    pub(super) fn extend(&mut self, rules: impl IntoIterator<Item = Rule>) {
        for rule in rules {
            self.add(rule);
        }
    }

    pub(super) fn take_rules(self) -> Vec<Rule> {
        self.rules
    }

    /// The plan; with `exact`, without what is ours.
    pub(super) fn finish(mut self, inputs: &Inputs<'_>) -> RulePlan {
        if inputs.settings.exact {
            self.rules.retain(|rule| rule.origin == Origin::Seed);
        }
        // Base chains first, by their tables: the order in which the kernel enters them.
        self.chains.sort_by_key(|chain| (chain.hook.is_none(), chain.id.table, chain.hook));
        RulePlan {
            chains: self.chains,
            rules: self.rules,
            routes: self.routes,
            addresses: self.addresses,
        }
    }

    fn add(&mut self, rule: Rule) {
        self.chain(rule.chain);
        if let Action::Jump(target) = rule.action {
            self.chain(target);
        }
        self.rules.push(rule);
    }

    fn chain(&mut self, id: ChainId) {
        if self.chains.iter().all(|chain| chain.id != id) {
            self.chains.push(Chain { id, hook: hook(id) });
        }
    }
}

/// A rule in the making.
#[derive(Debug)]
pub(super) struct RuleBuilder<'b> {
    builder: &'b mut Builder,
    rule: Rule,
    numbered: bool,
}

impl RuleBuilder<'_> {
    /// The twin for this family.
    pub(super) fn twin(mut self, family: Family) -> Self {
        self.rule.families = family.families();
        self
    }

    pub(super) fn families(mut self, families: Families) -> Self {
        self.rule.families = families;
        self
    }

    /// Not Istio's or OSM's: `exact` leaves it out.
    pub(super) fn ours(mut self) -> Self {
        self.rule.origin = Origin::Ours;
        self
    }

    pub(super) fn nftables_only(mut self) -> Self {
        self.rule.nftables_only = true;
        self
    }

    /// One of several rules of this name, if `exact` splits them.
    pub(super) fn numbered(mut self) -> Self {
        self.numbered = true;
        self
    }

    /// Ends the rule: what a packet must be, and what then happens.
    pub(super) fn when<const N: usize>(self, matches: [Match; N], action: Action) {
        self.when_all(matches.into(), action);
    }

    pub(super) fn when_all(mut self, matches: Vec<Match>, action: Action) {
        self.rule.matches = matches;
        self.rule.action = action;
        let name = std::mem::take(&mut self.rule.id);
        let id = full_id(&name, self.rule.families);
        let number = self.builder.numbers.entry(id.clone()).or_default();
        *number += 1;
        self.rule.id = match *number {
            number if self.numbered && number > 1 => {
                full_id(&format!("{name}-{number}"), self.rule.families)
            }
            _ => id,
        };
        self.builder.add(self.rule);
    }
}

fn full_id(name: &str, families: Families) -> String {
    if families == Families::V6 { format!("{name}-v6") } else { name.to_owned() }
}

/// Built-in chains of iptables are base chains; the names of ours are others.
fn hook(id: ChainId) -> Option<Hook> {
    match id.name {
        "PREROUTING" => Some(Hook::Prerouting),
        "INPUT" => Some(Hook::Input),
        "OUTPUT" => Some(Hook::Output),
        _ => None,
    }
}

/// A chain by its table and name.
pub(super) const fn chain(table: Table, name: &'static str) -> ChainId {
    ChainId { table, name }
}
