//! The Istio ambient profile: the proxy's packets are told by their mark.
//!
//! Every socket of the proxy carries the packet mark 0x539. What does not carry it is the
//! workload's:
//!
//! ```text
//! app ── nat OUTPUT ── capture-outbound ─────────────▶ proxy :outbound ── marked ──▶ peer
//! peer ── nat PREROUTING ── hbone-in (:hbone as it is) | capture-inbound ─▶ proxy :inbound
//! proxy ── marked, from the peer's address, over lo ── mark-proxy-connection ──▶ app
//! app's reply to the peer's address ── return-to-proxy ── ip rule, table 100 ── lo ──▶ proxy
//! ```
//!
//! Istio has no exclusions here; ours stand before what would catch.

use ipnet::IpNet;
use underpass_config::{Dns, KubeletProbes, PortRange};

use super::build::{Builder, Inputs, LOOPBACK, TCP, chain};
use super::{
    Action, CONNECTION_MARK, ChainId, Direction, KUBELET_PROBE_IN, MARK_MASK, Mark, Match,
    PROXY_MARK, PROXY_ZONE, PolicyRoute, Protocol, ROUTE_TABLE, RULE_PRIORITY, RulePlan, Table,
    invalid, own_ports, reject,
};

const PROXY: Mark = Mark { value: PROXY_MARK, mask: MARK_MASK };
const RETURNING: Mark = Mark { value: CONNECTION_MARK, mask: MARK_MASK };

const RAW_PREROUTING: ChainId = chain(Table::Raw, "ISTIO_PRERT");
const RAW_OUTPUT: ChainId = chain(Table::Raw, "ISTIO_OUTPUT");
const MANGLE_PREROUTING: ChainId = chain(Table::Mangle, "ISTIO_PRERT");
const MANGLE_OUTPUT: ChainId = chain(Table::Mangle, "ISTIO_OUTPUT");
const NAT_PREROUTING: ChainId = chain(Table::Nat, "ISTIO_PRERT");
const NAT_OUTPUT: ChainId = chain(Table::Nat, "ISTIO_OUTPUT");

/// The way back of what the workload answers to imitated clients.
pub(super) const ROUTE: PolicyRoute =
    PolicyRoute { mark: RETURNING, priority: RULE_PRIORITY, table: ROUTE_TABLE };

pub(super) fn plan(inputs: &Inputs<'_>) -> RulePlan {
    let mut builder = Builder::default();
    raw(&mut builder, inputs);
    invalid::add(&mut builder, inputs);
    mangle(&mut builder, inputs);
    nat(&mut builder, inputs);
    reject::add(&mut builder, inputs, nat);
    builder.route(ROUTE);
    builder.finish(inputs)
}

/// Conntrack zones.
fn raw(b: &mut Builder, inputs: &Inputs<'_>) {
    let dns = inputs.settings.dns == Dns::Capture;
    let families = inputs.served();
    if dns {
        b.rule(chain(Table::Raw, "PREROUTING"), "enter-raw-prerouting", "all packets that arrive")
            .families(families)
            .when([], Action::Jump(RAW_PREROUTING));
    }
    let enter = b.rule(
        chain(Table::Raw, "OUTPUT"),
        "enter-raw-output",
        "all packets that local processes send",
    );
    let enter = if dns { enter } else { enter.ours() };
    enter.families(families).when([], Action::Jump(RAW_OUTPUT));
    // A client's kernel may choose, for a connection to the workload, the very port from which the
    // proxy imitates that client. Conntrack would take its SYN for a packet of the proxy's
    // connection: it would not be caught, and its answer would go astray. In a zone of its own, the
    // proxy's original direction is never found from outside; replies carry no mark, and stay in the
    // zone that everything is in.
    b.rule(
        RAW_OUTPUT,
        "proxy-zone",
        "tracks what the proxy opens apart from what is opened by the clients that it imitates",
    )
    .ours()
    .families(families)
    .when([TCP, Match::PacketMark(PROXY)], Action::Zone(PROXY_ZONE, Some(Direction::Original)));
    if !dns {
        return;
    }
    b.rule(
        RAW_OUTPUT,
        "proxy-dns-zone",
        "tracks the proxy's DNS queries apart from the workload's, which may have the same source port",
    )
    .families(families)
    .when(
        [Match::PacketMark(PROXY), Match::DestinationPort(Protocol::Udp, vec![53.into()])],
        Action::Zone(1, None),
    );
    b.rule(
        RAW_PREROUTING,
        "proxy-dns-zone-reply",
        "finds the answers to the proxy's DNS queries in their zone",
    )
    .families(families)
    .when(
        [Match::NotPacketMark(PROXY), Match::SourcePort(Protocol::Udp, 53)],
        Action::Zone(1, None),
    );
}

