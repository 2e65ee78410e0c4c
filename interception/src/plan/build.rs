//! The parts that all profiles share: the settings in the form that rules need, and the builder of
//! a plan.
//!
//! The builder keeps rule ids unique, and builds the IPv4 and IPv6 variants of a rule consistently.
//! It contains no rule of a profile.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv6Net};
use underpass_config::{InboundMode, InterceptionSettings, Ipv6, PortRange};

use super::{
    Action, Chain, ChainId, Families, Hook, KUBELET_PROBE_V4, KUBELET_PROBE_V6, LoopbackAddress,
    Match, Origin, PolicyRoute, Ports, Protocol, Rule, RulePlan, Table,
};

pub(super) const TCP: Match = Match::Protocol(Protocol::Tcp);

/// From this number on, networks with the same prefix length get their own rule with a hash set.
///
/// The rule looks up the masked address. The kernel fills a hash in a quarter of the time that it
/// needs for the interval tree of as many ranges. There are at most 33 (IPv4) or 129 (IPv6) such
/// rules, one for each prefix length.
pub(crate) const HASHED_NETWORKS_MIN: usize = 256;

/// The name of the loopback interface.
pub(super) const LOOPBACK: &str = "lo";

/// The settings, in the form that the profiles need.
#[derive(Debug, Clone)]
pub(super) struct Inputs<'a> {
    pub(super) settings: &'a InterceptionSettings,
    pub(super) ports: Ports,
    /// The address families whose connections are captured. A rule with addresses has a variant for
    /// each.
    pub(super) families: Vec<Family>,
    /// True if the kernel supports IPv6, enabled or not.
    pub(super) ipv6: bool,
    /// True if inbound connections are captured by TPROXY.
    pub(super) tproxy: bool,
}

/// The addresses that differ between the IPv4 and the IPv6 variant of a rule.
#[derive(Debug, Clone, Copy)]
pub(super) struct Family {
    pub(super) v6: bool,
    pub(super) loopback: IpNet,
    pub(super) probe: IpAddr,
    /// The source address of the sidecar's connections to the workload.
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

    /// The same inputs for IPv6 alone, as if IPv6 were captured.
    pub(super) fn only_v6(&self) -> Self {
        Self { families: vec![V6], tproxy: false, ..self.clone() }
    }

    pub(super) fn rejects_v6(&self) -> bool {
        self.ipv6 && self.settings.ipv6 == Ipv6::Reject
    }

    /// The families of rules for captured connections.
    pub(super) fn captured(&self) -> Families {
        match self.families.as_slice() {
            [family] if family.v6 => Families::V6,
            [_] => Families::V4,
            _ => Families::Both,
        }
    }

    /// The families of rules for the proxy's own connections: all that the kernel supports.
    pub(super) fn supported(&self) -> Families {
        let v6 = self.ipv6 && (self.families.len() > 1 || !self.settings.exact);
        if v6 { Families::Both } else { Families::V4 }
    }

    /// Groups values into rules: with `exact` one rule for each value, as in Istio and OSM,
    /// otherwise one rule for all. Without values, no rule.
    ///
    /// Removes duplicates. With iptables, each duplicate would become a rule, and a packet that
    /// returns from the chain of the first rule would match the second.
    pub(super) fn split<T: Clone + PartialEq>(&self, values: &[T]) -> Vec<Vec<T>> {
        if self.settings.exact {
            return values.iter().map(|value| vec![value.clone()]).collect();
        }
        let mut unique: Vec<T> = Vec::new();
        for value in values {
            if !unique.contains(value) {
                unique.push(value.clone());
            }
        }
        if unique.is_empty() { Vec::new() } else { vec![unique] }
    }

    /// Groups the networks of `family` into rules. Drops a network that another one contains.
    /// [`HASHED_NETWORKS_MIN`] networks with the same prefix length get their own rule.
    pub(super) fn networks(&self, family: Family, cidrs: &[IpNet]) -> Vec<Vec<IpNet>> {
        let cidrs = family.of(cidrs);
        if self.settings.exact {
            return self.split(&cidrs);
        }
        let mut lists = by_prefix_length(outermost(cidrs));
        lists.retain(|list| !list.is_empty());
        lists
    }

