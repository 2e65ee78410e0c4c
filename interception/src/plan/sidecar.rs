//! The Istio sidecar profile: the proxy's user and group distinguish its connections from the
//! workload's.
//!
//! Chains, rules and their order are Istio's. The numbers in the ids of the `ISTIO_OUTPUT` rules
//! are those of Jimmy Song's article on Istio's iptables rules. `tproxy` and `dns` contain the
//! rules for TPROXY and DNS.

mod dns;
pub(super) mod tproxy;

use std::net::Ipv6Addr;

use underpass_config::Dns;

use super::build::{Builder, Family, Inputs, LOOPBACK, TCP, chain};
use super::{
    Action, ChainId, Families, LoopbackAddress, Match, Protocol, RulePlan, Table, invalid,
    own_ports, reject,
};

const PREROUTING: ChainId = chain(Table::Nat, "PREROUTING");
const OUTPUT: ChainId = chain(Table::Nat, "OUTPUT");
const ISTIO_INBOUND: ChainId = chain(Table::Nat, "ISTIO_INBOUND");
const ISTIO_OUTPUT: ChainId = chain(Table::Nat, "ISTIO_OUTPUT");
const ISTIO_REDIRECT: ChainId = chain(Table::Nat, "ISTIO_REDIRECT");
const ISTIO_IN_REDIRECT: ChainId = chain(Table::Nat, "ISTIO_IN_REDIRECT");

/// The IPv6 source address of the proxy's connections to the workload. The loopback interface has
/// only ::1, so it must be added. The IPv4 source address is within 127.0.0.0/8.
pub(super) const LAST_HOP_V6: LoopbackAddress =
    LoopbackAddress(Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6));

/// The ports of Envoy's metrics, readiness, and the agent's merged metrics, which are never
/// captured.
const EXEMPT_PORTS: [u16; 3] = [15090, 15021, 15020];

pub(super) fn plan(inputs: &Inputs<'_>) -> RulePlan {
    let mut builder = Builder::default();
    add_nat_rules(&mut builder, inputs);
    if inputs.tproxy {
        tproxy::excluded_interfaces(&mut builder, inputs);
    }
    invalid::add(&mut builder, inputs);
    if inputs.tproxy {
        tproxy::add_mangle_rules(&mut builder, inputs);
        builder.route(tproxy::route(inputs.settings.exact));
    }
    if inputs.settings.dns == Dns::Capture {
        dns::add_raw_rules(&mut builder, inputs);
    }
    reject::add(&mut builder, inputs, add_nat_rules);
    if inputs.ipv6 {
        builder.address(LAST_HOP_V6);
    }
    builder.finish(inputs)
}

fn add_nat_rules(b: &mut Builder, inputs: &Inputs<'_>) {
    virtual_interfaces(b, inputs);
    excluded_interfaces(b, inputs);
    add_redirect_chains(b, inputs);
    add_inbound_rules(b, inputs);
    add_outbound_rules(b, inputs);
}

/// Adds the rules for traffic from virtual machines or nested containers, which is outbound
/// although it arrives. Istio inserts each at the head of the chain, so the last one comes first.
fn virtual_interfaces(b: &mut Builder, inputs: &Inputs<'_>) {
    let (settings, captured) = (inputs.settings, inputs.captured());
    let interfaces: Vec<_> = settings.virtual_interfaces.iter().rev().cloned().collect();
    let interfaces = inputs.split(&interfaces);
    let reason = "traffic from a virtual machine is outbound although it arrives at an interface";
    let redirect = Action::Jump(ISTIO_REDIRECT);
    match &settings.outbound.include_cidrs {
        None => {
            for interfaces in interfaces.clone() {
                b.rule(PREROUTING, "virtual-outbound", reason)
                    .numbered()
                    .families(captured)
                    .when([Match::In(interfaces)], redirect);
            }
        }
        Some(cidrs) => {
            for &family in &inputs.families {
                let mut cidrs = cidrs.clone();
                cidrs.reverse();
                for cidrs in inputs.networks(family, &cidrs) {
                    for interfaces in interfaces.clone() {
                        let to = Match::Destination(cidrs.clone());
                        b.rule(PREROUTING, "virtual-outbound", reason)
                            .numbered()
                            .for_family(family)
                            .when([to, Match::In(interfaces)], redirect);
                    }
                }
            }
        }
    }
    for interfaces in interfaces {
        b.rule(PREROUTING, "virtual-rest", "other traffic from a virtual machine is not inbound")
            .numbered()
            .families(captured)
            .when([Match::In(interfaces)], Action::Return);
    }
}

