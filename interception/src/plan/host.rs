//! The rules in the host's network namespace. They translate the source of the node's connections
//! to its pods to the source address of kubelet probes, which the rules in a pod exempt from
//! capture (`interception.kubelet_probes`).
//!
//! Forwarded connections, such as those of other hosts through kube-proxy, may also have the node's
//! address as their source. Therefore only connections of a local socket are translated. Forwarded
//! packets that already have the probe address are dropped.

use std::collections::BTreeSet;
use std::fmt::{self, Display, Formatter};
use std::net::IpAddr;

use ipnet::IpNet;

use super::nft::{ChainKind, NamedSet, Operand, Values, operand_of, write_match};
use super::{KUBELET_PROBE_V4, KUBELET_PROBE_V6, Match, Protocol};

/// The name of the nftables table in the host's namespace. Its family is `inet`.
pub const HOST_TABLE: &str = "underpass_host";

/// The user that no socket has ((uid_t)-1). Comparing with it fails for a packet without a local
/// socket, because the kernel then stops evaluating the rule (`nft_meta_get_eval_skugid`).
const NO_USER: u32 = u32::MAX;

/// The rules in the host's namespace for pods with certain addresses.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostPlan {
    pods: BTreeSet<IpAddr>,
}

/// The elements by which the sets of two plans differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ChangedElements {
    pub(crate) removed: Vec<NamedSet>,
    pub(crate) added: Vec<NamedSet>,
}

/// A base chain of the table, with the policy `accept`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HostChain {
    /// Before connection tracking, for packets that arrive.
    Prerouting,
    /// Before the source NAT of other programs: the first translation of a connection stays in
    /// effect.
    Postrouting,
}

/// A rule with a counter; its comment is its id.
#[derive(Debug, Clone)]
pub(crate) struct HostRule {
    pub(crate) id: &'static str,
    pub(crate) chain: HostChain,
    pub(crate) matches: Vec<(Match, Operand)>,
    pub(crate) action: HostAction,
}

/// The action of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HostAction {
    Drop,
    /// Translate the source address of the connection.
    SourceNat(IpAddr),
}

/// An address family.
#[derive(Debug, Clone, Copy)]
struct Family {
    is_v6: bool,
    probe: IpAddr,
    set: &'static str,
    /// The ids of the two rules.
    ids: [&'static str; 2],
}

const FAMILIES: [Family; 2] = [
    Family {
        is_v6: false,
        probe: IpAddr::V4(KUBELET_PROBE_V4),
        set: "pods",
        ids: ["forged-probe", "translate-probe"],
    },
    Family {
        is_v6: true,
        probe: IpAddr::V6(KUBELET_PROBE_V6),
        set: "pods-v6",
        ids: ["forged-probe-v6", "translate-probe-v6"],
    },
];

impl HostChain {
    pub(crate) const ALL: [Self; 2] = [Self::Prerouting, Self::Postrouting];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Prerouting => "prerouting",
            Self::Postrouting => "postrouting",
        }
    }

    pub(crate) fn kind(self) -> ChainKind {
        match self {
            Self::Prerouting => ChainKind::Filter,
            Self::Postrouting => ChainKind::Nat,
        }
    }

    pub(crate) fn priority(self) -> i32 {
        match self {
            Self::Prerouting => -300,
            // The usual priority of source NAT is 100.
            Self::Postrouting => 99,
        }
    }
}

impl HostPlan {
    /// Creates the rules for pods with these addresses.
    pub fn new(pods: impl IntoIterator<Item = IpAddr>) -> Self {
        Self { pods: pods.into_iter().map(|address| address.to_canonical()).collect() }
    }

    /// The addresses of the pods.
    #[must_use]
    pub fn pods(&self) -> &BTreeSet<IpAddr> {
        &self.pods
    }

    /// A set for each family in which a pod has an address.
    pub(crate) fn sets(&self) -> Vec<NamedSet> {
        FAMILIES.iter().filter_map(|family| self.set(*family)).collect()
    }

    pub(crate) fn rules(&self) -> Vec<HostRule> {
        let rules = |family: &Family| self.set(*family).map(|set| family.rules(set));
        FAMILIES.iter().filter_map(rules).flatten().collect()
    }

    /// The elements that differ in the plan `new`. `None` if the plans have different sets, and so
    /// different rules.
    pub(crate) fn changed_elements(&self, new: &Self) -> Option<ChangedElements> {
        let has_set = |plan: &Self, family| plan.set(family).is_some();
        let are_equal = |family: &Family| has_set(self, *family) == has_set(new, *family);
        let without = |plan: &Self, other: &Self| Self { pods: &plan.pods - &other.pods }.sets();
        FAMILIES
            .iter()
            .all(are_equal)
            .then(|| ChangedElements { removed: without(self, new), added: without(new, self) })
    }

    fn set(&self, family: Family) -> Option<NamedSet> {
        let pods = self.pods.iter().filter(|address| address.is_ipv6() == family.is_v6);
        let pods: Vec<_> = pods.copied().map(IpNet::from).collect();
        let name = family.set.to_owned();
        (!pods.is_empty()).then_some(NamedSet { name, values: Values::Cidrs(pods) })
    }
}