    pub(super) fn destination_ports(&self, ports: &[PortRange]) -> Vec<Match> {
        let ports = self.split(ports).into_iter();
        ports.map(|ports| Match::DestinationPort(Protocol::Tcp, ports)).collect()
    }
}

/// Removes networks that another one contains. A network sorts before the networks that it
/// contains.
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

/// Groups networks by prefix length. All prefix lengths with few networks share the first group.
fn by_prefix_length(cidrs: Vec<IpNet>) -> Vec<Vec<IpNet>> {
    let mut lengths: BTreeMap<u8, Vec<IpNet>> = BTreeMap::new();
    for cidr in cidrs {
        lengths.entry(cidr.prefix_len()).or_default().push(cidr);
    }
    let (many, few): (Vec<_>, Vec<_>) =
        lengths.into_values().partition(|list| list.len() >= HASHED_NETWORKS_MIN);
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
    /// The networks in `cidrs` of this family.
    pub(super) fn of(self, cidrs: &[IpNet]) -> Vec<IpNet> {
        cidrs.iter().filter(|cidr| cidr.addr().is_ipv6() == self.v6).copied().collect()
    }

    pub(super) fn families(self) -> Families {
        if self.v6 { Families::V6 } else { Families::V4 }
    }
}

/// Builds a plan rule by rule.
#[derive(Debug, Default)]
pub(super) struct Builder {
    chains: Vec<Chain>,
    rules: Vec<Rule>,
    routes: Vec<PolicyRoute>,
    addresses: Vec<LoopbackAddress>,
    /// The number of rules with each name and families.
    numbers: HashMap<String, usize>,
}

impl Builder {
    /// Starts a rule, and adds its chain if it is new. By default the rule applies to both families
    /// and has [`Origin::Mesh`].
    pub(super) fn rule(
        &mut self,
        chain: ChainId,
        id: impl Into<String>,
        reason: &'static str,
    ) -> RuleBuilder<'_> {
        let rule = Rule {
            id: id.into(),
            reason,
            origin: Origin::Mesh,
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

    /// Returns true if a rule with this name exists for these families.
    pub(super) fn has_rule(&self, name: &str, families: Families) -> bool {
        self.numbers.contains_key(&full_id(name, families))
    }

    /// Adds finished rules.
    pub(super) fn extend(&mut self, rules: impl IntoIterator<Item = Rule>) {
        for rule in rules {
            self.add(rule);
        }
    }

    pub(super) fn take_rules(self) -> Vec<Rule> {
        self.rules
    }

    /// Returns the plan. With `exact`, removes the rules of [`Origin::Underpass`].
    pub(super) fn finish(mut self, inputs: &Inputs<'_>) -> RulePlan {
        if inputs.settings.exact {
            self.rules.retain(|rule| rule.origin == Origin::Mesh);
        }
        // Base chains first, sorted by table: packets enter them in this order.
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

/// A rule under construction. [`RuleBuilder::when`] adds it to the plan.
#[derive(Debug)]
pub(super) struct RuleBuilder<'b> {
    builder: &'b mut Builder,
    rule: Rule,
    numbered: bool,
}

impl RuleBuilder<'_> {
    /// Restricts the rule to this address family.
    pub(super) fn for_family(mut self, family: Family) -> Self {
        self.rule.families = family.families();
        self
    }

    pub(super) fn families(mut self, families: Families) -> Self {
        self.rule.families = families;
        self
    }

    /// Marks a rule that neither Istio nor OSM has. `exact` removes it.
    pub(super) fn omitted_by_exact(mut self) -> Self {
        self.rule.origin = Origin::Underpass;
        self
    }

    pub(super) fn nftables_only(mut self) -> Self {
        self.rule.nftables_only = true;
        self
    }

    /// Allows several rules with this name, for the values that `exact` splits.
    pub(super) fn numbered(mut self) -> Self {
        self.numbered = true;
        self
    }

    /// Finishes the rule with its conditions and its action.
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

/// The hook of a chain. The built-in chains of iptables are base chains; others have no hook.
fn hook(id: ChainId) -> Option<Hook> {
    match id.name {
        "PREROUTING" => Some(Hook::Prerouting),
        "INPUT" => Some(Hook::Input),
        "OUTPUT" => Some(Hook::Output),
        _ => None,
    }
}

/// Identifies a chain by table and name.
pub(super) const fn chain(table: Table, name: &'static str) -> ChainId {
    ChainId { table, name }
}
