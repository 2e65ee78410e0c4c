//! What a plan is made of: chains, rules, matches and actions, in netfilter's words.
//!
//! Not here: which of them a profile has.

use std::net::Ipv6Addr;

use ipnet::IpNet;
use underpass_config::PortRange;

/// A table of iptables. In nftables all chains are in our one table, and this is part of their
/// name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    /// Before connection tracking: conntrack zones.
    Raw,
    /// Marks, and TPROXY.
    Mangle,
    /// Redirects; sees the first packet of a connection.
    Nat,
    /// Refusals.
    Filter,
}

/// Where the kernel enters a base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    /// Every packet that arrives, through loopback too.
    Prerouting,
    /// Every packet that arrives and is for this namespace.
    Input,
    /// Every packet that a local process sends.
    Output,
}

/// A chain's table and its name in iptables: `nat`, `ISTIO_OUTPUT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChainId {
    /// The table.
    pub table: Table,
    /// The name, in upper case.
    pub name: &'static str,
}

/// A chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chain {
    /// Which one.
    pub id: ChainId,
    /// Where the kernel enters it; `None`: rules jump to it.
    pub hook: Option<Hook>,
}

/// One rule. Each also counts what it matches; in nftables its comment is its id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Its name, unique in the plan; that of an IPv6 twin ends in `-v6`.
    pub id: String,
    /// Why it exists, in a sentence.
    pub reason: &'static str,
    /// Whose idea it is.
    pub origin: Origin,
    /// Where it stands.
    pub chain: ChainId,
    /// The packets that it is about. One of [`Families::V4`] has an address among its matches, or
    /// must be told from IPv6 otherwise.
    pub families: Families,
    /// What a packet must be, all of it, in this order.
    pub matches: Vec<Match>,
    /// What then happens.
    pub action: Action,
    /// Whether only nftables needs it: there, TPROXY lets a packet through when nobody listens.
    pub nftables_only: bool,
}

/// Whose idea a rule is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Istio or OSM has it, and needs it.
    Seed,
    /// It makes theirs safer; `exact` leaves it out.
    Ours,
}

/// The address families that a rule is about.
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

/// The direction of a packet in its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// That of the packet that opened it.
    Original,
    /// The other.
    Reply,
}

/// A mark, and which of its bits count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// The bits.
    pub value: u32,
    /// Which of them are compared or written.
    pub mask: u32,
}

/// What a packet must be. Lists are never empty, and one of their values is enough (in the
/// negative forms: must not be any of them).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Match {
    /// Of this protocol.
    Protocol(Protocol),
    /// TCP, said as iptables' `-p tcp -m tcp` with nothing to compare: so Istio has it in places.
    TcpModule,
    /// TCP, and not the SYN that opens a connection.
    NotOpening,
    /// Conntrack cannot place it.
    Invalid,
    /// Of a connection that exists, or about one.
    Established,
    /// In this direction of its connection.
    Direction(Direction),
    /// From one of these, all of the rule's family.
    Source(Vec<IpNet>),
    /// To one of these, all of the rule's family.
    Destination(Vec<IpNet>),
    /// Of the rule's family, and to any other address.
    NotDestination(IpNet),
    /// Of this protocol, from this port.
    SourcePort(Protocol, u16),
    /// Of this protocol, to one of these ports.
    DestinationPort(Protocol, Vec<PortRange>),
    /// Of this protocol, to another port.
    NotDestinationPort(Protocol, Vec<PortRange>),
    /// Arrived by one of these interfaces.
    In(Vec<String>),
    /// Leaves by one of these interfaces.
    Out(Vec<String>),
    /// Leaves by another interface.
    NotOut(String),
    /// Sent by a process of one of these users.
    Uid(Vec<u32>),
    /// Sent by a process of another user, or by the kernel.
    NotUid(Vec<u32>),
    /// Sent by a process of one of these groups.
    Gid(Vec<u32>),
    /// Sent by a process of another group, or by the kernel.
    NotGid(Vec<u32>),
    /// Its mark is this.
    PacketMark(Mark),
    /// Its mark is another.
    NotPacketMark(Mark),
    /// Its connection's mark is this.
    ConnectionMark(Mark),
}

/// What happens to a packet that matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// No later rule of this table sees it.
    Accept,
    /// The chain that jumped here goes on; from a base chain: as [`Action::Accept`].
    Return,
    /// It is dropped.
    Drop,
    /// It is refused: TCP by a reset, else by "port unreachable".
    Reject,
    /// The rules of that chain, then the next one here.
    Jump(ChainId),
    /// It goes to this local port.
    Redirect(u16),
    /// It goes to the transparent socket at this local port, as it is, and with this mark.
    Tproxy(u16, Mark),
    /// Its mark becomes this, in the masked bits.
    MarkPacket(Mark),
    /// Its connection's mark becomes this, in the masked bits.
    MarkConnection(Mark),
    /// Its connection's mark becomes its own.
    SaveMark,
    /// Its mark becomes that of its connection.
    RestoreMark,
    /// Its connection is looked up in this conntrack zone; `None`: of whichever direction the packet is.
    Zone(u16, Option<Direction>),
}

/// An ip rule by a mark, and a route that delivers what follows it to this namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PolicyRoute {
    /// The packet mark that the ip rule looks for.
    pub mark: Mark,
    /// Its priority.
    pub priority: u32,
    /// The routing table, with `local default dev lo` in it.
    pub table: u32,
}

/// An address that the loopback interface has to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoopbackAddress(pub Ipv6Addr);

impl Table {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Mangle => "mangle",
            Self::Nat => "nat",
            Self::Filter => "filter",
        }
    }

    /// The priority of its chains at their hook, as iptables has it: the lowest comes first.
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
    /// Its name in our nftables table: `nat_istio_output`.
    #[must_use]
    pub fn nftables_name(self) -> String {
        format!("{}_{}", self.table.name(), self.name.to_lowercase())
    }
}

impl Families {
    /// Whether a packet of this family is one of them.
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
    /// The mark of these bits, all of which count.
    #[must_use]
    pub fn whole(value: u32) -> Self {
        Self { value, mask: u32::MAX }
    }

    /// Whether `mark` is this one.
    #[must_use]
    pub fn matches(self, mark: u32) -> bool {
        mark & self.mask == self.value
    }

    /// `mark` with this one's bits written into it.
    #[must_use]
    pub fn write(self, mark: u32) -> u32 {
        mark & !self.mask | self.value
    }
}
