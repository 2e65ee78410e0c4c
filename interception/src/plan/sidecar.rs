//! The Istio sidecar profile: the proxy's connections are told by its user and group.
//!
//! The chains, their rules and their order are Istio's; the numbers in the ids of `ISTIO_OUTPUT`'s
//! rules are those of the article that explains them. TPROXY is in `sidecar/tproxy.rs`, DNS in
//! `sidecar/dns.rs`.

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

/// Where the last hop comes from: all of 127.0.0.0/8 is on the loopback interface, but of IPv6 only
/// ::1.
pub(super) const LAST_HOP_V6: LoopbackAddress =
    LoopbackAddress(Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6));

/// Envoy's metrics, readiness, and the agent's merged metrics: never caught.
const NEVER_CAUGHT: [u16; 3] = [15090, 15021, 15020];

pub(super) fn plan(inputs: &Inputs<'_>) -> RulePlan {
    let mut builder = Builder::default();
    nat(&mut builder, inputs);
    if inputs.tproxy {
        tproxy::excluded_interfaces(&mut builder, inputs);
    }
    invalid::add(&mut builder, inputs);
    if inputs.tproxy {
        tproxy::mangle(&mut builder, inputs);
        builder.route(tproxy::route(inputs.settings.exact));
    }
    if inputs.settings.dns == Dns::Capture {
        dns::raw(&mut builder, inputs);
    }
    reject::add(&mut builder, inputs, nat);
    if inputs.ipv6 {
        builder.address(LAST_HOP_V6);
    }
    builder.finish(inputs)
}

fn nat(b: &mut Builder, inputs: &Inputs<'_>) {
    virtual_interfaces(b, inputs);
    excluded_interfaces(b, inputs);
    redirects(b, inputs);
    inbound(b, inputs);
    outbound(b, inputs);
}

/// What arrives from a virtual machine or a nested container is outbound. Istio inserts each rule
/// at the head of the chain, so that the last one stands first.
fn virtual_interfaces(b: &mut Builder, inputs: &Inputs<'_>) {
    let (settings, neutral) = (inputs.settings, inputs.neutral());
    let interfaces: Vec<_> = settings.virtual_interfaces.iter().rev().cloned().collect();
    let interfaces = inputs.split(&interfaces);
    let reason = "what a virtual machine sends is outbound, though it arrives";
    let redirect = Action::Jump(ISTIO_REDIRECT);
    match &settings.outbound.include_cidrs {
        None => {
            for interfaces in interfaces.clone() {
                b.rule(PREROUTING, "virtual-outbound", reason)
                    .numbered()
                    .families(neutral)
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
                            .twin(family)
                            .when([to, Match::In(interfaces)], redirect);
                    }
                }
            }
        }
    }
    for interfaces in interfaces {
        b.rule(PREROUTING, "virtual-rest", "nothing else from a virtual machine is inbound")
            .numbered()
            .families(neutral)
            .when([Match::In(interfaces)], Action::Return);
    }
}

fn excluded_interfaces(b: &mut Builder, inputs: &Inputs<'_>) {
    let settings = inputs.settings;
    for interfaces in inputs.split(&settings.inbound.exclude_interfaces) {
        b.rule(PREROUTING, "exclude-interfaces-in", "inbound.exclude_interfaces asks for it")
            .numbered()
            .families(inputs.neutral())
            .when([Match::In(interfaces)], Action::Return);
    }
    for interfaces in inputs.split(&settings.outbound.exclude_interfaces) {
        b.rule(OUTPUT, "exclude-interfaces", "outbound.exclude_interfaces asks for it")
            .numbered()
            .families(inputs.neutral())
            .when([Match::Out(interfaces)], Action::Return);
    }
}

/// The chains that end in the proxy.
fn redirects(b: &mut Builder, inputs: &Inputs<'_>) {
    for (chain, direction, port) in [
        (ISTIO_REDIRECT, "out", inputs.ports.outbound),
        (ISTIO_IN_REDIRECT, "in", inputs.ports.inbound),
    ] {
        let id = format!("established-{direction}");
        established(b, chain, &id, inputs.neutral());
        b.rule(chain, format!("redirect-{direction}bound"), "here the connection is caught")
            .families(inputs.neutral())
            .when([TCP], Action::Redirect(port));
    }
}

/// Begins a chain that redirects, so that whatever jumps to it is safe.
fn established(b: &mut Builder, chain: ChainId, id: &str, families: Families) {
    b.rule(
        chain,
        id,
        "leaves connections alone that are older than the rules: conntrack takes their next packet for a \
         new connection, and a redirect would reset it",
    )
    .ours()
    .families(families)
    .when([TCP, Match::NotOpening], Action::Return);
}

