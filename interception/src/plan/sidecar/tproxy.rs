//! The rules of `inbound.mode: tproxy`: inbound connections reach the proxy unmodified.
//!
//! They keep the addresses of client and workload, and the workload sees the client's address. The
//! mark 0x539 identifies the proxy's connection to the workload from the client's address, and its
//! connection mark routes the workload's replies back to the proxy. The mark 0x53a identifies a
//! connection from the proxy to its own pod, which is inbound although it uses loopback.

use super::{ISTIO_OUTPUT, excluded_ports, exempt_ports, loopback_interface, tcp_to};
use crate::plan::build::{Builder, Inputs, TCP, chain};
use crate::plan::{
    Action, ChainId, Direction, MARK_MASK, Mark, Match, PROXY_MARK, PolicyRoute, Table, own_ports,
};

const PREROUTING: ChainId = chain(Table::Mangle, "PREROUTING");
const OUTPUT: ChainId = chain(Table::Mangle, "OUTPUT");
const INBOUND: ChainId = chain(Table::Mangle, "ISTIO_INBOUND");
const DIVERT: ChainId = chain(Table::Mangle, "ISTIO_DIVERT");
const TPROXY: ChainId = chain(Table::Mangle, "ISTIO_TPROXY");

/// The mark of connections that the proxy opens for the workload, and that lead back to the pod.
const OWN_POD_MARK: u32 = 0x53a;
/// The routing table, as in Istio.
const ROUTE_TABLE: u32 = 133;
/// The priority of the ip rule, which precedes `main`. Istio lets the kernel choose it, which adds
/// another rule at each installation.
const RULE_PRIORITY: u32 = 32765;

/// The route that delivers marked packets to this namespace.
pub(in crate::plan) fn route(exact: bool) -> PolicyRoute {
    PolicyRoute { mark: mark(exact, PROXY_MARK), priority: RULE_PRIORITY, table: ROUTE_TABLE }
}

pub(super) fn add_mangle_rules(b: &mut Builder, inputs: &Inputs<'_>) {
    let include = &inputs.settings.inbound.include_ports;
    if !include.as_ref().is_some_and(Vec::is_empty) {
        add_target_chains(b, inputs);
        b.rule(PREROUTING, "enter-mangle-inbound", "every TCP connection that arrives")
            .families(inputs.captured())
            .when([TCP], Action::Jump(INBOUND));
    }
    add_inbound_rules(b, inputs);
    mark_replies(b, inputs);
}

pub(super) fn excluded_interfaces(b: &mut Builder, inputs: &Inputs<'_>) {
    let (settings, captured) = (inputs.settings, inputs.captured());
    for interfaces in inputs.split(&settings.inbound.exclude_interfaces) {
        b.rule(
            PREROUTING,
            "exclude-interfaces-tproxy-in",
            "excluded by inbound.exclude_interfaces",
        )
        .numbered()
        .families(captured)
        .when([Match::In(interfaces)], Action::Return);
    }
    if !settings.exact {
        // Istio's rule would also prevent the workload's replies from returning to the proxy.
        return;
    }
    for interfaces in inputs.split(&settings.outbound.exclude_interfaces) {
        b.rule(OUTPUT, "exclude-interfaces-tproxy", "excluded by outbound.exclude_interfaces")
            .numbered()
            .families(captured)
            .when([Match::Out(interfaces)], Action::Return);
    }
}

/// Adds the chains that deliver packets to the proxy.
fn add_target_chains(b: &mut Builder, inputs: &Inputs<'_>) {
    let (captured, proxy) = (inputs.captured(), proxy_mark(inputs));
    b.rule(DIVERT, "divert-mark", "keeps an established connection of the proxy with the proxy")
        .families(captured)
        .when([], Action::MarkPacket(proxy));
    b.rule(DIVERT, "divert", "accepts it").families(captured).when([], Action::Accept);
    b.rule(
        TPROXY,
        "established-tproxy",
        "skips connections that are older than the rules: they belong to the workload",
    )
    .omitted_by_exact()
    .families(captured)
    .when([TCP, Match::NotOpening], Action::Return);
    for &family in &inputs.families {
        b.rule(TPROXY, "tproxy", "delivers the connection to the proxy").for_family(family).when(
            [Match::NotDestination(family.loopback), TCP],
            Action::Tproxy(inputs.ports.inbound, proxy),
        );
        b.rule(
            TPROXY,
            "tproxy-closed",
            "drops the connection if no proxy listens: TPROXY in nftables would pass it",
        )
        .nftables_only()
        .for_family(family)
        .when([Match::NotDestination(family.loopback), TCP], Action::Drop);
    }
}

