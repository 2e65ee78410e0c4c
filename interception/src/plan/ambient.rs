//! The Istio ambient profile: the packet mark 0x539 distinguishes the proxy's packets.
//!
//! Every socket of the proxy carries the mark. Unmarked packets belong to the workload:
//!
//! ```text
//! app ── nat OUTPUT ── capture-outbound ─────────────▶ proxy :outbound ── marked ──▶ peer
//! peer ── nat PREROUTING ── hbone-in (:hbone as it is) | capture-inbound ─▶ proxy :inbound
//! proxy ── marked, from the peer's address, over lo ── mark-proxy-connection ──▶ app
//! app's reply to the peer's address ── return-to-proxy ── ip rule, table 100 ── lo ──▶ proxy
//! ```
//!
//! Istio has no exclusions in this profile. The exclusions here precede the rules that capture.

use ipnet::IpNet;
use underpass_config::{Dns, KubeletProbes, PortRange};

use super::build::{Builder, Inputs, LOOPBACK, TCP, chain};
use super::{
    Action, CONNECTION_MARK, ChainId, Direction, KUBELET_PROBE_IN, MARK_MASK, Mark, Match,
    PROXY_MARK, PROXY_ZONE, PolicyRoute, Protocol, ROUTE_TABLE, RULE_PRIORITY, RulePlan, Table,
    invalid, own_ports, reject,
};

const PROXY: Mark = Mark { value: PROXY_MARK, mask: MARK_MASK };
const RETURNS_REPLY: Mark = Mark { value: CONNECTION_MARK, mask: MARK_MASK };

const RAW_PREROUTING: ChainId = chain(Table::Raw, "ISTIO_PRERT");
const RAW_OUTPUT: ChainId = chain(Table::Raw, "ISTIO_OUTPUT");
const MANGLE_PREROUTING: ChainId = chain(Table::Mangle, "ISTIO_PRERT");
const MANGLE_OUTPUT: ChainId = chain(Table::Mangle, "ISTIO_OUTPUT");
const NAT_PREROUTING: ChainId = chain(Table::Nat, "ISTIO_PRERT");
const NAT_OUTPUT: ChainId = chain(Table::Nat, "ISTIO_OUTPUT");

/// Routes the workload's replies to a preserved client address back to the proxy.
pub(super) const ROUTE: PolicyRoute =
    PolicyRoute { mark: RETURNS_REPLY, priority: RULE_PRIORITY, table: ROUTE_TABLE };

pub(super) fn plan(inputs: &Inputs<'_>) -> RulePlan {
    let mut builder = Builder::default();
    add_raw_rules(&mut builder, inputs);
    invalid::add(&mut builder, inputs);
    add_mangle_rules(&mut builder, inputs);
    add_nat_rules(&mut builder, inputs);
    reject::add(&mut builder, inputs, add_nat_rules);
    builder.route(ROUTE);
    builder.finish(inputs)
}

/// Adds the rules that assign conntrack zones.
fn add_raw_rules(b: &mut Builder, inputs: &Inputs<'_>) {
    let dns = inputs.settings.dns == Dns::Capture;
    let families = inputs.supported();
    if dns {
        b.rule(
            chain(Table::Raw, "PREROUTING"),
            "enter-raw-prerouting",
            "every packet that arrives",
        )
        .families(families)
        .when([], Action::Jump(RAW_PREROUTING));
    }
    let enter = b.rule(
        chain(Table::Raw, "OUTPUT"),
        "enter-raw-output",
        "every packet that a local process sends",
    );
    let enter = if dns { enter } else { enter.omitted_by_exact() };
    enter.families(families).when([], Action::Jump(RAW_OUTPUT));
    // The proxy connects to the workload from the client's address and an arbitrary port. The
    // client's kernel may choose the same port for a direct connection. Conntrack would then match
    // the client's SYN with the proxy's connection: the SYN would not be captured, and its reply
    // would be misrouted. A separate zone for the original direction of the proxy's connections
    // prevents the match. Replies carry no mark and stay in the default zone.
    b.rule(
        RAW_OUTPUT,
        "proxy-zone",
        "tracks the proxy's connections apart from those of the clients whose addresses it uses",
    )
    .omitted_by_exact()
    .families(families)
    .when([TCP, Match::PacketMark(PROXY)], Action::Zone(PROXY_ZONE, Some(Direction::Original)));
    if !dns {
        return;
    }
    b.rule(
        RAW_OUTPUT,
        "proxy-dns-zone",
        "tracks the proxy's DNS queries apart from the workload's, as both may use the same source port",
    )
    .families(families)
    .when(
        [Match::PacketMark(PROXY), Match::DestinationPort(Protocol::Udp, vec![53.into()])],
        Action::Zone(1, None),
    );
    b.rule(
        RAW_PREROUTING,
        "proxy-dns-zone-reply",
        "looks up the answers to the proxy's DNS queries in their zone",
    )
    .families(families)
    .when(
        [Match::NotPacketMark(PROXY), Match::SourcePort(Protocol::Udp, 53)],
        Action::Zone(1, None),
    );
}