fn inbound(b: &mut Builder, inputs: &Inputs<'_>) {
    let neutral = inputs.neutral();
    b.rule(ISTIO_INBOUND, "hbone-in", "HBONE arrives at its listener as it is")
        .families(neutral)
        .when([tcp_to(inputs.ports.hbone)], Action::Return);
    let include = &inputs.settings.inbound.include_ports;
    if inputs.tproxy || include.as_ref().is_some_and(Vec::is_empty) {
        return;
    }
    b.rule(PREROUTING, "enter-inbound", "all TCP that arrives")
        .families(neutral)
        .when([TCP], Action::Jump(ISTIO_INBOUND));
    own_ports::add(b, inputs, ISTIO_INBOUND, "own-ports-in", spared(inputs));
    let Some(ports) = include else {
        excluded_ports(b, inputs, ISTIO_INBOUND);
        b.rule(
            ISTIO_INBOUND,
            "capture-inbound",
            "every other connection to the workload passes the proxy",
        )
        .families(neutral)
        .when([TCP], Action::Jump(ISTIO_IN_REDIRECT));
        return;
    };
    for ports in inputs.destination_ports(ports) {
        b.rule(ISTIO_INBOUND, "include-ports-in", "inbound.include_ports asks for it")
            .numbered()
            .families(neutral)
            .when([ports], Action::Jump(ISTIO_IN_REDIRECT));
    }
}

