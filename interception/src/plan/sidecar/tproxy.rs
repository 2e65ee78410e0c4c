//! `inbound.mode: tproxy`: inbound connections reach the proxy as they are, with the client's
//! address and the workload's, and the workload sees the client's.
//!
//! The mark 0x539 says "the proxy's connection to the workload, in the client's name"; its
//! connection keeps it, so that the workload's replies are routed back to the proxy. The mark 0x53a
//! says "the proxy calls this pod": such a packet is inbound, though it comes over loopback.

use super::{ISTIO_OUTPUT, excluded_ports, lo, spared, tcp_to};
use crate::plan::build::{Builder, Inputs, TCP, chain};
use crate::plan::{
    Action, ChainId, Direction, MARK_MASK, Mark, Match, PROXY_MARK, PolicyRoute, Table, own_ports,
};

const PREROUTING: ChainId = chain(Table::Mangle, "PREROUTING");
const OUTPUT: ChainId = chain(Table::Mangle, "OUTPUT");
const INBOUND: ChainId = chain(Table::Mangle, "ISTIO_INBOUND");
const DIVERT: ChainId = chain(Table::Mangle, "ISTIO_DIVERT");
const TPROXY: ChainId = chain(Table::Mangle, "ISTIO_TPROXY");

/// The mark of what the proxy sends to this pod as a client.
const SELF_CALL_MARK: u32 = 0x53a;
/// Istio's table for the route.
const ROUTE_TABLE: u32 = 133;
/// Just before `main`; Istio leaves the choice to the kernel, which adds another rule each time.
const RULE_PRIORITY: u32 = 32765;

/// What delivers marked packets to this namespace.
pub(in crate::plan) fn route(exact: bool) -> PolicyRoute {
    PolicyRoute { mark: mark(exact, PROXY_MARK), priority: RULE_PRIORITY, table: ROUTE_TABLE }
}

pub(super) fn mangle(b: &mut Builder, inputs: &Inputs<'_>) {
    let include = &inputs.settings.inbound.include_ports;
    if !include.as_ref().is_some_and(Vec::is_empty) {
        targets(b, inputs);
        b.rule(PREROUTING, "enter-mangle-inbound", "all TCP that arrives")
            .families(inputs.neutral())
            .when([TCP], Action::Jump(INBOUND));
    }
    inbound(b, inputs);
    way_back(b, inputs);
}

pub(super) fn excluded_interfaces(b: &mut Builder, inputs: &Inputs<'_>) {
    let (settings, neutral) = (inputs.settings, inputs.neutral());
    for interfaces in inputs.split(&settings.inbound.exclude_interfaces) {
        b.rule(
            PREROUTING,
            "exclude-interfaces-tproxy-in",
            "inbound.exclude_interfaces asks for it",
        )
        .numbered()
        .families(neutral)
        .when([Match::In(interfaces)], Action::Return);
    }
    if !settings.exact {
        // Istio's rule would keep the workload's replies from returning to the proxy too.
        return;
    }
    for interfaces in inputs.split(&settings.outbound.exclude_interfaces) {
        b.rule(OUTPUT, "exclude-interfaces-tproxy", "outbound.exclude_interfaces asks for it")
            .numbered()
            .families(neutral)
            .when([Match::Out(interfaces)], Action::Return);
    }
}

/// The chains that end in the proxy.
fn targets(b: &mut Builder, inputs: &Inputs<'_>) {
    let (neutral, proxy) = (inputs.neutral(), proxys(inputs));
    b.rule(DIVERT, "divert-mark", "a connection that the proxy has stays with it")
        .families(neutral)
        .when([], Action::MarkPacket(proxy));
    b.rule(DIVERT, "divert", "and needs no further look")
        .families(neutral)
        .when([], Action::Accept);
    b.rule(
        TPROXY,
        "established-tproxy",
        "leaves connections alone that are older than the rules: they are the workload's own",
    )
    .ours()
    .families(neutral)
    .when([TCP, Match::NotOpening], Action::Return);
    for &family in &inputs.families {
        b.rule(TPROXY, "tproxy", "here the connection is caught").twin(family).when(
            [Match::NotDestination(family.loopback), TCP],
            Action::Tproxy(inputs.ports.inbound, proxy),
        );
        b.rule(
            TPROXY,
            "tproxy-closed",
            "without a proxy the connection is dropped: nftables would let it through",
        )
        .nftables_only()
        .twin(family)
        .when([Match::NotDestination(family.loopback), TCP], Action::Drop);
    }
}

