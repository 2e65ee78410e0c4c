//! Evaluates the plan for one packet, hook by hook, as the kernel would.
//!
//! Pure, like the plan. `explain.rs` presents a walk to people, and `walk/reply.rs` evaluates the
//! reply.
//!
//! ```text
//! sent      raw, mangle, nat, filter OUTPUT ──▶ out, or if the destination is local:
//!           raw, mangle PREROUTING ──▶ filter INPUT ──▶ a socket
//! arriving  raw, mangle, nat PREROUTING ──▶ filter INPUT ──▶ a socket, or forwarded
//! ```

mod reply;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
pub use reply::ReplyOutcome;

use super::{Action, ChainId, Direction, Hook, Match, Protocol, Rule, RulePlan, Table};

/// The name of the loopback interface.
const LOOPBACK: &str = "lo";
/// The maximum depth of jumps (NFT_JUMP_STACK_SIZE, include/net/netfilter/nf_tables.h).
const MAX_JUMP_DEPTH: usize = 16;

/// A packet before the first rule sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// The transport protocol.
    pub protocol: Protocol,
    /// The source address and port.
    pub source: SocketAddr,
    /// The destination address and port, of the same family as the source.
    pub destination: SocketAddr,
    /// Where the packet comes from: a local process or an interface.
    pub entry: Entry,
    /// The conntrack state.
    pub state: ConntrackState,
    /// The packet mark: the mark of the sending socket. Marks do not cross namespaces.
    pub mark: u32,
    /// The connection mark.
    pub connection_mark: u32,
}

/// Where a packet comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// A local process sends the packet.
    Out {
        /// The interface that the routing table selects. `lo` if the destination is local.
        interface: String,
        /// The user of the sending socket.
        uid: u32,
        /// The group of the sending socket.
        gid: u32,
    },
    /// The packet arrives at an interface.
    In {
        /// The name of the interface.
        interface: String,
    },
}

/// The conntrack state of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConntrackState {
    /// The packet opens a connection: it is a TCP SYN or a first datagram.
    New,
    /// The packet belongs to a TCP connection that is older than the rules. Conntrack treats it as
    /// new.
    PickedUp,
    /// The packet belongs to a tracked connection, and has this direction.
    Established(Direction),
    /// The packet belongs to no connection and cannot open one.
    Invalid,
}

/// The interfaces and addresses of a namespace, which decide how packets are routed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Environment {
    /// The interfaces that are up.
    pub interfaces: Vec<Interface>,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// The name.
    pub name: String,
    /// The addresses with their prefix lengths.
    pub addresses: Vec<IpNet>,
}

/// The path of one packet through the rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Walk<'p> {
    /// The base chains that the packet passed, in order.
    pub traversed: Vec<TraversedChain<'p>>,
    /// The final verdict.
    pub end: Verdict,
    /// True if the packet stayed in this namespace.
    pub local: bool,
    /// The final destination.
    pub destination: SocketAddr,
    /// The final packet mark.
    pub mark: u32,
    /// The final connection mark.
    pub connection_mark: u32,
}

/// A base chain that a packet passed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraversedChain<'p> {
    /// The table and name of the chain.
    pub chain: ChainId,
    /// The rules that matched in this chain and in the chains that it jumped to, in order.
    pub rules: Vec<&'p Rule>,
}

/// The final verdict on a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The packet is delivered to its original destination.
    Direct,
    /// The packet is redirected to this local port: its destination is rewritten.
    Redirected(u16),
    /// The packet is delivered unmodified to the transparent socket on this local port.
    Tproxied(u16),
    /// The packet is rejected, with a reply to the sender.
    Rejected,
    /// The packet is dropped, without a reply.
    Dropped,
}

impl RulePlan {
    /// Evaluates the rules for `packet`, assuming a listener on every port. [`RulePlan::reply`]
    /// evaluates whether the reply arrives.
    #[must_use]
    pub fn walk(&self, packet: &Packet, environment: &Environment) -> Walk<'_> {
        let (sender, hook) = match &packet.entry {
            Entry::Out { uid, gid, .. } => (Some((*uid, *gid)), Hook::Output),
            Entry::In { .. } => (None, Hook::Prerouting),
        };
        let walker = Walker {
            plan: self,
            environment,
            packet,
            destination: packet.destination,
            mark: packet.mark,
            connection_mark: packet.connection_mark,
            sender,
            hook,
            looped: false,
            capture: None,
            traversed: Vec::new(),
        };
        walker.walk()
    }
}

