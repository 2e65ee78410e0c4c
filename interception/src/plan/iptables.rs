//! Prints a plan as input of `iptables-restore`, in the format of `iptables-save`.
//!
//! The plan can thus be compared with the kernel's rules line by line. Rules carry no comments:
//! gVisor has no comment match, and Istio and OSM use none. `crate::backend::iptables` runs the
//! programs.

mod conditions;

use std::fmt;

use ipnet::IpNet;

use super::{Action, ChainId, Direction, Mark, Protocol, Rule, RulePlan, Table};
use conditions::Conditions;

/// The tables in the order in which a packet passes them.
pub(crate) const TABLES: [Table; 4] = [Table::Raw, Table::Mangle, Table::Nat, Table::Filter];

/// An address family. Each has its own ruleset: `iptables` or `ip6tables`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// One line of a family's ruleset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Line<'p> {
    /// The chain that contains the line.
    pub(crate) chain: ChainId,
    /// The rule that the line belongs to. Where iptables has no lists, a rule has one line per
    /// value.
    pub(crate) rule: &'p Rule,
    /// The text after the chain's name: `-p tcp -m tcp --dport 80 -j RETURN`.
    pub(crate) text: String,
}

impl RulePlan {
    /// Prints the input for `iptables-restore --noflush` or `ip6tables-restore --noflush`. It
    /// flushes the chains that it names, and appends to the built-in chains. Empty if the plan has
    /// no rules for this family.
    #[must_use]
    pub fn iptables(&self, family: Family) -> String {
        let lines = self.lines(family);
        let mut text = String::new();
        for table in TABLES {
            let chains = self.chains_in(table, &lines);
            if chains.is_empty() {
                continue;
            }
            text.push_str(&format!("*{}\n", table.name()));
            for chain in chains.iter().filter(|chain| !self.is_built_in(**chain)) {
                text.push_str(&format!(":{} - [0:0]\n", chain.name));
            }
            for chain in chains {
                for line in lines.iter().filter(|line| line.chain == chain) {
                    text.push_str(&format!("{line}\n"));
                }
            }
            text.push_str("COMMIT\n");
        }
        text
    }

    /// The lines of a family in rule order.
    pub(crate) fn lines(&self, family: Family) -> Vec<Line<'_>> {
        let of_family =
            |rule: &&Rule| !rule.nftables_only && rule.families.contains(family == Family::V6);
        let rules = self.rules.iter().filter(of_family);
        rules
            .flat_map(|rule| {
                let texts = texts(rule, family).into_iter();
                texts.map(move |text| Line { chain: rule.chain, rule, text })
            })
            .collect()
    }

    /// The chains of a table that contain `lines` or are their jump targets, in plan order.
    pub(crate) fn chains_in(&self, table: Table, lines: &[Line<'_>]) -> Vec<ChainId> {
        let needed = |id: ChainId| {
            lines.iter().any(|line| line.chain == id || line.rule.action == Action::Jump(id))
        };
        let chains = self.chains.iter().map(|chain| chain.id);
        chains.filter(|id| id.table == table && needed(*id)).collect()
    }

    /// Returns true for the built-in chains of iptables.
    pub(crate) fn is_built_in(&self, id: ChainId) -> bool {
        self.chains.iter().any(|chain| chain.id == id && chain.hook.is_some())
    }
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "-A {}", self.chain.name)?;
        if self.text.is_empty() { Ok(()) } else { write!(f, " {}", self.text) }
    }
}

impl Family {
    fn has(self, net: &IpNet) -> bool {
        net.addr().is_ipv6() == (self == Self::V6)
    }

    /// The network that contains all addresses of the family.
    fn everything(self) -> IpNet {
        match self {
            Self::V4 => IpNet::V4(ipnet::Ipv4Net::default()),
            Self::V6 => IpNet::V6(ipnet::Ipv6Net::default()),
        }
    }
}

/// Prints a rule for iptables: a text for each combination of its lists' values.
fn texts(rule: &Rule, family: Family) -> Vec<String> {
    let mut conditions = Conditions::default();
    for condition in &rule.matches {
        conditions.add(condition, family);
    }
    let target = target(rule.action, conditions.protocol, family);
    let alternatives = conditions.alternatives(family).into_iter().chain([vec![target]]);
    alternatives.fold(vec![String::new()], |texts, alternatives| {
        let with = |text: &String| {
            let text = text.clone();
            alternatives.iter().map(move |word| match (text.as_str(), word.as_str()) {
                (text, "") => text.to_owned(),
                ("", word) => word.to_owned(),
                (text, word) => format!("{text} {word}"),
            })
        };
        texts.iter().flat_map(|text| with(text).collect::<Vec<_>>()).collect()
    })
}

fn target(action: Action, protocol: Option<Protocol>, family: Family) -> String {
    let any_address = match family {
        Family::V4 => "0.0.0.0",
        Family::V6 => "::",
    };
    match action {
        Action::Accept => "-j ACCEPT".to_owned(),
        Action::Return => "-j RETURN".to_owned(),
        Action::Drop => "-j DROP".to_owned(),
        Action::Reject => {
            let with = match (protocol, family) {
                (Some(Protocol::Tcp), _) => "tcp-reset",
                (_, Family::V4) => "icmp-port-unreachable",
                (_, Family::V6) => "icmp6-port-unreachable",
            };
            format!("-j REJECT --reject-with {with}")
        }
        Action::Jump(chain) => format!("-j {}", chain.name),
        Action::Redirect(port) => format!("-j REDIRECT --to-ports {port}"),
        Action::Tproxy(port, mark) => {
            format!(
                "-j TPROXY --on-port {port} --on-ip {any_address} --tproxy-mark {}",
                value_and_mask(mark)
            )
        }
        Action::MarkPacket(mark) => format!("-j MARK --set-xmark {}", value_and_mask(mark)),
        Action::MarkConnection(mark) => format!("-j CONNMARK --set-xmark {}", value_and_mask(mark)),
        Action::SaveMark => whole_mark("--save-mark"),
        Action::RestoreMark => whole_mark("--restore-mark"),
        Action::Zone(zone, None) => format!("-j CT --zone {zone}"),
        Action::Zone(zone, Some(Direction::Original)) => format!("-j CT --zone-orig {zone}"),
        Action::Zone(zone, Some(Direction::Reply)) => format!("-j CT --zone-reply {zone}"),
    }
}

fn whole_mark(option: &str) -> String {
    format!("-j CONNMARK {option} --nfmask 0xffffffff --ctmask 0xffffffff")
}

/// Formats the mark of a match. iptables-save omits a full mask in matches, but not in targets.
fn compared(mark: Mark) -> String {
    if mark.mask == u32::MAX { format!("{:#x}", mark.value) } else { value_and_mask(mark) }
}

fn value_and_mask(mark: Mark) -> String {
    format!("{:#x}/{:#x}", mark.value, mark.mask)
}

fn name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    }
}

#[cfg(test)]
mod tests;