/// Adds the rules that route the workload's replies to the proxy.
fn add_mangle_rules(b: &mut Builder, inputs: &Inputs<'_>) {
    let exact = inputs.settings.exact;
    let families = inputs.supported();
    b.rule(
        chain(Table::Mangle, "PREROUTING"),
        "enter-mangle-prerouting",
        "every packet that arrives",
    )
    .families(families)
    .when([], Action::Jump(MANGLE_PREROUTING));
    b.rule(
        chain(Table::Mangle, "OUTPUT"),
        "enter-mangle-output",
        "every packet that a local process sends",
    )
    .families(families)
    .when([], Action::Jump(MANGLE_OUTPUT));
    let mut from_proxy = vec![Match::PacketMark(PROXY)];
    let mut is_reply = vec![Match::ConnectionMark(RETURNS_REPLY)];
    if !exact {
        from_proxy.insert(0, Match::Direction(Direction::Original));
        is_reply.insert(0, Match::Direction(Direction::Reply));
    }
    b.rule(
        MANGLE_PREROUTING,
        "mark-proxy-connection",
        "marks a connection from the proxy to the workload; only in its original direction, \
         as the proxy's replies would mark the workload's own captured connections",
    )
    .families(families)
    .when_all(from_proxy, Action::MarkConnection(RETURNS_REPLY));
    b.rule(
        MANGLE_OUTPUT,
        "return-to-proxy",
        "routes the workload's replies to a preserved client address back to the proxy; \
         only replies, so the proxy's own packets are not rerouted, and only underpass' bits of the mark",
    )
    .families(families)
    .when_all(is_reply, if exact { Action::RestoreMark } else { Action::MarkPacket(RETURNS_REPLY) });
}

fn add_nat_rules(b: &mut Builder, inputs: &Inputs<'_>) {
    let captured = inputs.captured();
    b.rule(
        chain(Table::Nat, "OUTPUT"),
        "enter-nat-output",
        "every connection that a local process opens",
    )
    .families(captured)
    .when([], Action::Jump(NAT_OUTPUT));
    b.rule(
        chain(Table::Nat, "PREROUTING"),
        "enter-nat-prerouting",
        "every connection that arrives",
    )
    .families(captured)
    .when([], Action::Jump(NAT_PREROUTING));
    nat_prerouting(b, inputs);
    nat_output(b, inputs);
}

/// Adds the rules for connections that other hosts open.
fn nat_prerouting(b: &mut Builder, inputs: &Inputs<'_>) {
    let (settings, captured) = (inputs.settings, inputs.captured());
    b.rule(
        NAT_PREROUTING,
        "established-in",
        "skips connections that are older than the rules: conntrack treats their next packet as a \
         new connection, and a redirect would reset it",
    )
    .omitted_by_exact()
    .families(captured)
    .when([TCP, Match::NotOpening], Action::Return);
    for interfaces in inputs.split(&settings.virtual_interfaces) {
        b.rule(
            NAT_PREROUTING,
            "virtual-outbound",
            "traffic from a virtual machine is outbound although it arrives at an interface",
        )
        .numbered()
        .families(captured)
        .when([Match::In(interfaces.clone()), TCP], Action::Redirect(inputs.ports.outbound));
        b.rule(
            NAT_PREROUTING,
            "virtual-rest",
            "other traffic from a virtual machine is not inbound; the redirect before it already takes all TCP",
        )
        .numbered()
        .families(captured)
        .when([Match::In(interfaces), TCP], Action::Return);
    }
    if !settings.ingress {
        kubelet_probes(b, inputs);
    }
    exclude_inbound(b, inputs);
    b.rule(
        NAT_PREROUTING,
        "hbone-in",
        "HBONE reaches its listener without a redirect; counts its connections",
    )
    .omitted_by_exact()
    .families(captured)
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
            "exempted by interception.kubelet_probes: the kubelet cannot speak HBONE",
        )
        .for_family(family)
        .when_all(matches, Action::Accept);
    }
}

fn exclude_inbound(b: &mut Builder, inputs: &Inputs<'_>) {
    let (inbound, captured) = (&inputs.settings.inbound, inputs.captured());
    for interfaces in inputs.split(&inbound.exclude_interfaces) {
        b.rule(NAT_PREROUTING, "exclude-interfaces-in", "excluded by inbound.exclude_interfaces")
            .numbered()
            .families(captured)
            .when([Match::In(interfaces)], Action::Return);
    }
    for ports in inputs.destination_ports(&inbound.exclude_ports) {
        b.rule(NAT_PREROUTING, "exclude-ports-in", "excluded by inbound.exclude_ports")
            .numbered()
            .families(captured)
            .when([ports], Action::Return);
    }
    // An ingress gateway needs no such rule: its plaintext connections are not captured.
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
            "redirects every other connection to the workload, except the proxy's own",
        )
        .for_family(family)
        .when_all(matches, Action::Redirect(inputs.ports.inbound));
    }
}

