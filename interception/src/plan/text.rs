//! The plan in nft's language: for people, for golden files, and for `nft -f`.
//!
//! Not here: what the product itself installs. That goes over netlink, without an nft binary.

use std::fmt;
use std::net::IpAddr;

use super::{Action, Chain, MARK_MASK, Match, Rule, RulePlan, TABLE};

/// The plan in nft's language, one statement a line: what `nft -f -` takes, and replaces our table
/// with in one transaction. The alternate form (`{:#}`) says before each rule why it exists.
impl fmt::Display for RulePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "add table inet {TABLE}")?;
        writeln!(f, "delete table inet {TABLE}")?;
        writeln!(f, "add table inet {TABLE}")?;
        for chain in Chain::ALL {
            let (name, kind, priority) = (chain.name(), chain.kind(), chain.priority());
            writeln!(
                f,
                "add chain inet {TABLE} {name} {{ type {kind} priority {priority}; policy accept; }}"
            )?;
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

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "add rule inet {TABLE} {}", self.chain.name())?;
        for condition in &self.matches {
            write!(f, " {condition}")?;
        }
        write!(f, " counter {} comment \"{}\"", self.action, self.id)
    }
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp => write!(f, "meta l4proto tcp"),
            Self::NotOpening => write!(f, "tcp flags & (fin | syn | rst | ack) != syn"),
            Self::Source(address) => write!(f, "{} saddr {address}", protocol(*address)),
            Self::Destination(address) => write!(f, "{} daddr {address}", protocol(*address)),
            Self::NotDestination(address) => write!(f, "{} daddr != {address}", protocol(*address)),
            Self::DestinationPort(port) => write!(f, "tcp dport {port}"),
            Self::OutLoopback => write!(f, "oif lo"),
            Self::PacketMark(mark) => write!(f, "meta mark & {MARK_MASK:#x} == {mark:#x}"),
            Self::NotPacketMark(mark) => write!(f, "meta mark & {MARK_MASK:#x} != {mark:#x}"),
            Self::ConnectionMark(mark) => write!(f, "ct mark & {MARK_MASK:#x} == {mark:#x}"),
            Self::Original => write!(f, "ct direction original"),
            Self::Reply => write!(f, "ct direction reply"),
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let others = !MARK_MASK;
        match self {
            Self::Accept => write!(f, "accept"),
            Self::Redirect(port) => write!(f, "redirect to :{port}"),
            Self::MarkConnection(mark) => {
                write!(f, "ct mark set ct mark & {others:#x} | {mark:#x}")
            }
            Self::MarkPacket(mark) => {
                write!(f, "meta mark set meta mark & {others:#x} | {mark:#x}")
            }
            Self::Zone(zone) => write!(f, "ct original zone set {zone}"),
        }
    }
}

/// nft's name of the address's network protocol.
fn protocol(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "ip" } else { "ip6" }
}

impl Chain {
    /// Its type and hook in nft's words. `route` for the mangle output chain: only that type routes
    /// a packet again after its mark has changed.
    fn kind(self) -> &'static str {
        match self {
            Self::RawOutput => "filter hook output",
            Self::ManglePrerouting => "filter hook prerouting",
            Self::MangleOutput => "route hook output",
            Self::NatPrerouting => "nat hook prerouting",
            Self::NatOutput => "nat hook output",
        }
    }
}