fn inbound(b: &mut Builder, inputs: &Inputs<'_>) {
    let (neutral, proxy) = (inputs.neutral(), proxys(inputs));
    b.rule(
        INBOUND,
        "proxy-connection",
        "what the proxy opens in a client's name is not caught again",
    )
    .families(neutral)
    .when([TCP, Match::PacketMark(proxy)], Action::Return);
    for &family in &inputs.families {
        let from = Match::Source(vec![family.last_hop.into()]);
        b.rule(INBOUND, "last-hop", "nor what it opens from 127.0.0.6 or ::6")
            .twin(family)
            .when([from, Match::In(lo()), TCP], Action::Return);
    }
    b.rule(INBOUND, "app-to-itself", "a workload that calls its own address stays direct")
        .families(neutral)
        .when([Match::In(lo()), TCP, Match::NotPacketMark(self_call(inputs))], Action::Return);
    for interfaces in inputs.split(&inputs.settings.virtual_interfaces) {
        b.rule(
            INBOUND,
            "virtual-tproxy",
            "what a virtual machine sends is outbound, and nat leads it to its port",
        )
        .ours()
        .numbered()
        .families(neutral)
        .when([Match::In(interfaces), TCP], Action::Return);
    }
    b.rule(INBOUND, "hbone-in-tproxy", "HBONE arrives at its listener as it is")
        .ours()
        .families(neutral)
        .when([tcp_to(inputs.ports.hbone)], Action::Return);
    own_ports::add(b, inputs, INBOUND, "own-ports-in-tproxy", spared(inputs));
    let Some(ports) = &inputs.settings.inbound.include_ports else {
        excluded_ports(b, inputs, INBOUND);
        divert_or_tproxy(b, inputs, TCP);
        return;
    };
    for ports in inputs.destination_ports(ports) {
        divert_or_tproxy(b, inputs, ports);
    }
}

/// In `ISTIO_OUTPUT`, before what would take it for a call of this pod. Istio's proxy is root in
/// this mode, and so another user than the one that the rules know.
pub(super) fn spare_imitated(b: &mut Builder, inputs: &Inputs<'_>) {
    b.rule(
        ISTIO_OUTPUT,
        "proxy-connection-out",
        "what the proxy opens in a client's name goes to the workload",
    )
    .ours()
    .families(inputs.neutral())
    .when([Match::Out(lo()), Match::PacketMark(proxys(inputs))], Action::Return);
}

fn divert_or_tproxy(b: &mut Builder, inputs: &Inputs<'_>, these: Match) {
    let neutral = inputs.neutral();
    let mut established = vec![these.clone(), Match::Established];
    if !inputs.settings.exact {
        // Istio's rule also takes the answers to what is passed on for a virtual machine.
        established.push(Match::Direction(Direction::Original));
    }
    b.rule(INBOUND, "capture-established", "packets of connections that the proxy has")
        .numbered()
        .families(neutral)
        .when_all(established, Action::Jump(DIVERT));
    b.rule(INBOUND, "capture-inbound", "connections to the workload pass the proxy")
        .numbered()
        .families(neutral)
        .when([these], Action::Jump(TPROXY));
}

/// Marks, so that the workload's replies to a client's address return to the proxy.
fn way_back(b: &mut Builder, inputs: &Inputs<'_>) {
    // Tunnels come from IPv6 clients also where the workload's own IPv6 is not caught.
    let (settings, served, proxy) = (inputs.settings, inputs.served(), proxys(inputs));
    let exact = settings.exact;
    b.rule(
        PREROUTING,
        "mark-proxy-connection",
        "remembers what the proxy opens in a client's name",
    )
    .families(served)
    .when(
        [TCP, Match::PacketMark(proxy)],
        if exact { Action::SaveMark } else { Action::MarkConnection(proxy) },
    );
    b.rule(OUTPUT, "keep-mark", "the proxy's own packets have their mark")
        .families(served)
        .when([Match::Out(lo()), TCP, Match::PacketMark(proxy)], Action::Return);
    let uids = inputs.split(&settings.proxy_uids).into_iter().map(Match::Uid);
    let gids = inputs.split(&settings.proxy_gids).into_iter().map(Match::Gid);
    for owner in uids.chain(gids) {
        for &family in &inputs.families {
            b.rule(
                OUTPUT,
                "mark-self-call",
                "the proxy calls this pod: inbound, though over loopback",
            )
            .numbered()
            .twin(family)
            .when(
                [Match::NotDestination(family.loopback), Match::Out(lo()), TCP, owner.clone()],
                Action::MarkPacket(self_call(inputs)),
            );
        }
    }
    b.rule(
        OUTPUT,
        "return-to-proxy",
        "routes the workload's replies to a client back to the proxy",
    )
    .families(served)
    .when(
        [TCP, Match::ConnectionMark(proxy)],
        if exact { Action::RestoreMark } else { Action::MarkPacket(proxy) },
    );
}

fn proxys(inputs: &Inputs<'_>) -> Mark {
    mark(inputs.settings.exact, PROXY_MARK)
}

fn self_call(inputs: &Inputs<'_>) -> Mark {
    mark(inputs.settings.exact, SELF_CALL_MARK)
}

/// Istio takes the whole mark, ours is in our bits of it.
fn mark(exact: bool, value: u32) -> Mark {
    if exact { Mark::whole(value) } else { Mark { value, mask: MARK_MASK } }
}
