//! The model of a plan: chains, rules, matches and actions, in netfilter's terms.

use std::net::Ipv6Addr;

use ipnet::IpNet;
use underpass_config::PortRange;

/// A table of iptables. In nftables, underpass has a single table, and this name is the prefix of
/// chain names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    /// Runs before connection tracking: assigns conntrack zones.
    Raw,
    /// Changes marks, and delivers by TPROXY.
    Mangle,
    /// Redirects. Sees only the first packet of a connection.
    Nat,
    /// Rejects and drops.
    Filter,
}

/// The hook of a base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    /// Packets that arrive at an interface, including loopback.
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
    /// The table and name of the chain.
    pub id: ChainId,
    /// The hook of a base chain. `None` for a chain that is only a jump target.
    pub hook: Option<Hook>,
}

/// A rule. It has a counter. In nftables, its comment is its id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// The unique id. The id of an IPv6 variant ends in `-v6`.
    pub id: String,
    /// The reason why the rule exists, in one clause.
    pub reason: &'static str,
    /// The project that the rule comes from.
    pub origin: Origin,
    /// The chain that contains the rule.
    pub chain: ChainId,
    /// The address families that the rule applies to. In nftables, a rule for one family also
    /// matches the family, unless an address match implies it.
    pub families: Families,
    /// The conditions, in order. All of them must match.
    pub matches: Vec<Match>,
    /// The action for a packet that matches.
    pub action: Action,
    /// True if only nftables needs the rule: TPROXY in nftables passes a packet if no socket
    /// listens.
    pub nftables_only: bool,
}

/// The project that a rule comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Istio or OSM.
    Mesh,
    /// underpass: the rule adds robustness. `exact` omits it.
    Underpass,
}

/// The address families that a rule applies to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Families {
    /// Both families.
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
    /// The bits of the mark.
    pub value: u32,
    /// The bits that are compared or written.
    pub mask: u32,
}

/// A condition on a packet. If it has several values, one matching value is enough. In a negated
/// condition, no value may match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Match {
    /// The packet has this transport protocol.
    Protocol(Protocol),
    /// The packet is TCP. iptables prints `-p tcp -m tcp` without options, as some of Istio's rules
    /// do.
    TcpModule,
    /// The packet is TCP, but not a SYN that opens a connection.
    NotOpening,
    /// Conntrack classifies the packet as invalid.
    Invalid,
    /// The packet belongs or relates to a tracked connection.
    Established,
    /// The packet has this direction within its connection.
    Direction(Direction),
    /// The source is in one of these networks of the rule's family.
    Source(Vec<IpNet>),
    /// The destination is in one of these networks of the rule's family.
    Destination(Vec<IpNet>),
    /// The destination is outside of this network, and of the rule's family.
    NotDestination(IpNet),
    /// The packet has this protocol and source port.
    SourcePort(Protocol, u16),
    /// The packet has this protocol, and its destination port is in one of these ranges.
    DestinationPort(Protocol, Vec<PortRange>),
    /// The packet has this protocol, and its destination port is outside of these ranges.
    NotDestinationPort(Protocol, Vec<PortRange>),
    /// The packet arrived at one of these interfaces.
    In(Vec<String>),
    /// The packet leaves through one of these interfaces.
    Out(Vec<String>),
    /// The packet leaves through a different interface.
    NotOut(String),
    /// The sending socket belongs to one of these users.
    Uid(Vec<u32>),
    /// The sending socket belongs to another user, or the kernel sent the packet.
    NotUid(Vec<u32>),
    /// The sending socket belongs to one of these groups.
    Gid(Vec<u32>),
    /// The sending socket belongs to another group, or the kernel sent the packet.
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
    /// Accept the packet: no later rule of this table is evaluated.
    Accept,
    /// Return to the calling chain. In a base chain, the same as [`Action::Accept`].
    Return,
    /// Drop the packet.
    Drop,
    /// Reject the packet: TCP with a RST, other protocols with "port unreachable".
    Reject,
    /// Evaluate this chain, then continue with the next rule.
    Jump(ChainId),
    /// Redirect the connection to this local port.
    Redirect(u16),
    /// Deliver the packet unmodified to the transparent socket on this local port, and set this
    /// mark.
    Tproxy(u16, Mark),
    /// Set the masked bits of the packet mark.
    MarkPacket(Mark),
    /// Set the masked bits of the connection mark.
    MarkConnection(Mark),
    /// Copy the packet mark to the connection mark.
    SaveMark,
    /// Copy the connection mark to the packet mark.
    RestoreMark,
    /// Assign this conntrack zone, for one direction or for both (`None`).
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
    /// The name of the table in iptables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Mangle => "mangle",
            Self::Nat => "nat",
            Self::Filter => "filter",
        }
    }

    /// The hook priority of the table's chains, as in iptables. Lower priorities run first.
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
    /// The chain's name in nftables, for example `nat_istio_output`.
    #[must_use]
    pub fn nftables_name(self) -> String {
        format!("{}_{}", self.table.name(), self.name.to_lowercase())
    }
}

impl Families {
    /// Returns true if the rule applies to packets of this family.
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

    /// Returns true if the masked bits of `mark` equal this mark.
    #[must_use]
    pub fn matches(self, mark: u32) -> bool {
        mark & self.mask == self.value
    }

    /// Returns `mark` with the masked bits replaced by this mark.
    #[must_use]
    pub fn write(self, mark: u32) -> u32 {
        mark & !self.mask | self.value
    }
}
