//! The rule plan: which packets are caught, in which order, and why. Pure: it reads and changes
//! nothing.
//!
//! Not here: how the rules get into the kernel (`nftables.rs`), and the routes that they rely on
//! (`routes.rs`).
//!
//! # How the ambient profile works
//!
//! Every socket of the proxy carries the packet mark [`PROXY_MARK`]. What does not carry it is the
//! workload's:
//!
//! ```text
//! app ── nat_output ── capture-outbound ─────────────▶ proxy :outbound ── marked ──▶ peer
//! peer ── nat_prerouting ── hbone-in (:hbone as it is) | capture-inbound ─▶ proxy :inbound
//! proxy ── marked, from the peer's address, over lo ── mark-proxy-connection ──▶ app
//! app's reply to the peer's address ── return-to-proxy ── ip rule, table 100 ── lo ──▶ proxy
//! ```
//!
//! The nat chains see the first packet of a connection only, so their counters count connections;
//! the raw and mangle chains see, and count, packets.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The packet mark of every socket that the proxy opens (Istio's `InpodMark`).
pub const PROXY_MARK: u32 = 0x539;
/// The connection mark of a connection from the proxy to the workload (Istio's `InpodTProxyMark`).
pub const CONNECTION_MARK: u32 = 0x111;
/// The bits of a mark that are ours; the others belong to the CNI and are neither read nor changed.
pub const MARK_MASK: u32 = 0xfff;
/// The routing table that delivers replies to imitated clients back to the proxy.
pub const ROUTE_TABLE: u32 = 100;
/// The priority of the ip rule that chooses [`ROUTE_TABLE`]: just before `main` (32766), as Istio
/// has it.
pub const RULE_PRIORITY: u32 = 32764;
/// The conntrack zone of the original direction of what the proxy opens. Istio uses 1 and 2 for DNS.
pub const PROXY_ZONE: u16 = 15;
/// The name of our nftables table; its family is `inet`.
pub const TABLE: &str = "underpass";
/// Where the kubelet's probes come from in an Istio mesh, IPv4: the node rewrites their source to
/// it.
pub const KUBELET_PROBE_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 7, 127);
/// Where the kubelet's probes come from in an Istio mesh, IPv6.
pub const KUBELET_PROBE_V6: Ipv6Addr =
    Ipv6Addr::new(0xfd16, 0x9254, 0x7127, 0x1337, 0xffff, 0xffff, 0xffff, 0xffff);

/// The ports that the rules lead to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// Where caught outbound connections arrive.
    pub outbound: u16,
    /// Where caught plaintext inbound connections arrive.
    pub inbound: u16,
    /// Where peers connect with HBONE.
    pub hbone: u16,
}

/// The address families whose connections are caught.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Families {
    /// IPv4; IPv6 is absent or goes its way.
    V4,
    /// Both, by twin rules.
    V4AndV6,
}

/// All rules of a profile, in the order in which the kernel tries them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RulePlan {
    rules: Vec<Rule>,
}

/// One rule. Each also counts what it matches, and has its id as its comment in the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Its name, unique in the plan; an IPv6 twin ends in `-v6`.
    pub id: &'static str,
    /// Why it exists, in a sentence.
    pub reason: &'static str,
    /// Where it stands.
    pub chain: Chain,
    /// What a packet must be, all of it, in this order.
    pub matches: Vec<Match>,
    /// What then happens.
    pub action: Action,
}

/// A base chain of ours. Nothing jumps: every rule stands in the chain that the kernel enters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chain {
    /// Every packet that a local process sends, before connection tracking.
    RawOutput,
    /// Every packet that arrives, before address translation.
    ManglePrerouting,
    /// Every packet that a local process sends, before address translation.
    MangleOutput,
    /// The first packet of every connection that arrives.
    NatPrerouting,
    /// The first packet of every connection that a local process opens.
    NatOutput,
}