/// Adds the rules for connections that local processes open.
fn nat_output(b: &mut Builder, inputs: &Inputs<'_>) {
    let captured = inputs.captured();
    b.rule(
        NAT_OUTPUT,
        "established-out",
        "skips connections that are older than the rules, for the reason of established-in",
    )
    .omitted_by_exact()
    .families(captured)
    .when([TCP, Match::NotOpening], Action::Return);
    // Istio has this rule. Replies to probes do not need it, because nat sees only new connections.
    let probed = inputs.settings.kubelet_probes == KubeletProbes::On;
    for &family in inputs.families.iter().filter(|_| probed) {
        b.rule(NAT_OUTPUT, "kubelet-probe-out", "skips connections to the kubelet's probe address")
            .for_family(family)
            .when(
                [Match::Destination(vec![family.probe.into()]), Match::TcpModule],
                Action::Accept,
            );
    }
    exclude_outbound(b, inputs);
    if inputs.settings.dns == Dns::Capture {
        capture_dns(b, inputs);
    }
    b.rule(
        NAT_OUTPUT,
        "returning",
        "skips replies that already return to the proxy; for parity with Istio, never matches",
    )
    .families(captured)
    .when([TCP, Match::PacketMark(RETURNS_REPLY)], Action::Accept);
    for &family in &inputs.families {
        b.rule(
            NAT_OUTPUT,
            "own-pod",
            "skips a workload's calls to its own address, and the proxy's connections to the workload",
        )
        .for_family(family)
        .when(
            [Match::NotDestination(family.loopback), Match::Out(vec![LOOPBACK.to_owned()])],
            Action::Accept,
        );
    }
    capture_outbound(b, inputs);
}

fn exclude_outbound(b: &mut Builder, inputs: &Inputs<'_>) {
    let (outbound, captured) = (&inputs.settings.outbound, inputs.captured());
    for interfaces in inputs.split(&outbound.exclude_interfaces) {
        b.rule(NAT_OUTPUT, "exclude-interfaces", "excluded by outbound.exclude_interfaces")
            .numbered()
            .families(captured)
            .when([Match::Out(interfaces)], Action::Return);
    }
    for uids in inputs.split(&outbound.exclude_uids) {
        b.rule(NAT_OUTPUT, "exclude-uids", "excluded by outbound.exclude_uids")
            .numbered()
            .families(captured)
            .when([Match::Uid(uids)], Action::Return);
    }
    for gids in inputs.split(&outbound.exclude_gids) {
        b.rule(NAT_OUTPUT, "exclude-gids", "excluded by outbound.exclude_gids")
            .numbered()
            .families(captured)
            .when([Match::Gid(gids)], Action::Return);
    }
    for ports in inputs.destination_ports(&outbound.exclude_ports) {
        b.rule(NAT_OUTPUT, "exclude-ports", "excluded by outbound.exclude_ports")
            .numbered()
            .families(captured)
            .when([ports], Action::Return);
    }
    for &family in &inputs.families {
        for cidrs in inputs.networks(family, &outbound.exclude_cidrs) {
            b.rule(NAT_OUTPUT, "exclude-cidrs", "excluded by outbound.exclude_cidrs")
                .numbered()
                .for_family(family)
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
            "redirects DNS queries, except to a local resolver and except the proxy's own",
        )
        .for_family(family)
        .when_all(udp, dns);
        b.rule(NAT_OUTPUT, "capture-dns-tcp", "redirects DNS queries over TCP")
            .for_family(family)
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
            let rule = b.rule(NAT_OUTPUT, id, reason).numbered().for_family(family);
            rule.when_all(matches, Action::Redirect(inputs.ports.outbound));
        };
        for ports in inputs.destination_ports(&outbound.include_ports) {
            capture("include-ports", "included by outbound.include_ports", Some(ports));
        }
        match &outbound.include_cidrs {
            None => capture(
                "capture-outbound",
                "redirects every other connection that the workload opens, except the proxy's own",
                None,
            ),
            Some(cidrs) => {
                for cidrs in inputs.networks(family, cidrs) {
                    let to = Some(Match::Destination(cidrs));
                    capture("include-cidrs", "included by outbound.include_cidrs", to);
                }
            }
        }
    }
}

fn port(port: u16) -> Match {
    Match::DestinationPort(Protocol::Tcp, vec![PortRange::from(port)])
}