/// The way back.
fn mangle(b: &mut Builder, inputs: &Inputs<'_>) {
    let exact = inputs.settings.exact;
    let families = inputs.served();
    b.rule(
        chain(Table::Mangle, "PREROUTING"),
        "enter-mangle-prerouting",
        "all packets that arrive",
    )
    .families(families)
    .when([], Action::Jump(MANGLE_PREROUTING));
    b.rule(
        chain(Table::Mangle, "OUTPUT"),
        "enter-mangle-output",
        "all packets that local processes send",
    )
    .families(families)
    .when([], Action::Jump(MANGLE_OUTPUT));
    let mut proxys = vec![Match::PacketMark(PROXY)];
    let mut returning = vec![Match::ConnectionMark(RETURNING)];
    if !exact {
        proxys.insert(0, Match::Direction(Direction::Original));
        returning.insert(0, Match::Direction(Direction::Reply));
    }
    b.rule(
        MANGLE_PREROUTING,
        "mark-proxy-connection",
        "remembers a connection that the proxy opens to the workload; only in its original direction, \
         or the proxy's replies would mark the workload's own captured connections",
    )
    .families(families)
    .when_all(proxys, Action::MarkConnection(RETURNING));
    b.rule(
        MANGLE_OUTPUT,
        "return-to-proxy",
        "routes the workload's replies to the client address that the proxy imitates back to the proxy; \
         only replies, so the proxy's own packets are not routed twice, and only our bits of the mark",
    )
    .families(families)
    .when_all(returning, if exact { Action::RestoreMark } else { Action::MarkPacket(RETURNING) });
}

fn nat(b: &mut Builder, inputs: &Inputs<'_>) {
    let neutral = inputs.neutral();
    b.rule(
        chain(Table::Nat, "OUTPUT"),
        "enter-nat-output",
        "all connections that local processes open",
    )
    .families(neutral)
    .when([], Action::Jump(NAT_OUTPUT));
    b.rule(chain(Table::Nat, "PREROUTING"), "enter-nat-prerouting", "all connections that arrive")
        .families(neutral)
        .when([], Action::Jump(NAT_PREROUTING));
    nat_prerouting(b, inputs);
    nat_output(b, inputs);
}

/// Connections that arrive.
fn nat_prerouting(b: &mut Builder, inputs: &Inputs<'_>) {
    let (settings, neutral) = (inputs.settings, inputs.neutral());
    b.rule(
        NAT_PREROUTING,
        "established-in",
        "leaves connections alone that are older than the rules: conntrack takes their next packet for a \
         new connection, and a redirect would reset it",
    )
    .ours()
    .families(neutral)
    .when([TCP, Match::NotOpening], Action::Return);
    for interfaces in inputs.split(&settings.virtual_interfaces) {
        b.rule(
            NAT_PREROUTING,
            "virtual-outbound",
            "what a virtual machine sends is outbound, though it arrives",
        )
        .numbered()
        .families(neutral)
        .when([Match::In(interfaces.clone()), TCP], Action::Redirect(inputs.ports.outbound));
        b.rule(
            NAT_PREROUTING,
            "virtual-rest",
            "nothing else from a virtual machine is inbound; the redirect before leaves nothing for it",
        )
        .numbered()
        .families(neutral)
        .when([Match::In(interfaces), TCP], Action::Return);
    }
    if !settings.ingress {
        kubelet_probes(b, inputs);
    }
    nat_prerouting_excluded(b, inputs);
    b.rule(NAT_PREROUTING, "hbone-in", "HBONE arrives at its listener as it is; counts it")
        .ours()
        .families(neutral)
        .when([port(inputs.ports.hbone)], Action::Return);
    if !settings.ingress {
        capture_inbound(b, inputs);
    }
}

