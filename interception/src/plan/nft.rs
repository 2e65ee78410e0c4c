//! Prints a plan in nft syntax: for users, for golden files, and for `nft -f`.
//!
//! underpass installs rules over netlink (`crate::backend::nftables`), without the program nft.
//! Both produce the same expressions; a kernel test compares them.

mod set;

use std::fmt::{self, Display, Formatter};

pub(crate) use set::{NamedSet, Operand, Values, operand_of, operands};

use super::{
    Action, Chain, Direction, Families, Hook, Mark, Match, Protocol, Rule, RulePlan, TABLE, Table,
};

/// The plan as input for `nft -f -`, one statement per line. It replaces the table in one
/// transaction. The alternate form (`{:#}`) prints the reason before each rule.
impl Display for RulePlan {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "add table inet {TABLE}")?;
        writeln!(f, "delete table inet {TABLE}")?;
        writeln!(f, "add table inet {TABLE}")?;
        for chain in &self.chains {
            writeln!(f, "add {chain}")?;
        }
        for set in self.rules.iter().flat_map(operands).filter_map(Operand::into_set) {
            writeln!(f, "add {}", set.statement(TABLE))?;
        }
        for rule in &self.rules {
            if f.alternate() {
                writeln!(f, "# {}", rule.reason)?;
            }
            writeln!(f, "{rule}")?;
        }
        Ok(())
    }
}

/// The chain as an operand of `nft add`.
impl Display for Chain {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "chain inet {TABLE} {}", self.id.nftables_name())?;
        let Some(hook) = self.hook else { return Ok(()) };
        let (kind, priority) = (self.kind(), self.id.table.priority());
        write!(f, " {{ type {kind} hook {hook} priority {priority}; policy accept; }}")
    }
}

/// The rule as an `nft add` statement. The sets that it references must exist.
impl Display for Rule {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (chain, statement) = (self.chain.nftables_name(), Statement(self));
        write!(f, "add rule inet {TABLE} {chain} {statement} comment \"{}\"", self.id)
    }
}

/// The matches and the action of a rule, without chain and comment.
#[derive(Debug)]
pub(crate) struct Statement<'r>(pub(crate) &'r Rule);

impl Display for Statement<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let rule = self.0;
        if let Some(family) = rule.explicit_family() {
            write!(f, "meta nfproto {family} ")?;
        }
        for (condition, operand) in rule.matches.iter().zip(operands(rule)) {
            write_match(f, condition, &operand)?;
            f.write_str(" ")?;
        }
        f.write_str("counter ")?;
        write_action(f, rule)
    }
}

impl Chain {
    /// The type of the chain. The mangle OUTPUT chain has the type `route`, because only that type
    /// reroutes a packet after its mark changed.
    pub(crate) fn kind(&self) -> ChainKind {
        match (self.id.table, self.hook) {
            (Table::Nat, _) => ChainKind::Nat,
            (Table::Mangle, Some(Hook::Output)) => ChainKind::Route,
            (Table::Raw | Table::Mangle | Table::Filter, _) => ChainKind::Filter,
        }
    }
}

impl Rule {
    /// The family that the rule must match explicitly, because the table is `inet`. `None` if the
    /// rule applies to both families, or if an address match implies the family.
    pub(crate) fn explicit_family(&self) -> Option<IpVersion> {
        let about_addresses = |condition: &Match| {
            matches!(condition, Match::Source(_) | Match::Destination(_) | Match::NotDestination(_))
        };
        self.family().filter(|_| !self.matches.iter().any(about_addresses))
    }

    /// The family of a rule for one family. `None` for both.
    pub(crate) fn family(&self) -> Option<IpVersion> {
        match self.families {
            Families::Both => None,
            Families::V4 => Some(IpVersion::V4),
            Families::V6 => Some(IpVersion::V6),
        }
    }

    /// Returns true if the rule matches only TCP, which can be rejected with a RST.
    pub(crate) fn is_tcp(&self) -> bool {
        self.matches.iter().any(|condition| {
            matches!(
                condition,
                Match::TcpModule
                    | Match::NotOpening
                    | Match::Protocol(Protocol::Tcp)
                    | Match::SourcePort(Protocol::Tcp, _)
                    | Match::DestinationPort(Protocol::Tcp, _)
                    | Match::NotDestinationPort(Protocol::Tcp, _)
            )
        })
    }
}

/// A type of base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChainKind {
    Filter,
    Nat,
    Route,
}

/// An IP version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum IpVersion {
    V4,
    V6,
}

