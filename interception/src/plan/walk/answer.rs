//! The answer to a packet that opens a connection: without it there is no connection, whoever got the packet.
//!
//! Not here: how the packet got there (`walk.rs`).

use std::net::IpAddr;

use super::{Direction, End, Environment, LOOPBACK, Packet, State, Walk, Way};
use crate::plan::{LoopbackAddress, RulePlan};

/// What becomes of the answer to a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// It reaches who sent the packet.
    Returns,
    /// It reaches another: a client that was imitated, or this namespace what was passed on for somebody.
    Astray,
    /// It is not sent. What is redirected where it is sent arrives at 127.0.0.1, and from there the kernel has no
    /// route to an imitated client: it looks for one before any rule can mark the answer, and lets no loopback
    /// address out (`__mkroute_output`, net/ipv4/route.c, unless `route_localnet` is set). IPv6 has no such check.
    Unroutable,
}

impl RulePlan {
    /// What becomes of the answer to `packet`, whose way `walk` is; `None`: nobody got it, so there is none.
    #[must_use]
    pub fn answer(
        &self,
        packet: &Packet,
        walk: &Walk<'_>,
        environment: &Environment,
    ) -> Option<Answer> {
        if matches!(walk.end, End::Rejected | End::Dropped) {
            return None;
        }
        let answer = self.answer_to(packet, walk, environment);
        if is_unroutable(&answer) {
            return Some(Answer::Unroutable);
        }
        let back = self.walk(&answer, environment);
        let arrives = !matches!(back.end, End::Rejected | End::Dropped);
        let sent_here = matches!(packet.way, Way::Out { .. });
        let returns = arrives && back.local == sent_here;
        Some(if returns { Answer::Returns } else { Answer::Astray })
    }
}

impl RulePlan {
    /// What the receiver of `packet` sends back. No rule asks who sends an answer, so that it is user 0 here.
    fn answer_to(&self, packet: &Packet, walk: &Walk<'_>, environment: &Environment) -> Packet {
        let way = if walk.local {
            let interface = self.interface_to(packet.source.ip(), environment).to_owned();
            Way::Out { interface, uid: 0, gid: 0 }
        } else {
            Way::In { interface: environment.interface_to(walk.destination.ip()).to_owned() }
        };
        Packet {
            protocol: packet.protocol,
            source: walk.destination,
            destination: packet.source,
            way,
            state: State::Established(Direction::Reply),
            mark: 0,
            connection_mark: walk.connection_mark,
        }
    }

    /// The addresses that the plan needs are there when its rules are.
    fn interface_to<'e>(&self, address: IpAddr, environment: &'e Environment) -> &'e str {
        let added = self.addresses.iter().any(|LoopbackAddress(added)| address == *added);
        if added { LOOPBACK } else { environment.interface_to(address) }
    }
}

fn is_unroutable(answer: &Packet) -> bool {
    let from_loopback = matches!(answer.source.ip(), IpAddr::V4(source) if source.is_loopback());
    from_loopback && matches!(&answer.way, Way::Out { interface, .. } if interface != LOOPBACK)
}