impl Family {
    fn rules(self, pods: NamedSet) -> [HostRule; 2] {
        let networks = match &pods.values {
            Values::Cidrs(networks) => networks.clone(),
            _ => Vec::new(),
        };
        let to_pods = (Match::Destination(networks), Operand::Set(pods));
        let alone = |condition: Match| {
            let operand = operand_of(&condition);
            (condition, operand)
        };
        let [forged, translate] = self.ids;
        [
            HostRule {
                id: forged,
                chain: HostChain::Prerouting,
                matches: vec![alone(Match::Source(vec![self.probe.into()])), to_pods.clone()],
                action: HostAction::Drop,
            },
            HostRule {
                id: translate,
                chain: HostChain::Postrouting,
                matches: vec![
                    alone(Match::Protocol(Protocol::Tcp)),
                    alone(Match::NotUid(vec![NO_USER])),
                    to_pods,
                ],
                action: HostAction::SourceNat(self.probe),
            },
        ]
    }
}

/// The plan as input for `nft -f -`.
impl Display for HostPlan {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for command in ["add", "delete", "add"] {
            writeln!(f, "{command} table inet {HOST_TABLE}")?;
        }
        for chain in HostChain::ALL {
            let (name, kind, priority) = (chain.name(), chain.kind(), chain.priority());
            writeln!(
                f,
                "add chain inet {HOST_TABLE} {name} {{ type {kind} hook {name} priority {priority}; policy accept; }}"
            )?;
        }
        for set in self.sets() {
            writeln!(f, "add {}", set.statement(HOST_TABLE))?;
        }
        for rule in self.rules() {
            let (chain, id) = (rule.chain.name(), rule.id);
            writeln!(f, "add rule inet {HOST_TABLE} {chain} {rule} comment \"{id}\"")?;
        }
        Ok(())
    }
}

/// The matches and the action of the rule.
impl Display for HostRule {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (condition, operand) in &self.matches {
            write_match(f, condition, operand)?;
            f.write_str(" ")?;
        }
        match self.action {
            HostAction::Drop => f.write_str("counter drop"),
            HostAction::SourceNat(source) => write!(f, "counter snat to {source}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "\
add table inet underpass_host
delete table inet underpass_host
add table inet underpass_host
add chain inet underpass_host prerouting { type filter hook prerouting priority -300; policy accept; }
add chain inet underpass_host postrouting { type nat hook postrouting priority 99; policy accept; }
";

    fn plan(pods: &[&str]) -> HostPlan {
        HostPlan::new(pods.iter().map(|pod| pod.parse().unwrap()))
    }

    #[test]
    fn plan_without_pods_has_no_rules() {
        assert_eq!(plan(&[]).to_string(), EMPTY);
    }

    #[test]
    fn plan_of_both_families_prints_sets_and_rules() {
        let text = "\
add set inet underpass_host pods { type ipv4_addr; elements = { 10.0.0.1, 10.0.0.2 } }
add set inet underpass_host pods-v6 { type ipv6_addr; elements = { fd00::1 } }
add rule inet underpass_host prerouting ip saddr 169.254.7.127 ip daddr @pods counter drop comment \"forged-probe\"
add rule inet underpass_host postrouting meta l4proto tcp meta skuid != 4294967295 ip daddr @pods counter snat to 169.254.7.127 comment \"translate-probe\"
add rule inet underpass_host prerouting ip6 saddr fd16:9254:7127:1337:ffff:ffff:ffff:ffff ip6 daddr @pods-v6 counter drop comment \"forged-probe-v6\"
add rule inet underpass_host postrouting meta l4proto tcp meta skuid != 4294967295 ip6 daddr @pods-v6 counter snat to fd16:9254:7127:1337:ffff:ffff:ffff:ffff comment \"translate-probe-v6\"
";
        let pods = ["10.0.0.2", "fd00::1", "10.0.0.1", "::ffff:10.0.0.1"];
        assert_eq!(plan(&pods).to_string(), format!("{EMPTY}{text}"));
    }

    #[test]
    fn changed_elements_are_those_of_one_plan_only() {
        let before = plan(&["10.0.0.1", "10.0.0.2", "fd00::1"]);
        let changed = before.changed_elements(&plan(&["10.0.0.2", "10.0.0.3", "fd00::1"])).unwrap();
        assert_eq!(changed.removed, plan(&["10.0.0.1"]).sets());
        assert_eq!(changed.added, plan(&["10.0.0.3"]).sets());
        assert_eq!(before.changed_elements(&plan(&["10.0.0.1"])), None, "a set is missing");
    }

    #[test]
    fn adjacent_addresses_are_not_merged() {
        let text = plan(&["10.0.0.0", "10.0.0.1"]).to_string();
        assert!(text.contains("elements = { 10.0.0.0, 10.0.0.1 }"), "{text}");
    }
}