impl<'p> Walk<'p> {
    /// The rules that matched, in order.
    pub fn rules(&self) -> impl Iterator<Item = &'p Rule> {
        self.traversed.iter().flat_map(|passage| passage.rules.iter().copied())
    }
}

impl Environment {
    /// Returns true if a packet to `address` is delivered in this namespace.
    #[must_use]
    pub fn is_local(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.addresses().any(|own| own.addr() == address)
    }

    /// The interface through which packets to `address` leave: `lo` for local addresses, otherwise
    /// the one with a matching network, otherwise the first other one with the family.
    #[must_use]
    pub fn interface_to(&self, address: IpAddr) -> &str {
        if self.is_local(address) {
            return LOOPBACK;
        }
        let outer = || self.interfaces.iter().filter(|interface| interface.name != LOOPBACK);
        let on_link = outer()
            .find(|interface| interface.addresses.iter().any(|network| network.contains(&address)));
        let routed = || outer().find(|interface| interface.address(address.is_ipv6()).is_some());
        on_link.or_else(routed).or_else(|| outer().next()).map_or(LOOPBACK, |found| &found.name)
    }

    /// The first address of a family that is not on the loopback interface.
    #[must_use]
    pub fn address(&self, v6: bool) -> Option<IpAddr> {
        let outer = self.interfaces.iter().filter(|interface| interface.name != LOOPBACK);
        outer.filter_map(|interface| interface.address(v6)).next()
    }

    /// The first address of a family on an interface.
    #[must_use]
    pub fn address_of(&self, interface: &str, v6: bool) -> Option<IpAddr> {
        let mut named = self.interfaces.iter().filter(|candidate| candidate.name == interface);
        named.find_map(|interface| interface.address(v6))
    }

    fn addresses(&self) -> impl Iterator<Item = &IpNet> {
        self.interfaces.iter().flat_map(|interface| &interface.addresses)
    }
}

impl Interface {
    /// The interface's address. A link-local address only if there is no other, because clients do
    /// not connect to it.
    fn address(&self, v6: bool) -> Option<IpAddr> {
        let family = || self.addresses.iter().map(IpNet::addr).filter(|own| own.is_ipv6() == v6);
        family().find(|address| !is_link_local(*address)).or_else(|| family().next())
    }
}

/// Returns true for link-local addresses. No client outside of the pod connects to one.
pub(crate) fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// The state of an evaluation.
struct Walker<'p, 'w> {
    plan: &'p RulePlan,
    environment: &'w Environment,
    packet: &'w Packet,
    destination: SocketAddr,
    mark: u32,
    connection_mark: u32,
    /// The sending user and group. `None` once the packet has left its socket.
    sender: Option<(u32, u32)>,
    hook: Hook,
    /// True if a local process sent the packet, and it now arrives over loopback.
    looped: bool,
    /// The redirect or TPROXY delivery that a rule has caused.
    capture: Option<Verdict>,
    traversed: Vec<TraversedChain<'p>>,
}

/// The verdict of a chain.
enum ChainVerdict {
    /// Neither accepted nor rejected: the chain ended or returned.
    Continue,
    /// The packet skips the rest of this table.
    Accept,
    Verdict(Verdict),
}