pub(crate) fn write_match(
    f: &mut Formatter<'_>,
    condition: &Match,
    operand: &Operand,
) -> fmt::Result {
    let ip = if operand.is_v6() { "ip6" } else { "ip" };
    let mask = operand.mask().map(|mask| format!("& {mask} == ")).unwrap_or_default();
    match condition {
        Match::Protocol(protocol) => write!(f, "meta l4proto {protocol}"),
        Match::TcpModule => write!(f, "meta l4proto tcp"),
        Match::NotOpening => write!(f, "tcp flags & (fin | syn | rst | ack) != syn"),
        Match::Invalid => write!(f, "ct state invalid"),
        Match::Established => write!(f, "ct state established,related"),
        Match::Direction(direction) => write!(f, "ct direction {direction}"),
        Match::Source(_) => write!(f, "{ip} saddr {mask}{operand}"),
        Match::Destination(_) => write!(f, "{ip} daddr {mask}{operand}"),
        Match::NotDestination(_) => write!(f, "{ip} daddr != {operand}"),
        Match::SourcePort(protocol, _) => write!(f, "{protocol} sport {operand}"),
        Match::DestinationPort(protocol, _) => write!(f, "{protocol} dport {operand}"),
        Match::NotDestinationPort(protocol, _) => write!(f, "{protocol} dport != {operand}"),
        Match::In(_) => write!(f, "iifname {operand}"),
        Match::Out(_) => write!(f, "oifname {operand}"),
        Match::NotOut(_) => write!(f, "oifname != {operand}"),
        Match::Uid(_) => write!(f, "meta skuid {operand}"),
        Match::NotUid(_) => write!(f, "meta skuid != {operand}"),
        Match::Gid(_) => write!(f, "meta skgid {operand}"),
        Match::NotGid(_) => write!(f, "meta skgid != {operand}"),
        Match::PacketMark(mark) => write_mark(f, "meta mark", *mark, "=="),
        Match::NotPacketMark(mark) => write_mark(f, "meta mark", *mark, "!="),
        Match::ConnectionMark(mark) => write_mark(f, "ct mark", *mark, "=="),
    }
}

fn write_mark(f: &mut Formatter<'_>, what: &str, mark: Mark, op: &str) -> fmt::Result {
    let Mark { value, mask } = mark;
    if mark.is_full() {
        return write!(f, "{what} {op} {value:#x}");
    }
    write!(f, "{what} & {mask:#x} {op} {value:#x}")
}

fn write_action(f: &mut Formatter<'_>, rule: &Rule) -> fmt::Result {
    match rule.action {
        Action::Accept => write!(f, "accept"),
        Action::Return => write!(f, "return"),
        Action::Drop => write!(f, "drop"),
        Action::Reject if rule.is_tcp() => write!(f, "reject with tcp reset"),
        Action::Reject => match rule.family() {
            None => write!(f, "reject with icmpx port-unreachable"),
            Some(IpVersion::V4) => write!(f, "reject with icmp port-unreachable"),
            Some(IpVersion::V6) => write!(f, "reject with icmpv6 port-unreachable"),
        },
        Action::Jump(chain) => write!(f, "jump {}", chain.nftables_name()),
        Action::Redirect(port) => write!(f, "redirect to :{port}"),
        Action::Tproxy(port, mark) => {
            // In the statement of a rule for one family, nft requires the family.
            let family = match rule.family() {
                None => "",
                Some(IpVersion::V4) => " ip",
                Some(IpVersion::V6) => " ip6",
            };
            write!(f, "tproxy{family} to :{port} ")?;
            write_new_mark(f, "meta mark", mark)?;
            write!(f, " accept")
        }
        Action::MarkPacket(mark) => write_new_mark(f, "meta mark", mark),
        Action::MarkConnection(mark) => write_new_mark(f, "ct mark", mark),
        Action::SaveMark => write!(f, "ct mark set meta mark"),
        Action::RestoreMark => write!(f, "meta mark set ct mark"),
        Action::Zone(zone, None) => write!(f, "ct zone set {zone}"),
        Action::Zone(zone, Some(direction)) => write!(f, "ct {direction} zone set {zone}"),
    }
}

fn write_new_mark(f: &mut Formatter<'_>, what: &str, mark: Mark) -> fmt::Result {
    let Mark { value, mask } = mark;
    if mark.is_full() {
        return write!(f, "{what} set {value:#x}");
    }
    write!(f, "{what} set {what} & {:#x} | {value:#x}", !mask)
}

impl Mark {
    /// Returns true if the mask contains all bits, and can be omitted.
    pub(crate) fn is_full(self) -> bool {
        self.mask == u32::MAX
    }
}

impl Display for ChainKind {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Filter => "filter",
            Self::Nat => "nat",
            Self::Route => "route",
        })
    }
}

impl Display for IpVersion {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "ipv4",
            Self::V6 => "ipv6",
        })
    }
}

impl Display for Hook {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prerouting => "prerouting",
            Self::Input => "input",
            Self::Output => "output",
        })
    }
}

impl Display for Protocol {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

impl Display for Direction {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Original => "original",
            Self::Reply => "reply",
        })
    }
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