/// The ports that [`excluded_ports`] spares, if it is asked to.
fn spared(inputs: &Inputs<'_>) -> &'static [u16] {
    if inputs.settings.inbound.include_ports.is_none() { &NEVER_CAUGHT } else { &[] }
}

/// The ports of inbound connections that are not caught.
fn excluded_ports(b: &mut Builder, inputs: &Inputs<'_>, chain: ChainId) {
    for never in NEVER_CAUGHT {
        b.rule(chain, format!("never-{never}"), "the proxy's own metrics and readiness")
            .families(inputs.neutral())
            .when([tcp_to(never)], Action::Return);
    }
    for ports in inputs.destination_ports(&inputs.settings.inbound.exclude_ports) {
        b.rule(chain, "exclude-ports-in", "inbound.exclude_ports asks for it")
            .numbered()
            .families(inputs.neutral())
            .when([ports], Action::Return);
    }
}

/// `ISTIO_OUTPUT`.
fn outbound(b: &mut Builder, inputs: &Inputs<'_>) {
    let (settings, neutral) = (inputs.settings, inputs.neutral());
    b.rule(OUTPUT, "enter-outbound", "all that local processes open")
        .families(neutral)
        .when([], Action::Jump(ISTIO_OUTPUT));
    for ports in inputs.split(&settings.outbound.exclude_ports) {
        for (protocol, id) in
            [(Protocol::Tcp, "exclude-ports"), (Protocol::Udp, "exclude-udp-ports")]
        {
            b.rule(ISTIO_OUTPUT, id, "outbound.exclude_ports asks for it")
                .numbered()
                .families(neutral)
                .when([Match::DestinationPort(protocol, ports.clone())], Action::Return);
        }
    }
    for &family in &inputs.families {
        b.rule(
            ISTIO_OUTPUT,
            "1-last-hop",
            "the proxy's connection to the workload, which it opens from 127.0.0.6 or ::6",
        )
        .twin(family)
        .when([Match::Source(vec![family.last_hop.into()]), Match::Out(lo())], Action::Return);
    }
    if inputs.tproxy {
        tproxy::spare_imitated(b, inputs);
    }
    for uids in inputs.split(&settings.proxy_uids) {
        proxys_own(b, inputs, &Owner::User(uids));
    }
    for gids in inputs.split(&settings.proxy_gids) {
        proxys_own(b, inputs, &Owner::Group(gids));
    }
    owners(b, inputs);
    if settings.dns == Dns::Capture {
        dns::nat(b, inputs);
    }
    for &family in &inputs.families {
        b.rule(ISTIO_OUTPUT, "8-localhost", "what goes to localhost stays direct")
            .twin(family)
            .when([Match::Destination(vec![family.loopback])], Action::Return);
    }
    capture_outbound(b, inputs);
}

/// Who the proxy is.
#[derive(Debug)]
enum Owner {
    User(Vec<u32>),
    Group(Vec<u32>),
}

impl Owner {
    fn is(&self) -> Match {
        match self {
            Self::User(uids) => Match::Uid(uids.clone()),
            Self::Group(gids) => Match::Gid(gids.clone()),
        }
    }

    fn is_not(&self) -> Match {
        match self {
            Self::User(uids) => Match::NotUid(uids.clone()),
            Self::Group(gids) => Match::NotGid(gids.clone()),
        }
    }

    /// The ids of its three rules.
    fn ids(&self) -> [&'static str; 3] {
        match self {
            Self::User(_) => ["2-self-call", "3-app-to-itself", "4-proxy"],
            Self::Group(_) => ["5-self-call-group", "6-app-to-itself-group", "7-proxy-group"],
        }
    }
}

/// Rules 2 to 4, or for groups 5 to 7.
fn proxys_own(b: &mut Builder, inputs: &Inputs<'_>, owner: &Owner) {
    let (neutral, [self_call, itself, proxy]) = (inputs.neutral(), owner.ids());
    let dns = inputs.settings.dns == Dns::Capture;
    // Istio spares DNS for the user only.
    let spared = match owner {
        Owner::User(_) if dns => vec![53.into(), inputs.ports.hbone.into()],
        _ => vec![inputs.ports.hbone.into()],
    };
    for &family in &inputs.families {
        b.rule(
            ISTIO_OUTPUT,
            self_call,
            "the workload called its own service, and the proxy chose this pod: it enters as inbound",
        )
        .numbered()
        .twin(family)
        .when(
            [
                Match::NotDestination(family.loopback),
                Match::Out(lo()),
                Match::NotDestinationPort(Protocol::Tcp, spared.clone()),
                owner.is(),
            ],
            Action::Jump(ISTIO_IN_REDIRECT),
        );
    }
    if !includes_loopback(inputs) {
        let mut matches = vec![Match::Out(lo()), owner.is_not()];
        if dns {
            let no_dns = Match::NotDestinationPort(Protocol::Tcp, vec![53.into()]);
            matches.insert(1, no_dns);
        }
        b.rule(ISTIO_OUTPUT, itself, "a workload that calls its own address stays direct")
            .numbered()
            .families(neutral)
            .when_all(matches, Action::Return);
    }
    b.rule(ISTIO_OUTPUT, proxy, "what the proxy opens is not caught again")
        .numbered()
        .families(neutral)
        .when([owner.is()], Action::Return);
}

/// Whether what goes to loopback shall be caught, so that a workload's calls to itself are too.
fn includes_loopback(inputs: &Inputs<'_>) -> bool {
    let include = &inputs.settings.outbound.include_cidrs;
    include.iter().flatten().any(|cidr| cidr.addr().is_loopback())
}

/// Whose connections are caught at all.
fn owners(b: &mut Builder, inputs: &Inputs<'_>) {
    let (outbound, neutral) = (&inputs.settings.outbound, inputs.neutral());
    for uids in inputs.split(&outbound.exclude_uids) {
        b.rule(ISTIO_OUTPUT, "exclude-uids", "outbound.exclude_uids asks for it")
            .numbered()
            .families(neutral)
            .when([Match::Uid(uids)], Action::Return);
    }
    for gids in inputs.split(&outbound.exclude_gids) {
        b.rule(ISTIO_OUTPUT, "exclude-gids", "outbound.exclude_gids asks for it")
            .numbered()
            .families(neutral)
            .when([Match::Gid(gids)], Action::Return);
    }
    if !outbound.include_gids.is_empty() {
        b.rule(ISTIO_OUTPUT, "include-gids", "outbound.include_gids asks for no other group")
            .families(neutral)
            .when([Match::NotGid(outbound.include_gids.clone())], Action::Return);
    }
}

fn capture_outbound(b: &mut Builder, inputs: &Inputs<'_>) {
    let (outbound, neutral) = (&inputs.settings.outbound, inputs.neutral());
    let redirect = Action::Jump(ISTIO_REDIRECT);
    for &family in &inputs.families {
        for cidrs in inputs.networks(family, &outbound.exclude_cidrs) {
            b.rule(ISTIO_OUTPUT, "exclude-cidrs", "outbound.exclude_cidrs asks for it")
                .numbered()
                .twin(family)
                .when([Match::Destination(cidrs)], Action::Return);
        }
    }
    for ports in inputs.destination_ports(&outbound.include_ports) {
        b.rule(ISTIO_OUTPUT, "include-ports", "outbound.include_ports asks for it")
            .numbered()
            .families(neutral)
            .when([ports], redirect);
    }
    let Some(cidrs) = &outbound.include_cidrs else {
        b.rule(ISTIO_OUTPUT, "9-capture-outbound", "every other connection passes the proxy")
            .families(neutral)
            .when([], redirect);
        return;
    };
    for &family in &inputs.families {
        include_cidrs(b, inputs, family, cidrs);
    }
}

fn include_cidrs(b: &mut Builder, inputs: &Inputs<'_>, family: Family, cidrs: &[ipnet::IpNet]) {
    for cidrs in inputs.networks(family, cidrs) {
        b.rule(ISTIO_OUTPUT, "include-cidrs", "outbound.include_cidrs asks for it")
            .numbered()
            .twin(family)
            .when([Match::Destination(cidrs)], Action::Jump(ISTIO_REDIRECT));
    }
}

fn lo() -> Vec<String> {
    vec![LOOPBACK.to_owned()]
}

fn tcp_to(port: u16) -> Match {
    Match::DestinationPort(Protocol::Tcp, vec![port.into()])
}