/// What a packet must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Match {
    /// TCP, of either family.
    Tcp,
    /// Not the SYN that opens a connection.
    NotOpening,
    /// From this address.
    Source(IpAddr),
    /// To this address.
    Destination(IpAddr),
    /// Of this address's family, and to any other address.
    NotDestination(IpAddr),
    /// TCP to this port.
    DestinationPort(u16),
    /// Sent through the loopback interface.
    OutLoopback,
    /// Our bits of the packet's mark are this.
    PacketMark(u32),
    /// Our bits of the packet's mark are anything else.
    NotPacketMark(u32),
    /// Our bits of the connection's mark are this.
    ConnectionMark(u32),
    /// In the direction of the packet that opened the connection.
    Original,
    /// In the other direction.
    Reply,
}

/// What happens to a packet that matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// No later rule of this chain sees it.
    Accept,
    /// It goes to this local port.
    Redirect(u16),
    /// Our bits of its connection's mark become this.
    MarkConnection(u32),
    /// Our bits of its own mark become this.
    MarkPacket(u32),
    /// Its connection is looked up in this conntrack zone, if the packet is of the original direction.
    Zone(u16),
}

impl RulePlan {
    /// The rules of the Istio ambient profile.
    #[must_use]
    pub fn ambient(ports: Ports, families: Families) -> Self {
        let families: &[Family] = match families {
            Families::V4 => &[V4],
            Families::V4AndV6 => &[V4, V6],
        };
        let mut rules = vec![raw_output()];
        rules.extend(mangle());
        rules.extend(nat_prerouting(ports, families));
        rules.extend(nat_output(ports, families));
        Self { rules }
    }

    /// The rules, in order.
    #[must_use]
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }
}

impl Chain {
    /// All chains, in the order in which they are created.
    pub const ALL: [Self; 5] = [
        Self::RawOutput,
        Self::ManglePrerouting,
        Self::MangleOutput,
        Self::NatPrerouting,
        Self::NatOutput,
    ];

    /// Its name in the kernel.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::RawOutput => "raw_output",
            Self::ManglePrerouting => "mangle_prerouting",
            Self::MangleOutput => "mangle_output",
            Self::NatPrerouting => "nat_prerouting",
            Self::NatOutput => "nat_output",
        }
    }

    /// Its priority among the chains of the same hook, as a number: nft 1.0.6 rejects the name
    /// `dstnat` on the output hook.
    #[must_use]
    pub fn priority(self) -> i32 {
        match self {
            Self::RawOutput => -300,
            Self::ManglePrerouting | Self::MangleOutput => -150,
            Self::NatPrerouting | Self::NatOutput => -100,
        }
    }
}

/// The rule that keeps the proxy's connections and the workload's apart, of both families at once.
///
/// The kernel of a client may choose, for a connection to the workload, the very port from which the proxy imitates that
/// client. Conntrack would take its SYN for a packet of the proxy's connection: it would not be caught, and its answer
/// would go astray. In a zone of its own, the proxy's original direction is never found from outside; replies carry
/// no mark, and stay in the zone that everything is in.
fn raw_output() -> Rule {
    Rule {
        id: "proxy-zone",
        reason: "tracks what the proxy opens apart from what is opened by the clients that it imitates",
        chain: Chain::RawOutput,
        matches: vec![Match::PacketMark(PROXY_MARK)],
        action: Action::Zone(PROXY_ZONE),
    }
}

/// The rules about the way back, of both families at once.
fn mangle() -> Vec<Rule> {
    vec![
        Rule {
            id: "mark-proxy-connection",
            reason: "remembers a connection that the proxy opens to the workload; only in its original \
                     direction, or the proxy's replies would mark the workload's own captured connections",
            chain: Chain::ManglePrerouting,
            matches: vec![Match::Original, Match::PacketMark(PROXY_MARK)],
            action: Action::MarkConnection(CONNECTION_MARK),
        },
        Rule {
            id: "return-to-proxy",
            reason: "routes the workload's replies to the client address that the proxy imitates back to the \
                     proxy; only replies, so the proxy's own packets are not routed twice",
            chain: Chain::MangleOutput,
            matches: vec![Match::Reply, Match::ConnectionMark(CONNECTION_MARK)],
            action: Action::MarkPacket(CONNECTION_MARK),
        },
    ]
}