fn kubelet_probes(b: &mut Builder, inputs: &Inputs<'_>) {
    let ports = match &inputs.settings.kubelet_probes {
        KubeletProbes::Off => return,
        KubeletProbes::On => None,
        KubeletProbes::Ports(ports) => Some(ports),
    };
    for &family in &inputs.families {
        let mut matches = vec![Match::Source(vec![family.probe.into()]), Match::TcpModule];
        matches.extend(ports.map(|ports| Match::DestinationPort(Protocol::Tcp, ports.clone())));
        b.rule(
            NAT_PREROUTING,
            KUBELET_PROBE_IN,
            "interception.kubelet_probes asks for it: the kubelet's probes cannot speak HBONE",
        )
        .twin(family)
        .when_all(matches, Action::Accept);
    }
}

fn nat_prerouting_excluded(b: &mut Builder, inputs: &Inputs<'_>) {
    let (inbound, neutral) = (&inputs.settings.inbound, inputs.neutral());
    for interfaces in inputs.split(&inbound.exclude_interfaces) {
        b.rule(NAT_PREROUTING, "exclude-interfaces-in", "inbound.exclude_interfaces asks for it")
            .numbered()
            .families(neutral)
            .when([Match::In(interfaces)], Action::Return);
    }
    for ports in inputs.destination_ports(&inbound.exclude_ports) {
        b.rule(NAT_PREROUTING, "exclude-ports-in", "inbound.exclude_ports asks for it")
            .numbered()
            .families(neutral)
            .when([ports], Action::Return);
    }
    // An ingress gateway's plain connections are not caught anyway.
    if !inputs.settings.ingress {
        own_ports::add(b, inputs, NAT_PREROUTING, "own-ports-in", &[]);
    }
}

fn capture_inbound(b: &mut Builder, inputs: &Inputs<'_>) {
    for &family in &inputs.families {
        let mut matches = vec![
            Match::NotDestination(family.loopback),
            Match::NotDestinationPort(Protocol::Tcp, vec![inputs.ports.hbone.into()]),
            Match::NotPacketMark(PROXY),
        ];
        match &inputs.settings.inbound.include_ports {
            None => {}
            Some(ports) if ports.is_empty() => return,
            Some(ports) => matches.insert(1, Match::DestinationPort(Protocol::Tcp, ports.clone())),
        }
        b.rule(
            NAT_PREROUTING,
            "capture-inbound",
            "every other connection to the workload passes the proxy, except the proxy's own",
        )
        .twin(family)
        .when_all(matches, Action::Redirect(inputs.ports.inbound));
    }
}

/// Connections that local processes open.
fn nat_output(b: &mut Builder, inputs: &Inputs<'_>) {
    let neutral = inputs.neutral();
    b.rule(
        NAT_OUTPUT,
        "established-out",
        "leaves connections alone that are older than the rules, as established-in does",
    )
    .ours()
    .families(neutral)
    .when([TCP, Match::NotOpening], Action::Return);
    // Istio has it, and no probe needs it: answers are no new connections.
    let probed = inputs.settings.kubelet_probes == KubeletProbes::On;
    for &family in inputs.families.iter().filter(|_| probed) {
        b.rule(
            NAT_OUTPUT,
            "kubelet-probe-out",
            "leaves alone what goes to the kubelet's probe address",
        )
        .twin(family)
        .when([Match::Destination(vec![family.probe.into()]), Match::TcpModule], Action::Accept);
    }
    nat_output_excluded(b, inputs);
    if inputs.settings.dns == Dns::Capture {
        capture_dns(b, inputs);
    }
    b.rule(
        NAT_OUTPUT,
        "returning",
        "what already returns to the proxy is not caught again; kept for parity with Istio, never matches",
    )
    .families(neutral)
    .when([TCP, Match::PacketMark(RETURNING)], Action::Accept);
    for &family in &inputs.families {
        b.rule(
            NAT_OUTPUT,
            "own-pod",
            "a workload that calls its own address stays direct, and the proxy reaches the workload",
        )
        .twin(family)
        .when(
            [Match::NotDestination(family.loopback), Match::Out(vec![LOOPBACK.to_owned()])],
            Action::Accept,
        );
    }
    capture_outbound(b, inputs);
}