fn excluded_interfaces(b: &mut Builder, inputs: &Inputs<'_>) {
    let settings = inputs.settings;
    for interfaces in inputs.split(&settings.inbound.exclude_interfaces) {
        b.rule(PREROUTING, "exclude-interfaces-in", "excluded by inbound.exclude_interfaces")
            .numbered()
            .families(inputs.captured())
            .when([Match::In(interfaces)], Action::Return);
    }
    for interfaces in inputs.split(&settings.outbound.exclude_interfaces) {
        b.rule(OUTPUT, "exclude-interfaces", "excluded by outbound.exclude_interfaces")
            .numbered()
            .families(inputs.captured())
            .when([Match::Out(interfaces)], Action::Return);
    }
}

/// Adds the chains that redirect to the proxy.
fn add_redirect_chains(b: &mut Builder, inputs: &Inputs<'_>) {
    for (chain, direction, port) in [
        (ISTIO_REDIRECT, "out", inputs.ports.outbound),
        (ISTIO_IN_REDIRECT, "in", inputs.ports.inbound),
    ] {
        let id = format!("established-{direction}");
        skip_established(b, chain, &id, inputs.captured());
        b.rule(
            chain,
            format!("redirect-{direction}bound"),
            "redirects the connection to the proxy",
        )
        .families(inputs.captured())
        .when([TCP], Action::Redirect(port));
    }
}

/// Adds a rule that skips established connections, at the start of a chain that redirects.
fn skip_established(b: &mut Builder, chain: ChainId, id: &str, families: Families) {
    b.rule(
        chain,
        id,
        "skips connections that are older than the rules: conntrack treats their next packet as a \
         new connection, and a redirect would reset it",
    )
    .omitted_by_exact()
    .families(families)
    .when([TCP, Match::NotOpening], Action::Return);
}

fn add_inbound_rules(b: &mut Builder, inputs: &Inputs<'_>) {
    let captured = inputs.captured();
    b.rule(ISTIO_INBOUND, "hbone-in", "HBONE reaches its listener without a redirect")
        .families(captured)
        .when([tcp_to(inputs.ports.hbone)], Action::Return);
    let include = &inputs.settings.inbound.include_ports;
    if inputs.tproxy || include.as_ref().is_some_and(Vec::is_empty) {
        return;
    }
    b.rule(PREROUTING, "enter-inbound", "every TCP connection that arrives")
        .families(captured)
        .when([TCP], Action::Jump(ISTIO_INBOUND));
    own_ports::add(b, inputs, ISTIO_INBOUND, "own-ports-in", exempt_ports(inputs));
    let Some(ports) = include else {
        excluded_ports(b, inputs, ISTIO_INBOUND);
        b.rule(
            ISTIO_INBOUND,
            "capture-inbound",
            "redirects every other connection to the workload",
        )
        .families(captured)
        .when([TCP], Action::Jump(ISTIO_IN_REDIRECT));
        return;
    };
    for ports in inputs.destination_ports(ports) {
        b.rule(ISTIO_INBOUND, "include-ports-in", "included by inbound.include_ports")
            .numbered()
            .families(captured)
            .when([ports], Action::Jump(ISTIO_IN_REDIRECT));
    }
}

