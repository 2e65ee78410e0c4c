//! One packet on its way through the plan, hook by hook, as the kernel would take it.
//!
//! Pure, like the plan. Not here: what the packets of a profile are, how a walk is told to people
//! (`explain.rs`), and what becomes of the answer (`walk/answer.rs`).
//!
//! ```text
//! sent      raw, mangle, nat, filter OUTPUT ──▶ out, or if it stays here:
//!           raw, mangle PREROUTING ──▶ filter INPUT ──▶ a socket
//! arriving  raw, mangle, nat PREROUTING ──▶ filter INPUT ──▶ a socket, or on to where it is going
//! ```

mod answer;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

pub use answer::Answer;
use ipnet::IpNet;

use super::{Action, ChainId, Direction, Hook, Match, Protocol, Rule, RulePlan, Table};

/// The interface of packets that never leave.
const LOOPBACK: &str = "lo";
/// How many jumps deep the kernel goes (NFT_JUMP_STACK_SIZE, include/net/netfilter/nf_tables.h).
const DEEPEST_JUMP: usize = 16;

/// A packet, before any rule has seen it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// What it carries.
    pub protocol: Protocol,
    /// Where it comes from.
    pub source: SocketAddr,
    /// Where it is going, of the same family.
    pub destination: SocketAddr,
    /// How it gets here.
    pub way: Way,
    /// What conntrack says of it.
    pub state: State,
    /// Its mark: that of the socket that sends it. Marks do not cross namespaces.
    pub mark: u32,
    /// Its connection's mark.
    pub connection_mark: u32,
}

/// How a packet gets to the rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// A local process sends it.
    Out {
        /// Where the routes send it: `lo` if it is for this namespace.
        interface: String,
        /// The user of the process.
        uid: u32,
        /// The group of the process.
        gid: u32,
    },
    /// It arrives.
    In {
        /// At this interface.
        interface: String,
    },
}

/// What conntrack says of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It opens a connection: a TCP SYN, or a first datagram.
    New,
    /// TCP of a connection that is older than the rules: conntrack takes it for a new one.
    PickedUp,
    /// It goes this way in a connection that conntrack knows.
    Established(Direction),
    /// It fits no connection, and cannot open one.
    Invalid,
}

/// The interfaces of a namespace and their addresses: what of the world outside the plan decides
/// about a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Environment {
    /// The interfaces that are up, loopback among them or not.
    pub interfaces: Vec<Interface>,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// What it is called.
    pub name: String,
    /// Its addresses, with the length of their networks.
    pub addresses: Vec<IpNet>,
}

/// What became of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Walk<'p> {
    /// The base chains that it passed, in order.
    pub passages: Vec<Passage<'p>>,
    /// Where it ended.
    pub end: End,
    /// Whether it stayed in this namespace.
    pub local: bool,
    /// Its destination at the end.
    pub destination: SocketAddr,
    /// Its mark at the end.
    pub mark: u32,
    /// Its connection's mark at the end.
    pub connection_mark: u32,
}

/// A base chain that a packet passed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passage<'p> {
    /// Which one.
    pub chain: ChainId,
    /// The rules that matched there and in the chains that they jump to, in order.
    pub rules: Vec<&'p Rule>,
}

/// Where a packet ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Where it was going.
    Direct,
    /// At this local port, its destination rewritten.
    Redirected(u16),
    /// At the transparent socket of this local port, as it is.
    Tproxied(u16),
    /// Its sender is told no.
    Rejected,
    /// Nowhere, and nobody is told.
    Dropped,
}

impl RulePlan {
    /// Takes `packet` through the rules. Whatever they lead to is taken to have a listener; whether its
    /// answer comes back is another question ([`RulePlan::answer`]).
    #[must_use]
    pub fn walk(&self, packet: &Packet, environment: &Environment) -> Walk<'_> {
        let (sender, hook) = match &packet.way {
            Way::Out { uid, gid, .. } => (Some((*uid, *gid)), Hook::Output),
            Way::In { .. } => (None, Hook::Prerouting),
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
            caught: None,
            passages: Vec::new(),
        };
        walker.walk()
    }
}

impl<'p> Walk<'p> {
    /// The rules that matched, in order.
    pub fn rules(&self) -> impl Iterator<Item = &'p Rule> {
        self.passages.iter().flat_map(|passage| passage.rules.iter().copied())
    }
}

impl Environment {
    /// Whether a packet to `address` is for this namespace.
    #[must_use]
    pub fn is_local(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.addresses().any(|own| own.addr() == address)
    }

