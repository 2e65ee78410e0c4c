//! The model of a plan: chains, rules, matches and actions, in netfilter's terms.

use std::net::Ipv6Addr;

use ipnet::IpNet;
use underpass_config::PortRange;

/// A table of iptables. nftables has a single table; there, this is the prefix of a chain's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    /// Before connection tracking: conntrack zones.
    Raw,
    /// Marks, and TPROXY.
    Mangle,
    /// Redirects. It sees only the first packet of a connection.
    Nat,
    /// Rejections and drops.
    Filter,
}

/// The hook of a base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    /// Packets that arrive, including those by loopback.
    Prerouting,
    /// Packets that arrive and are addressed to this namespace.
    Input,
    /// Packets that a local process sends.
    Output,
}

/// The table and name of a chain as in iptables: `nat`, `ISTIO_OUTPUT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChainId {
    /// The table.
    pub table: Table,
    /// The name in upper case.
    pub name: &'static str,
}

/// A chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chain {
    /// Its table and name.
    pub id: ChainId,
    /// The hook of a base chain; `None` for a chain that is only a jump target.
    pub hook: Option<Hook>,
}

/// One rule. It has a counter; in nftables, its comment is its id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// The unique id. The IPv6 variant of a rule ends in `-v6`.
    pub id: String,
    /// Why the rule exists, in one clause.
    pub reason: &'static str,
    /// The project that the rule comes from.
    pub origin: Origin,
    /// The chain that contains it.
    pub chain: ChainId,
    /// The address families that it applies to. A rule for one family needs an address match, or an
    /// explicit match of the family.
    pub families: Families,
    /// The conditions, all of which must match, in this order.
    pub matches: Vec<Match>,
    /// The action for a packet that matches.
    pub action: Action,
    /// True if only nftables needs it: TPROXY in nftables passes a packet when no socket listens.
    pub nftables_only: bool,
}

/// The project that a rule comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Istio or OSM has the rule.
    Mesh,
    /// underpass adds it for robustness; `exact` leaves it out.
    Underpass,
}

/// The address families that a rule applies to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Families {
    /// Both.
    Both,
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// A transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// The direction of a packet within its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The direction of the packet that opened the connection.
    Original,
    /// The opposite direction.
    Reply,
}

/// A mark with a mask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// The bits.
    pub value: u32,
    /// The bits that are compared or written.
    pub mask: u32,
}

/// A condition on a packet. A list is never empty; one matching value suffices. In a negated
/// condition, no value may match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Match {
    /// The transport protocol is this one.
    Protocol(Protocol),
    /// TCP, written as `-p tcp -m tcp` without options in iptables, as in some of Istio's rules.
    TcpModule,
    /// TCP, but not a SYN that opens a connection.
    NotOpening,
    /// Conntrack classifies the packet as invalid.
    Invalid,
    /// The packet belongs or relates to a tracked connection.
    Established,
    /// The packet has this direction within its connection.
    Direction(Direction),
    /// The source is in one of these networks, all of the rule's family.
    Source(Vec<IpNet>),
    /// The destination is in one of these networks, all of the rule's family.
    Destination(Vec<IpNet>),
    /// The destination is of the rule's family and outside of this network.
    NotDestination(IpNet),
    /// The protocol and source port are these.
    SourcePort(Protocol, u16),
    /// The protocol is this one and the destination port is in one of these ranges.
    DestinationPort(Protocol, Vec<PortRange>),
    /// The protocol is this one and the destination port is outside of these ranges.
    NotDestinationPort(Protocol, Vec<PortRange>),
    /// The packet arrived at one of these interfaces.
    In(Vec<String>),
    /// The packet leaves through one of these interfaces.
    Out(Vec<String>),
    /// The packet leaves through a different interface.
    NotOut(String),
    /// The sending socket belongs to one of these users.
    Uid(Vec<u32>),
    /// The sending socket belongs to a different user, or the kernel sent the packet.
    NotUid(Vec<u32>),
    /// The sending socket belongs to one of these groups.
    Gid(Vec<u32>),
    /// The sending socket belongs to a different group, or the kernel sent the packet.
    NotGid(Vec<u32>),
    /// The packet mark equals this one.
    PacketMark(Mark),
    /// The packet mark differs from this one.
    NotPacketMark(Mark),
    /// The connection mark equals this one.
    ConnectionMark(Mark),
}

/// The action of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Accept: no later rule of this table is evaluated.
    Accept,
    /// Continue after the jump; in a base chain, the same as [`Action::Accept`].
    Return,
    /// Drop the packet.
    Drop,
    /// Reject the packet: TCP with a RST, other protocols with "port unreachable".
    Reject,
    /// Evaluate that chain, then continue with the next rule.
    Jump(ChainId),
    /// Redirect to this local port.
    Redirect(u16),
    /// Deliver unmodified to the transparent socket on this local port, and set this mark.
    Tproxy(u16, Mark),
    /// Set the masked bits of the packet mark.
    MarkPacket(Mark),
    /// Set the masked bits of the connection mark.
    MarkConnection(Mark),
    /// Copy the packet mark to the connection mark.
    SaveMark,
    /// Copy the connection mark to the packet mark.
    RestoreMark,
    /// Look up the connection in this conntrack zone, for one direction or for both (`None`).
    Zone(u16, Option<Direction>),
}

/// An ip rule that matches a mark, and a route that delivers matching packets locally.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PolicyRoute {
    /// The packet mark that the ip rule matches.
    pub mark: Mark,
    /// The priority of the ip rule.
    pub priority: u32,
    /// The routing table that contains `local default dev lo`.
    pub table: u32,
}

/// An address that must be present on the loopback interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoopbackAddress(pub Ipv6Addr);

impl Table {
    /// The name in iptables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Mangle => "mangle",
            Self::Nat => "nat",
            Self::Filter => "filter",
        }
    }

    /// The hook priority of its chains, as in iptables. Lower priorities run first.
    #[must_use]
    pub fn priority(self) -> i32 {
        match self {
            Self::Raw => -300,
            Self::Mangle => -150,
            Self::Nat => -100,
            Self::Filter => 0,
        }
    }
}

impl ChainId {
    /// The name in the nftables table, for example `nat_istio_output`.
    #[must_use]
    pub fn nftables_name(self) -> String {
        format!("{}_{}", self.table.name(), self.name.to_lowercase())
    }
}

impl Families {
    /// Returns true if a packet of this family is included.
    #[must_use]
    pub fn contains(self, v6: bool) -> bool {
        match self {
            Self::Both => true,
            Self::V4 => !v6,
            Self::V6 => v6,
        }
    }
}

impl Mark {
    /// A mark with a full mask.
    #[must_use]
    pub fn full(value: u32) -> Self {
        Self { value, mask: u32::MAX }
    }

    /// Returns true if the masked bits of `mark` equal this value.
    #[must_use]
    pub fn matches(self, mark: u32) -> bool {
        mark & self.mask == self.value
    }

    /// Returns `mark` with the masked bits replaced.
    #[must_use]
    pub fn write(self, mark: u32) -> u32 {
        mark & !self.mask | self.value
    }
}