/// The ports that [`excluded_ports`] exempts. Empty if inclusions replace exclusions.
fn exempt_ports(inputs: &Inputs<'_>) -> &'static [u16] {
    if inputs.settings.inbound.include_ports.is_none() { &EXEMPT_PORTS } else { &[] }
}

/// Exempts ports from inbound capture.
fn excluded_ports(b: &mut Builder, inputs: &Inputs<'_>, chain: ChainId) {
    for never in EXEMPT_PORTS {
        b.rule(
            chain,
            format!("never-{never}"),
            "the proxy serves its own metrics and readiness there",
        )
        .families(inputs.captured())
        .when([tcp_to(never)], Action::Return);
    }
    for ports in inputs.destination_ports(&inputs.settings.inbound.exclude_ports) {
        b.rule(chain, "exclude-ports-in", "excluded by inbound.exclude_ports")
            .numbered()
            .families(inputs.captured())
            .when([ports], Action::Return);
    }
}

/// Adds the rules of `ISTIO_OUTPUT`.
fn add_outbound_rules(b: &mut Builder, inputs: &Inputs<'_>) {
    let (settings, captured) = (inputs.settings, inputs.captured());
    b.rule(OUTPUT, "enter-outbound", "every connection that a local process opens")
        .families(captured)
        .when([], Action::Jump(ISTIO_OUTPUT));
    for ports in inputs.split(&settings.outbound.exclude_ports) {
        for (protocol, id) in
            [(Protocol::Tcp, "exclude-ports"), (Protocol::Udp, "exclude-udp-ports")]
        {
            b.rule(ISTIO_OUTPUT, id, "excluded by outbound.exclude_ports")
                .numbered()
                .families(captured)
                .when([Match::DestinationPort(protocol, ports.clone())], Action::Return);
        }
    }
    for &family in &inputs.families {
        b.rule(
            ISTIO_OUTPUT,
            "1-last-hop",
            "skips the proxy's connections to the workload, whose source is 127.0.0.6 or ::6",
        )
        .for_family(family)
        .when(
            [Match::Source(vec![family.last_hop.into()]), Match::Out(loopback_interface())],
            Action::Return,
        );
    }
    if inputs.tproxy {
        tproxy::exempt_preserved_sources(b, inputs);
    }
    for uids in inputs.split(&settings.proxy_uids) {
        rules_for_owner(b, inputs, &Owner::User(uids));
    }
    for gids in inputs.split(&settings.proxy_gids) {
        rules_for_owner(b, inputs, &Owner::Group(gids));
    }
    add_owner_rules(b, inputs);
    if settings.dns == Dns::Capture {
        dns::add_nat_rules(b, inputs);
    }
    for &family in &inputs.families {
        b.rule(ISTIO_OUTPUT, "8-localhost", "skips connections to localhost")
            .for_family(family)
            .when([Match::Destination(vec![family.loopback])], Action::Return);
    }
    capture_outbound(b, inputs);
}

/// The user or group that identifies the proxy's sockets.
#[derive(Debug)]
enum Owner {
    User(Vec<u32>),
    Group(Vec<u32>),
}

impl Owner {
    fn matches_owner(&self) -> Match {
        match self {
            Self::User(uids) => Match::Uid(uids.clone()),
            Self::Group(gids) => Match::Gid(gids.clone()),
        }
    }

    fn excludes_owner(&self) -> Match {
        match self {
            Self::User(uids) => Match::NotUid(uids.clone()),
            Self::Group(gids) => Match::NotGid(gids.clone()),
        }
    }

    /// The ids of the three rules for this owner.
    fn ids(&self) -> [&'static str; 3] {
        match self {
            Self::User(_) => ["2-self-call", "3-app-to-itself", "4-proxy"],
            Self::Group(_) => ["5-self-call-group", "6-app-to-itself-group", "7-proxy-group"],
        }
    }
}

/// Adds rules 2 to 4 for a user, or rules 5 to 7 for a group.
fn rules_for_owner(b: &mut Builder, inputs: &Inputs<'_>, owner: &Owner) {
    let (captured, [self_call, app_to_itself, proxy]) = (inputs.captured(), owner.ids());
    let dns = inputs.settings.dns == Dns::Capture;
    // Istio exempts DNS only for the user.
    let exempt_ports = match owner {
        Owner::User(_) if dns => vec![53.into(), inputs.ports.hbone.into()],
        _ => vec![inputs.ports.hbone.into()],
    };
    for &family in &inputs.families {
        b.rule(
            ISTIO_OUTPUT,
            self_call,
            "the proxy balances the workload's call of its own service to this pod: redirects it as inbound",
        )
        .numbered()
        .for_family(family)
        .when(
            [
                Match::NotDestination(family.loopback),
                Match::Out(loopback_interface()),
                Match::NotDestinationPort(Protocol::Tcp, exempt_ports.clone()),
                owner.matches_owner(),
            ],
            Action::Jump(ISTIO_IN_REDIRECT),
        );
    }
    if !includes_loopback(inputs) {
        let mut matches = vec![Match::Out(loopback_interface()), owner.excludes_owner()];
        if dns {
            let no_dns = Match::NotDestinationPort(Protocol::Tcp, vec![53.into()]);
            matches.insert(1, no_dns);
        }
        b.rule(ISTIO_OUTPUT, app_to_itself, "skips a workload's calls to its own address")
            .numbered()
            .families(captured)
            .when_all(matches, Action::Return);
    }
    b.rule(ISTIO_OUTPUT, proxy, "skips the proxy's own connections")
        .numbered()
        .families(captured)
        .when([owner.matches_owner()], Action::Return);
}

/// Returns true if outbound capture includes loopback addresses, and therefore a workload's calls
/// to itself.
fn includes_loopback(inputs: &Inputs<'_>) -> bool {
    let include = &inputs.settings.outbound.include_cidrs;
    include.iter().flatten().any(|cidr| cidr.addr().is_loopback())
}

/// Adds the rules that restrict capture to certain users and groups of the sending process.
fn add_owner_rules(b: &mut Builder, inputs: &Inputs<'_>) {
    let (outbound, captured) = (&inputs.settings.outbound, inputs.captured());
    for uids in inputs.split(&outbound.exclude_uids) {
        b.rule(ISTIO_OUTPUT, "exclude-uids", "excluded by outbound.exclude_uids")
            .numbered()
            .families(captured)
            .when([Match::Uid(uids)], Action::Return);
    }
    for gids in inputs.split(&outbound.exclude_gids) {
        b.rule(ISTIO_OUTPUT, "exclude-gids", "excluded by outbound.exclude_gids")
            .numbered()
            .families(captured)
            .when([Match::Gid(gids)], Action::Return);
    }
    if !outbound.include_gids.is_empty() {
        b.rule(ISTIO_OUTPUT, "include-gids", "not included by outbound.include_gids")
            .families(captured)
            .when([Match::NotGid(outbound.include_gids.clone())], Action::Return);
    }
}

fn capture_outbound(b: &mut Builder, inputs: &Inputs<'_>) {
    let (outbound, captured) = (&inputs.settings.outbound, inputs.captured());
    let redirect = Action::Jump(ISTIO_REDIRECT);
    for &family in &inputs.families {
        for cidrs in inputs.networks(family, &outbound.exclude_cidrs) {
            b.rule(ISTIO_OUTPUT, "exclude-cidrs", "excluded by outbound.exclude_cidrs")
                .numbered()
                .for_family(family)
                .when([Match::Destination(cidrs)], Action::Return);
        }
    }
    for ports in inputs.destination_ports(&outbound.include_ports) {
        b.rule(ISTIO_OUTPUT, "include-ports", "included by outbound.include_ports")
            .numbered()
            .families(captured)
            .when([ports], redirect);
    }
    let Some(cidrs) = &outbound.include_cidrs else {
        b.rule(ISTIO_OUTPUT, "9-capture-outbound", "redirects every other connection")
            .families(captured)
            .when([], redirect);
        return;
    };
    for &family in &inputs.families {
        include_cidrs(b, inputs, family, cidrs);
    }
}

fn include_cidrs(b: &mut Builder, inputs: &Inputs<'_>, family: Family, cidrs: &[ipnet::IpNet]) {
    for cidrs in inputs.networks(family, cidrs) {
        b.rule(ISTIO_OUTPUT, "include-cidrs", "included by outbound.include_cidrs")
            .numbered()
            .for_family(family)
            .when([Match::Destination(cidrs)], Action::Jump(ISTIO_REDIRECT));
    }
}

fn loopback_interface() -> Vec<String> {
    vec![LOOPBACK.to_owned()]
}

fn tcp_to(port: u16) -> Match {
    Match::DestinationPort(Protocol::Tcp, vec![port.into()])
}