    /// The interface by which packets to `address` leave: `lo` for local ones, else the one with
    /// their network, else the first that is not `lo` and has that family.
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

    /// The first address of a family that is not loopback's: the namespace's own.
    #[must_use]
    pub fn address(&self, v6: bool) -> Option<IpAddr> {
        let outer = self.interfaces.iter().filter(|interface| interface.name != LOOPBACK);
        outer.filter_map(|interface| interface.address(v6)).next()
    }

    /// The first address of an interface, of a family.
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
    /// Link-local addresses count only where there are no others: nobody connects to them.
    fn address(&self, v6: bool) -> Option<IpAddr> {
        let family = || self.addresses.iter().map(IpNet::addr).filter(|own| own.is_ipv6() == v6);
        family().find(|address| !is_link_local(*address)).or_else(|| family().next())
    }
}

/// Nobody connects to such an address from outside.
pub(crate) fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// A packet on its way.
struct Walker<'p, 'w> {
    plan: &'p RulePlan,
    environment: &'w Environment,
    packet: &'w Packet,
    destination: SocketAddr,
    mark: u32,
    connection_mark: u32,
    /// User and group, while the packet still belongs to the socket that sent it.
    sender: Option<(u32, u32)>,
    hook: Hook,
    /// Whether it was sent here, and now arrives by loopback.
    looped: bool,
    caught: Option<End>,
    passages: Vec<Passage<'p>>,
}

/// What a chain decides.
enum Verdict {
    /// Nothing: its end, or a return.
    Continue,
    /// The table is done with the packet.
    Accept,
    End(End),
}