/// The rules for connections that arrive.
fn nat_prerouting(ports: Ports, families: &[Family]) -> Vec<Rule> {
    let chain = Chain::NatPrerouting;
    let mut rules = vec![Rule {
        id: "established-in",
        reason: "leaves connections alone that are older than the rules: conntrack takes their next packet \
                 for a new connection, and a redirect would reset it",
        chain,
        matches: vec![Match::Tcp, Match::NotOpening],
        action: Action::Accept,
    }];
    rules.extend(families.iter().map(|family| Rule {
        id: family.id("kubelet-probe-in", "kubelet-probe-in-v6"),
        reason: "lets the kubelet's probes reach the workload: they cannot speak HBONE",
        chain,
        matches: vec![Match::Tcp, Match::Source(family.probe)],
        action: Action::Accept,
    }));
    rules.push(Rule {
        id: "hbone-in",
        reason: "HBONE arrives at its listener as it is",
        chain,
        matches: vec![Match::DestinationPort(ports.hbone)],
        action: Action::Accept,
    });
    rules.extend(families.iter().map(|family| Rule {
        id: family.id("capture-inbound", "capture-inbound-v6"),
        reason: "every other connection to the workload passes the proxy, except the proxy's own",
        chain,
        matches: vec![
            Match::Tcp,
            Match::NotDestination(family.loopback),
            Match::NotPacketMark(PROXY_MARK),
        ],
        action: Action::Redirect(ports.inbound),
    }));
    rules
}

/// The rules for connections that local processes open.
fn nat_output(ports: Ports, families: &[Family]) -> Vec<Rule> {
    let chain = Chain::NatOutput;
    let mut rules = vec![Rule {
        id: "established-out",
        reason: "leaves connections alone that are older than the rules, as established-in does",
        chain,
        matches: vec![Match::Tcp, Match::NotOpening],
        action: Action::Accept,
    }];
    rules.extend(families.iter().map(|family| Rule {
        id: family.id("kubelet-probe-out", "kubelet-probe-out-v6"),
        reason: "leaves alone what goes to the kubelet's probe address",
        chain,
        matches: vec![Match::Tcp, Match::Destination(family.probe)],
        action: Action::Accept,
    }));
    rules.push(Rule {
        id: "returning",
        reason: "what already returns to the proxy is not caught again; kept for parity with Istio",
        chain,
        matches: vec![Match::Tcp, Match::PacketMark(CONNECTION_MARK)],
        action: Action::Accept,
    });
    rules.extend(families.iter().map(|family| Rule {
        id: family.id("own-pod", "own-pod-v6"),
        reason: "a workload that calls its own address stays direct, and the proxy reaches the workload",
        chain,
        matches: vec![Match::OutLoopback, Match::NotDestination(family.loopback)],
        action: Action::Accept,
    }));
    rules.extend(families.iter().map(|family| Rule {
        id: family.id("capture-outbound", "capture-outbound-v6"),
        reason: "every other connection that the workload opens passes the proxy, except the proxy's own",
        chain,
        matches: vec![
            Match::Tcp,
            Match::NotDestination(family.loopback),
            Match::NotPacketMark(PROXY_MARK),
        ],
        action: Action::Redirect(ports.outbound),
    }));
    rules
}

/// What differs between the twins of a rule.
#[derive(Clone, Copy)]
struct Family {
    loopback: IpAddr,
    probe: IpAddr,
}

const V4: Family =
    Family { loopback: IpAddr::V4(Ipv4Addr::LOCALHOST), probe: IpAddr::V4(KUBELET_PROBE_V4) };
const V6: Family =
    Family { loopback: IpAddr::V6(Ipv6Addr::LOCALHOST), probe: IpAddr::V6(KUBELET_PROBE_V6) };

impl Family {
    fn id(self, v4: &'static str, v6: &'static str) -> &'static str {
        if self.loopback.is_ipv4() { v4 } else { v6 }
    }
}

mod text;

#[cfg(test)]
mod tests;
