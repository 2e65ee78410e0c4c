//! Evaluates the reply to a packet that opens a connection. If the reply does not arrive, the
//! connection fails.
//!
//! `walk` evaluates the packet itself.

use std::net::IpAddr;

use super::{ConntrackState, Direction, Entry, Environment, LOOPBACK, Packet, Verdict, Walk};
use crate::plan::{LoopbackAddress, RulePlan};

/// The outcome of the reply to a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyOutcome {
    /// The reply reaches the sender of the packet.
    Delivered,
    /// The reply reaches the wrong host: the client whose address the proxy uses, or, for a
    /// forwarded packet, this namespace.
    Misrouted,
    /// The kernel cannot send the reply. A redirected local packet arrives at 127.0.0.1, from where
    /// the kernel has no route to a client's address: it selects the route before any rule marks
    /// the reply, and rejects loopback sources on other interfaces (`__mkroute_output` in
    /// net/ipv4/route.c, unless `route_localnet` is set). IPv6 has no such check.
    Unroutable,
}

impl RulePlan {
    /// Evaluates the reply to `packet`, whose path is `walk`. `None` if no socket received the
    /// packet.
    #[must_use]
    pub fn reply(
        &self,
        packet: &Packet,
        walk: &Walk<'_>,
        environment: &Environment,
    ) -> Option<ReplyOutcome> {
        if matches!(walk.end, Verdict::Rejected | Verdict::Dropped) {
            return None;
        }
        let reply = self.reply_to(packet, walk, environment);
        if is_unroutable(&reply) {
            return Some(ReplyOutcome::Unroutable);
        }
        let reply_walk = self.walk(&reply, environment);
        let arrives = !matches!(reply_walk.end, Verdict::Rejected | Verdict::Dropped);
        let sent_here = matches!(packet.entry, Entry::Out { .. });
        let returns = arrives && reply_walk.local == sent_here;
        Some(if returns { ReplyOutcome::Delivered } else { ReplyOutcome::Misrouted })
    }
}

impl RulePlan {
    /// Builds the reply. Its user is 0, because no rule matches the sender of a reply.
    fn reply_to(&self, packet: &Packet, walk: &Walk<'_>, environment: &Environment) -> Packet {
        let entry = if walk.local {
            let interface = self.interface_to(packet.source.ip(), environment).to_owned();
            Entry::Out { interface, uid: 0, gid: 0 }
        } else {
            Entry::In { interface: environment.interface_to(walk.destination.ip()).to_owned() }
        };
        Packet {
            protocol: packet.protocol,
            source: walk.destination,
            destination: packet.source,
            entry,
            state: ConntrackState::Established(Direction::Reply),
            mark: 0,
            connection_mark: walk.connection_mark,
        }
    }

    /// Like [`Environment::interface_to`], but includes the addresses that the plan adds.
    fn interface_to<'e>(&self, address: IpAddr, environment: &'e Environment) -> &'e str {
        let added = self.addresses.iter().any(|LoopbackAddress(added)| address == *added);
        if added { LOOPBACK } else { environment.interface_to(address) }
    }
}

fn is_unroutable(reply: &Packet) -> bool {
    let from_loopback = matches!(reply.source.ip(), IpAddr::V4(source) if source.is_loopback());
    from_loopback && matches!(&reply.entry, Entry::Out { interface, .. } if interface != LOOPBACK)
}