impl<'p> Walker<'p, '_> {
    fn walk(mut self) -> Walk<'p> {
        let end = self.hooks().map_or_else(|end| end, |()| self.caught.unwrap_or(End::Direct));
        Walk {
            local: self.stays(),
            passages: self.passages,
            end,
            destination: self.destination,
            mark: self.mark,
            connection_mark: self.connection_mark,
        }
    }

    fn hooks(&mut self) -> Result<(), End> {
        if self.hook == Hook::Output {
            self.tables()?;
            if !self.stays() {
                return Ok(());
            }
            // The loopback interface takes the packet from its socket (`skb_orphan` in
            // drivers/net/loopback.c); mark and connection stay with it.
            (self.looped, self.sender, self.hook) = (true, None, Hook::Prerouting);
        }
        self.tables()?;
        if self.stays() {
            self.hook = Hook::Input;
            self.tables()?;
        }
        Ok(())
    }

    /// Whether the packet is delivered in this namespace: by an ip rule, or by its destination.
    fn stays(&self) -> bool {
        let by_destination = match &self.packet.way {
            Way::Out { interface, .. } => self.caught.is_some() || interface == LOOPBACK,
            Way::In { .. } => self.environment.is_local(self.destination.ip()),
        };
        by_destination || self.plan.routes.iter().any(|route| route.mark.matches(self.mark))
    }

    /// The base chains of the hook, in order of their priority.
    fn tables(&mut self) -> Result<(), End> {
        let plan = self.plan;
        let at_hook = plan.chains.iter().filter(|chain| chain.hook == Some(self.hook));
        let mut chains: Vec<ChainId> = at_hook.map(|chain| chain.id).collect();
        chains.sort_by_key(|chain| chain.table.priority());
        for chain in chains {
            if chain.table == Table::Nat && !self.asks_nat() {
                continue;
            }
            self.passages.push(Passage { chain, rules: Vec::new() });
            if let Verdict::End(end) = self.chain(chain, 0) {
                return Err(end);
            }
        }
        Ok(())
    }

    /// Nat decides once about a connection: by what conntrack takes for its first packet, and
    /// where that is sent, no second time where it arrives (`nf_nat_inet_fn`,
    /// net/netfilter/nf_nat_core.c).
    fn asks_nat(&self) -> bool {
        matches!(self.packet.state, State::New | State::PickedUp) && !self.looped
    }

    fn chain(&mut self, chain: ChainId, depth: usize) -> Verdict {
        let plan = self.plan;
        for rule in plan.rules_of(chain) {
            if !self.is_met(rule) {
                continue;
            }
            if let Some(passage) = self.passages.last_mut() {
                passage.rules.push(rule);
            }
            match rule.action {
                Action::Return => return Verdict::Continue,
                Action::Jump(target) if depth < DEEPEST_JUMP => {
                    match self.chain(target, depth + 1) {
                        Verdict::Continue => {}
                        verdict => return verdict,
                    }
                }
                action => match self.act(action) {
                    Verdict::Continue => {}
                    verdict => return verdict,
                },
            }
        }
        Verdict::Continue
    }

    fn act(&mut self, action: Action) -> Verdict {
        match action {
            Action::Accept => Verdict::Accept,
            Action::Drop => Verdict::End(End::Dropped),
            Action::Reject => Verdict::End(End::Rejected),
            Action::Redirect(port) => {
                self.destination = SocketAddr::new(self.redirected_to(), port);
                // A transparent socket that has the packet already keeps it.
                self.caught.get_or_insert(End::Redirected(port));
                Verdict::Accept
            }
            Action::Tproxy(port, mark) => {
                self.mark = mark.write(self.mark);
                self.caught = Some(End::Tproxied(port));
                Verdict::Accept
            }
            Action::MarkPacket(mark) => {
                self.mark = mark.write(self.mark);
                Verdict::Continue
            }
            Action::MarkConnection(mark) if self.is_tracked() => {
                self.connection_mark = mark.write(self.connection_mark);
                Verdict::Continue
            }
            Action::SaveMark if self.is_tracked() => {
                self.connection_mark = self.mark;
                Verdict::Continue
            }
            Action::RestoreMark if self.is_tracked() => {
                self.mark = self.connection_mark;
                Verdict::Continue
            }
            // Zones change which connections are found, not where this one goes.
            Action::MarkConnection(_)
            | Action::SaveMark
            | Action::RestoreMark
            | Action::Zone(..)
            | Action::Return
            | Action::Jump(_) => Verdict::Continue,
        }
    }

    /// Where `redirect` sends: to loopback what is sent here, to the interface's own address what
    /// arrives (net/netfilter/nf_nat_redirect.c).
    fn redirected_to(&self) -> IpAddr {
        let v6 = self.destination.is_ipv6();
        match self.arrives_by() {
            None if v6 => Ipv6Addr::LOCALHOST.into(),
            None => Ipv4Addr::LOCALHOST.into(),
            Some(interface) => {
                self.environment.address_of(interface, v6).unwrap_or_else(|| self.destination.ip())
            }
        }
    }

    /// Whether conntrack has seen the packet, which it does after the raw table.
    fn is_past_conntrack(&self) -> bool {
        let table = self.passages.last().map(|passage| passage.chain.table);
        self.looped || table != Some(Table::Raw)
    }

    fn is_tracked(&self) -> bool {
        self.is_past_conntrack() && self.packet.state != State::Invalid
    }

    fn direction(&self) -> Direction {
        match self.packet.state {
            State::Established(direction) => direction,
            State::New | State::PickedUp | State::Invalid => Direction::Original,
        }
    }

    /// The interface that it arrives by, where it does.
    fn arrives_by(&self) -> Option<&str> {
        match &self.packet.way {
            _ if self.hook == Hook::Output => None,
            Way::In { interface } => Some(interface),
            Way::Out { .. } => Some(LOOPBACK),
        }
    }

    /// The interface that rules see it leave by: all of a hook see the one that was chosen before
    /// it, also after a redirect (`struct nf_hook_state`, include/linux/netfilter.h).
    fn sent_by(&self) -> Option<&str> {
        match &self.packet.way {
            Way::Out { interface, .. } if self.hook == Hook::Output => Some(interface),
            Way::Out { .. } | Way::In { .. } => None,
        }
    }

    fn is_met(&self, rule: &Rule) -> bool {
        rule.families.contains(self.destination.is_ipv6())
            && rule.matches.iter().all(|condition| self.is(condition))
    }

    fn is(&self, condition: &Match) -> bool {
        let (source, destination) = (self.packet.source, self.destination);
        let carries = |protocol: &Protocol| self.packet.protocol == *protocol;
        let among = |interfaces: &[String], name: Option<&str>| {
            name.is_some_and(|name| interfaces.iter().any(|interface| interface == name))
        };
        let (uid, gid) = (self.sender.map(|sender| sender.0), self.sender.map(|sender| sender.1));
        match condition {
            Match::Protocol(protocol) => carries(protocol),
            Match::TcpModule => carries(&Protocol::Tcp),
            Match::NotOpening => carries(&Protocol::Tcp) && self.packet.state != State::New,
            Match::Invalid => self.packet.state == State::Invalid && self.is_past_conntrack(),
            Match::Established => {
                matches!(self.packet.state, State::Established(_)) && self.is_tracked()
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
            Match::In(interfaces) => among(interfaces, self.arrives_by()),
            Match::Out(interfaces) => among(interfaces, self.sent_by()),
            Match::NotOut(interface) => self.sent_by().is_some_and(|name| name != interface),
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
