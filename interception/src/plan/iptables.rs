//! A plan as `iptables-restore` reads it, in the very words in which `iptables-save` prints it, so that
//! the two can be compared line by line.
//!
//! Not here: how it gets into the kernel (`iptables.rs`). No rule has a comment: gVisor has no
//! comment match, and the listings of Istio and OSM have none.

mod conditions;

use std::fmt;

use ipnet::IpNet;

use super::{Action, ChainId, Direction, Mark, Protocol, Rule, RulePlan, Table};
use conditions::Conditions;

/// The tables, in the order in which a packet passes them.
pub(crate) const TABLES: [Table; 4] = [Table::Raw, Table::Mangle, Table::Nat, Table::Filter];

/// An address family, each of which has a ruleset of its own: that of iptables, or of ip6tables.
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
    /// The chain that it stands in.
    pub(crate) chain: ChainId,
    /// The rule that it is of. Where iptables knows no lists, a rule has a line for each value.
    pub(crate) rule: &'p Rule,
    /// What follows the name of the chain: `-p tcp -m tcp --dport 80 -j RETURN`.
    pub(crate) text: String,
}

impl RulePlan {
    /// What `iptables-restore --noflush` (for IPv6, `ip6tables-restore --noflush`) makes the rules of;
    /// empty if the plan has none of this family. It flushes the chains that it names, and adds to the
    /// built-in ones.
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

    /// The lines of a family, in the order of the rules.
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

    /// The chains of a table that `lines` stand in or jump to, in the order of the plan.
    pub(crate) fn chains_in(&self, table: Table, lines: &[Line<'_>]) -> Vec<ChainId> {
        let needed = |id: ChainId| {
            lines.iter().any(|line| line.chain == id || line.rule.action == Action::Jump(id))
        };
        let chains = self.chains.iter().map(|chain| chain.id);
        chains.filter(|id| id.table == table && needed(*id)).collect()
    }

    /// Whether the chain is one that iptables has without us.
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

    /// All its addresses.
    fn everything(self) -> IpNet {
        match self {
            Self::V4 => IpNet::V4(ipnet::Ipv4Net::default()),
            Self::V6 => IpNet::V6(ipnet::Ipv6Net::default()),
        }
    }
}

/// A rule in the words of iptables: one text for each combination of the values that its lists have.
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
    let nowhere = match family {
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
            format!("-j TPROXY --on-port {port} --on-ip {nowhere} --tproxy-mark {}", written(mark))
        }
        Action::MarkPacket(mark) => format!("-j MARK --set-xmark {}", written(mark)),
        Action::MarkConnection(mark) => format!("-j CONNMARK --set-xmark {}", written(mark)),
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

/// A match of all bits is printed without its mask, a target with it.
fn compared(mark: Mark) -> String {
    if mark.mask == u32::MAX { format!("{:#x}", mark.value) } else { written(mark) }
}

fn written(mark: Mark) -> String {
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