fn add_inbound_rules(b: &mut Builder, inputs: &Inputs<'_>) {
    let (captured, proxy) = (inputs.captured(), proxy_mark(inputs));
    b.rule(INBOUND, "proxy-connection", "skips the proxy's connections from a client's address")
        .families(captured)
        .when([TCP, Match::PacketMark(proxy)], Action::Return);
    for &family in &inputs.families {
        let from = Match::Source(vec![family.last_hop.into()]);
        b.rule(INBOUND, "last-hop", "skips the proxy's connections from 127.0.0.6 or ::6")
            .for_family(family)
            .when([from, Match::In(loopback_interface()), TCP], Action::Return);
    }
    b.rule(INBOUND, "app-to-itself", "skips a workload's calls to its own address")
        .families(captured)
        .when(
            [Match::In(loopback_interface()), TCP, Match::NotPacketMark(own_pod_mark(inputs))],
            Action::Return,
        );
    for interfaces in inputs.split(&inputs.settings.virtual_interfaces) {
        b.rule(
            INBOUND,
            "virtual-tproxy",
            "traffic from a virtual machine is outbound; nat redirects it",
        )
        .omitted_by_exact()
        .numbered()
        .families(captured)
        .when([Match::In(interfaces), TCP], Action::Return);
    }
    b.rule(INBOUND, "hbone-in-tproxy", "HBONE reaches its listener without a redirect")
        .omitted_by_exact()
        .families(captured)
        .when([tcp_to(inputs.ports.hbone)], Action::Return);
    own_ports::add(b, inputs, INBOUND, "own-ports-in-tproxy", exempt_ports(inputs));
    let Some(ports) = &inputs.settings.inbound.include_ports else {
        excluded_ports(b, inputs, INBOUND);
        divert_or_tproxy(b, inputs, TCP);
        return;
    };
    for ports in inputs.destination_ports(ports) {
        divert_or_tproxy(b, inputs, ports);
    }
}

/// Exempts the proxy's connections from a client's address in `ISTIO_OUTPUT`, before the rules for
/// calls to the pod itself. In this mode Istio's proxy runs as root, which is not the user that the
/// rules match.
pub(super) fn exempt_preserved_sources(b: &mut Builder, inputs: &Inputs<'_>) {
    b.rule(
        ISTIO_OUTPUT,
        "proxy-connection-out",
        "skips the proxy's connections to the workload from a client's address",
    )
    .omitted_by_exact()
    .families(inputs.captured())
    .when(
        [Match::Out(loopback_interface()), Match::PacketMark(proxy_mark(inputs))],
        Action::Return,
    );
}

fn divert_or_tproxy(b: &mut Builder, inputs: &Inputs<'_>, condition: Match) {
    let captured = inputs.captured();
    let mut established = vec![condition.clone(), Match::Established];
    if !inputs.settings.exact {
        // Istio's rule would also divert the replies to traffic that is forwarded for a virtual
        // machine.
        established.push(Match::Direction(Direction::Original));
    }
    b.rule(INBOUND, "capture-established", "packets of the proxy's established connections")
        .numbered()
        .families(captured)
        .when_all(established, Action::Jump(DIVERT));
    b.rule(INBOUND, "capture-inbound", "captures connections to the workload")
        .numbered()
        .families(captured)
        .when([condition], Action::Jump(TPROXY));
}

/// Adds the marks that return the workload's replies to the proxy.
fn mark_replies(b: &mut Builder, inputs: &Inputs<'_>) {
    // Include families that are not captured: IPv6 clients connect through tunnels even if the
    // workload's IPv6 is not captured.
    let (settings, supported, proxy) = (inputs.settings, inputs.supported(), proxy_mark(inputs));
    let exact = settings.exact;
    b.rule(
        PREROUTING,
        "mark-proxy-connection",
        "marks the proxy's connections from a client's address",
    )
    .families(supported)
    .when(
        [TCP, Match::PacketMark(proxy)],
        if exact { Action::SaveMark } else { Action::MarkConnection(proxy) },
    );
    b.rule(OUTPUT, "keep-mark", "the proxy's own packets already carry their mark")
        .families(supported)
        .when([Match::Out(loopback_interface()), TCP, Match::PacketMark(proxy)], Action::Return);
    let uids = inputs.split(&settings.proxy_uids).into_iter().map(Match::Uid);
    let gids = inputs.split(&settings.proxy_gids).into_iter().map(Match::Gid);
    for owner in uids.chain(gids) {
        for &family in &inputs.families {
            b.rule(
                OUTPUT,
                "mark-self-call",
                "marks the proxy's calls to this pod: they are inbound although they use loopback",
            )
            .numbered()
            .for_family(family)
            .when(
                [
                    Match::NotDestination(family.loopback),
                    Match::Out(loopback_interface()),
                    TCP,
                    owner.clone(),
                ],
                Action::MarkPacket(own_pod_mark(inputs)),
            );
        }
    }
    b.rule(
        OUTPUT,
        "return-to-proxy",
        "routes the workload's replies to a client back to the proxy",
    )
    .families(supported)
    .when(
        [TCP, Match::ConnectionMark(proxy)],
        if exact { Action::RestoreMark } else { Action::MarkPacket(proxy) },
    );
}

fn proxy_mark(inputs: &Inputs<'_>) -> Mark {
    mark(inputs.settings.exact, PROXY_MARK)
}

fn own_pod_mark(inputs: &Inputs<'_>) -> Mark {
    mark(inputs.settings.exact, OWN_POD_MARK)
}

/// Istio uses all bits of the mark, underpass only those of [`MARK_MASK`].
fn mark(exact: bool, value: u32) -> Mark {
    if exact { Mark::full(value) } else { Mark { value, mask: MARK_MASK } }
}