fn nat_output_excluded(b: &mut Builder, inputs: &Inputs<'_>) {
    let (outbound, neutral) = (&inputs.settings.outbound, inputs.neutral());
    for interfaces in inputs.split(&outbound.exclude_interfaces) {
        b.rule(NAT_OUTPUT, "exclude-interfaces", "outbound.exclude_interfaces asks for it")
            .numbered()
            .families(neutral)
            .when([Match::Out(interfaces)], Action::Return);
    }
    for uids in inputs.split(&outbound.exclude_uids) {
        b.rule(NAT_OUTPUT, "exclude-uids", "outbound.exclude_uids asks for it")
            .numbered()
            .families(neutral)
            .when([Match::Uid(uids)], Action::Return);
    }
    for gids in inputs.split(&outbound.exclude_gids) {
        b.rule(NAT_OUTPUT, "exclude-gids", "outbound.exclude_gids asks for it")
            .numbered()
            .families(neutral)
            .when([Match::Gid(gids)], Action::Return);
    }
    for ports in inputs.destination_ports(&outbound.exclude_ports) {
        b.rule(NAT_OUTPUT, "exclude-ports", "outbound.exclude_ports asks for it")
            .numbered()
            .families(neutral)
            .when([ports], Action::Return);
    }
    for &family in &inputs.families {
        for cidrs in inputs.networks(family, &outbound.exclude_cidrs) {
            b.rule(NAT_OUTPUT, "exclude-cidrs", "outbound.exclude_cidrs asks for it")
                .numbered()
                .twin(family)
                .when([Match::Destination(cidrs)], Action::Return);
        }
    }
}

fn capture_dns(b: &mut Builder, inputs: &Inputs<'_>) {
    let dns = Action::Redirect(inputs.ports.dns);
    let servers = &inputs.settings.dns_servers;
    for &family in &inputs.families {
        let servers = family.of(&servers.iter().copied().map(IpNet::from).collect::<Vec<_>>());
        let restricted = !inputs.settings.dns_servers.is_empty();
        if restricted && servers.is_empty() {
            continue;
        }
        let to_server = restricted.then_some(Match::Destination(servers));
        let mut udp = vec![
            Match::NotOut(LOOPBACK.to_owned()),
            Match::NotPacketMark(PROXY),
            Match::DestinationPort(Protocol::Udp, vec![53.into()]),
        ];
        let mut tcp =
            vec![Match::NotDestination(family.loopback), port(53), Match::NotPacketMark(PROXY)];
        udp.extend(to_server.clone());
        tcp.extend(to_server);
        b.rule(
            NAT_OUTPUT,
            "capture-dns-udp",
            "DNS queries pass the DNS proxy, except to a local resolver, and the proxy's own",
        )
        .twin(family)
        .when_all(udp, dns);
        b.rule(NAT_OUTPUT, "capture-dns-tcp", "DNS queries over TCP do too")
            .twin(family)
            .when_all(tcp, dns);
    }
}

fn capture_outbound(b: &mut Builder, inputs: &Inputs<'_>) {
    let outbound = &inputs.settings.outbound;
    for &family in &inputs.families {
        let mut capture = |id, reason, included: Option<Match>| {
            let mut matches =
                vec![TCP, Match::NotDestination(family.loopback), Match::NotPacketMark(PROXY)];
            matches.extend(included);
            let rule = b.rule(NAT_OUTPUT, id, reason).numbered().twin(family);
            rule.when_all(matches, Action::Redirect(inputs.ports.outbound));
        };
        for ports in inputs.destination_ports(&outbound.include_ports) {
            capture("include-ports", "outbound.include_ports asks for it", Some(ports));
        }
        match &outbound.include_cidrs {
            None => capture(
                "capture-outbound",
                "every other connection that the workload opens passes the proxy, except the proxy's own",
                None,
            ),
            Some(cidrs) => {
                for cidrs in inputs.networks(family, cidrs) {
                    let to = Some(Match::Destination(cidrs));
                    capture("include-cidrs", "outbound.include_cidrs asks for it", to);
                }
            }
        }
    }
}

fn port(port: u16) -> Match {
    Match::DestinationPort(Protocol::Tcp, vec![PortRange::from(port)])
}