impl<'p> Walker<'p, '_> {
    fn walk(mut self) -> Walk<'p> {
        let end = self
            .evaluate_hooks()
            .map_or_else(|end| end, |()| self.capture.unwrap_or(Verdict::Direct));
        Walk {
            local: self.is_delivered_locally(),
            traversed: self.traversed,
            end,
            destination: self.destination,
            mark: self.mark,
            connection_mark: self.connection_mark,
        }
    }

    fn evaluate_hooks(&mut self) -> Result<(), Verdict> {
        if self.hook == Hook::Output {
            self.evaluate_tables()?;
            if !self.is_delivered_locally() {
                return Ok(());
            }
            // The loopback interface detaches the packet from its socket (`skb_orphan` in
            // drivers/net/loopback.c). Mark and connection stay.
            (self.looped, self.sender, self.hook) = (true, None, Hook::Prerouting);
        }
        self.evaluate_tables()?;
        if self.is_delivered_locally() {
            self.hook = Hook::Input;
            self.evaluate_tables()?;
        }
        Ok(())
    }

    /// Returns true if an ip rule or the destination causes local delivery.
    fn is_delivered_locally(&self) -> bool {
        let by_destination = match &self.packet.entry {
            Entry::Out { interface, .. } => self.capture.is_some() || interface == LOOPBACK,
            Entry::In { .. } => self.environment.is_local(self.destination.ip()),
        };
        by_destination || self.plan.routes.iter().any(|route| route.mark.matches(self.mark))
    }

    /// Evaluates the base chains of the hook in the order of their priority.
    fn evaluate_tables(&mut self) -> Result<(), Verdict> {
        let plan = self.plan;
        let at_hook = plan.chains.iter().filter(|chain| chain.hook == Some(self.hook));
        let mut chains: Vec<ChainId> = at_hook.map(|chain| chain.id).collect();
        chains.sort_by_key(|chain| chain.table.priority());
        for chain in chains {
            if chain.table == Table::Nat && !self.applies_nat() {
                continue;
            }
            self.traversed.push(TraversedChain { chain, rules: Vec::new() });
            if let ChainVerdict::Verdict(end) = self.evaluate_chain(chain, 0) {
                return Err(end);
            }
        }
        Ok(())
    }

    /// Returns true if nat applies. It applies once per connection: to the first packet that
    /// conntrack sees, but not again when a sent packet arrives over loopback (`nf_nat_inet_fn`,
    /// net/netfilter/nf_nat_core.c).
    fn applies_nat(&self) -> bool {
        matches!(self.packet.state, ConntrackState::New | ConntrackState::PickedUp) && !self.looped
    }

    fn evaluate_chain(&mut self, chain: ChainId, depth: usize) -> ChainVerdict {
        let plan = self.plan;
        for rule in plan.rules_in(chain) {
            if !self.matches_rule(rule) {
                continue;
            }
            if let Some(passage) = self.traversed.last_mut() {
                passage.rules.push(rule);
            }
            match rule.action {
                Action::Return => return ChainVerdict::Continue,
                Action::Jump(target) if depth < MAX_JUMP_DEPTH => {
                    match self.evaluate_chain(target, depth + 1) {
                        ChainVerdict::Continue => {}
                        verdict => return verdict,
                    }
                }
                action => match self.apply_action(action) {
                    ChainVerdict::Continue => {}
                    verdict => return verdict,
                },
            }
        }
        ChainVerdict::Continue
    }

    fn apply_action(&mut self, action: Action) -> ChainVerdict {
        match action {
            Action::Accept => ChainVerdict::Accept,
            Action::Drop => ChainVerdict::Verdict(Verdict::Dropped),
            Action::Reject => ChainVerdict::Verdict(Verdict::Rejected),
            Action::Redirect(port) => {
                self.destination = SocketAddr::new(self.redirect_address(), port);
                // If TPROXY has assigned a socket already, the packet is delivered to that socket.
                self.capture.get_or_insert(Verdict::Redirected(port));
                ChainVerdict::Accept
            }
            Action::Tproxy(port, mark) => {
                self.mark = mark.write(self.mark);
                self.capture = Some(Verdict::Tproxied(port));
                ChainVerdict::Accept
            }
            Action::MarkPacket(mark) => {
                self.mark = mark.write(self.mark);
                ChainVerdict::Continue
            }
            Action::MarkConnection(mark) if self.is_tracked() => {
                self.connection_mark = mark.write(self.connection_mark);
                ChainVerdict::Continue
            }
            Action::SaveMark if self.is_tracked() => {
                self.connection_mark = self.mark;
                ChainVerdict::Continue
            }
            Action::RestoreMark if self.is_tracked() => {
                self.mark = self.connection_mark;
                ChainVerdict::Continue
            }
            // Zones affect the lookup of the connection, not the path of this packet.
            Action::MarkConnection(_)
            | Action::SaveMark
            | Action::RestoreMark
            | Action::Zone(..)
            | Action::Return
            | Action::Jump(_) => ChainVerdict::Continue,
        }
    }

    /// The address that `redirect` writes: loopback for packets that are sent, the interface's
    /// address for packets that arrive (net/netfilter/nf_nat_redirect.c).
    fn redirect_address(&self) -> IpAddr {
        let v6 = self.destination.is_ipv6();
        match self.input_interface() {
            None if v6 => Ipv6Addr::LOCALHOST.into(),
            None => Ipv4Addr::LOCALHOST.into(),
            Some(interface) => {
                self.environment.address_of(interface, v6).unwrap_or_else(|| self.destination.ip())
            }
        }
    }

    /// Returns true after the raw table, when conntrack has seen the packet.
    fn is_past_conntrack(&self) -> bool {
        let table = self.traversed.last().map(|passage| passage.chain.table);
        self.looped || table != Some(Table::Raw)
    }

    fn is_tracked(&self) -> bool {
        self.is_past_conntrack() && self.packet.state != ConntrackState::Invalid
    }

    fn direction(&self) -> Direction {
        match self.packet.state {
            ConntrackState::Established(direction) => direction,
            ConntrackState::New | ConntrackState::PickedUp | ConntrackState::Invalid => {
                Direction::Original
            }
        }
    }

    /// The interface at which the packet arrives. `None` for packets that are sent.
    fn input_interface(&self) -> Option<&str> {
        match &self.packet.entry {
            _ if self.hook == Hook::Output => None,
            Entry::In { interface } => Some(interface),
            Entry::Out { .. } => Some(LOOPBACK),
        }
    }

    /// The interface that output rules match: the one selected before the hook, even after a
    /// redirect (`struct nf_hook_state`, include/linux/netfilter.h).
    fn output_interface(&self) -> Option<&str> {
        match &self.packet.entry {
            Entry::Out { interface, .. } if self.hook == Hook::Output => Some(interface),
            Entry::Out { .. } | Entry::In { .. } => None,
        }
    }

    fn matches_rule(&self, rule: &Rule) -> bool {
        rule.families.contains(self.destination.is_ipv6())
            && rule.matches.iter().all(|condition| self.matches_condition(condition))
    }

    fn matches_condition(&self, condition: &Match) -> bool {
        let (source, destination) = (self.packet.source, self.destination);
        let carries = |protocol: &Protocol| self.packet.protocol == *protocol;
        let among = |interfaces: &[String], name: Option<&str>| {
            name.is_some_and(|name| interfaces.iter().any(|interface| interface == name))
        };
        let (uid, gid) = (self.sender.map(|sender| sender.0), self.sender.map(|sender| sender.1));
        match condition {
            Match::Protocol(protocol) => carries(protocol),
            Match::TcpModule => carries(&Protocol::Tcp),
            Match::NotOpening => {
                carries(&Protocol::Tcp) && self.packet.state != ConntrackState::New
            }
            Match::Invalid => {
                self.packet.state == ConntrackState::Invalid && self.is_past_conntrack()
            }
            Match::Established => {
                matches!(self.packet.state, ConntrackState::Established(_)) && self.is_tracked()
            }
            Match::Direction(direction) => self.is_tracked() && self.direction() == *direction,
            Match::Source(networks) => networks.iter().any(|net| net.contains(&source.ip())),
            Match::Destination(networks) => {
                networks.iter().any(|net| net.contains(&destination.ip()))
            }
            Match::NotDestination(network) => !network.contains(&destination.ip()),
            Match::SourcePort(protocol, port) => carries(protocol) && source.port() == *port,
            Match::DestinationPort(protocol, ports) => {
                carries(protocol) && ports.iter().any(|range| range.contains(destination.port()))
            }
            Match::NotDestinationPort(protocol, ports) => {
                carries(protocol) && !ports.iter().any(|range| range.contains(destination.port()))
            }
            Match::In(interfaces) => among(interfaces, self.input_interface()),
            Match::Out(interfaces) => among(interfaces, self.output_interface()),
            Match::NotOut(interface) => {
                self.output_interface().is_some_and(|name| name != interface)
            }
            Match::Uid(uids) => uid.is_some_and(|uid| uids.contains(&uid)),
            Match::NotUid(uids) => uid.is_none_or(|uid| !uids.contains(&uid)),
            Match::Gid(gids) => gid.is_some_and(|gid| gids.contains(&gid)),
            Match::NotGid(gids) => gid.is_none_or(|gid| !gids.contains(&gid)),
            Match::PacketMark(mark) => mark.matches(self.mark),
            Match::NotPacketMark(mark) => !mark.matches(self.mark),
            Match::ConnectionMark(mark) => self.is_tracked() && mark.matches(self.connection_mark),
        }
    }
}

#[cfg(test)]
mod tests;
