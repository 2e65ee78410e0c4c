//! The Open Service Mesh profile: the proxy's connections are told by its user.
//!
//! The order and the chains are those of OSM 0.8, the seed; the exclusions and inclusions of its
//! later versions stand where that version has its own.

use super::build::{Builder, Family, Inputs, TCP, chain};
use super::{Action, ChainId, Match, Protocol, RulePlan, Table, invalid, own_ports, reject};

const PREROUTING: ChainId = chain(Table::Nat, "PREROUTING");
const OUTPUT: ChainId = chain(Table::Nat, "OUTPUT");
const INBOUND: ChainId = chain(Table::Nat, "PROXY_INBOUND");
const OUTBOUND: ChainId = chain(Table::Nat, "PROXY_OUTPUT");
const REDIRECT_INBOUND: ChainId = chain(Table::Nat, "PROXY_IN_REDIRECT");
const REDIRECT_OUTBOUND: ChainId = chain(Table::Nat, "PROXY_REDIRECT");

/// Envoy's admin port, to which OSM has a rule that a packet never reaches.
const ADMIN: u16 = 15000;
/// Metrics and the rewritten liveness, readiness and startup probes: never caught.
const NEVER_CAUGHT: [u16; 4] = [15010, 15901, 15902, 15903];
/// The health check for TCP probes of OSM's later versions.
const TCP_PROBE: u16 = 15904;

pub(super) fn plan(inputs: &Inputs<'_>) -> RulePlan {
    let mut builder = Builder::default();
    invalid::add(&mut builder, inputs);
    nat(&mut builder, inputs);
    reject::add(&mut builder, inputs, nat);
    builder.finish(inputs)
}

fn nat(b: &mut Builder, inputs: &Inputs<'_>) {
    redirects(b, inputs);
    outbound(b, inputs);
    inbound(b, inputs);
}

/// The chains that end in the proxy.
fn redirects(b: &mut Builder, inputs: &Inputs<'_>) {
    let neutral = inputs.neutral();
    for (redirect, direction, port) in [
        (REDIRECT_OUTBOUND, "out", inputs.ports.outbound),
        (REDIRECT_INBOUND, "in", inputs.ports.inbound),
    ] {
        b.rule(
            redirect,
            format!("established-{direction}"),
            "leaves connections alone that are older than the rules: conntrack takes their next packet for \
             a new connection, and a redirect would reset it",
        )
        .ours()
        .families(neutral)
        .when([TCP, Match::NotOpening], Action::Return);
        let reason = "here the connection is caught";
        let rule = b.rule(redirect, format!("redirect-{direction}bound"), reason);
        rule.families(neutral).when([TCP], Action::Redirect(port));
    }
    b.rule(
        REDIRECT_OUTBOUND,
        "admin-dead",
        "OSM has it for Envoy's admin port; nothing gets past the redirect before it",
    )
    .families(neutral)
    .when([Match::DestinationPort(Protocol::Tcp, vec![ADMIN.into()])], Action::Accept);
}

fn outbound(b: &mut Builder, inputs: &Inputs<'_>) {
    let (settings, neutral) = (inputs.settings, inputs.neutral());
    let capture = &settings.outbound;
    b.rule(OUTPUT, "enter-outbound", "all TCP that local processes open")
        .families(neutral)
        .when([TCP], Action::Jump(OUTBOUND));
    for &family in &inputs.families {
        exclude_cidrs(b, inputs, family);
    }
    for interfaces in inputs.split(&capture.exclude_interfaces) {
        b.rule(OUTBOUND, "exclude-interfaces", "outbound.exclude_interfaces asks for it")
            .numbered()
            .families(neutral)
            .when([Match::Out(interfaces)], Action::Return);
    }
    for ports in inputs.destination_ports(&capture.exclude_ports) {
        b.rule(OUTBOUND, "exclude-ports", "outbound.exclude_ports asks for it")
            .numbered()
            .families(neutral)
            .when([ports], Action::Return);
    }
    for uids in inputs.split(&capture.exclude_uids) {
        b.rule(OUTBOUND, "exclude-uids", "outbound.exclude_uids asks for it")
            .numbered()
            .families(neutral)
            .when([Match::Uid(uids)], Action::Return);
    }
    for gids in inputs.split(&capture.exclude_gids) {
        b.rule(OUTBOUND, "exclude-gids", "outbound.exclude_gids asks for it")
            .numbered()
            .families(neutral)
            .when([Match::Gid(gids)], Action::Return);
    }
    for uids in inputs.split(&settings.proxy_uids) {
        b.rule(OUTBOUND, "proxy", "what the proxy opens is not caught again")
            .numbered()
            .families(neutral)
            .when([Match::Uid(uids)], Action::Return);
    }
    for &family in &inputs.families {
        b.rule(OUTBOUND, "localhost", "a workload that calls localhost stays direct")
            .twin(family)
            .when([Match::Destination(vec![family.loopback])], Action::Return);
    }
    capture_outbound(b, inputs);
}

/// OSM inserts each at the head of the chain, so that the last one stands first.
fn exclude_cidrs(b: &mut Builder, inputs: &Inputs<'_>, family: Family) {
    let mut cidrs = inputs.settings.outbound.exclude_cidrs.clone();
    cidrs.reverse();
    for cidrs in inputs.networks(family, &cidrs) {
        b.rule(OUTBOUND, "exclude-cidrs", "outbound.exclude_cidrs asks for it")
            .numbered()
            .twin(family)
            .when([Match::Destination(cidrs)], Action::Return);
    }
}

fn capture_outbound(b: &mut Builder, inputs: &Inputs<'_>) {
    let (outbound, neutral) = (&inputs.settings.outbound, inputs.neutral());
    for ports in inputs.destination_ports(&outbound.include_ports) {
        b.rule(OUTBOUND, "include-ports", "outbound.include_ports asks for it")
            .numbered()
            .families(neutral)
            .when([ports], Action::Jump(REDIRECT_OUTBOUND));
    }
    let Some(cidrs) = &outbound.include_cidrs else {
        b.rule(OUTBOUND, "capture-outbound", "every other connection passes the proxy")
            .families(neutral)
            .when([], Action::Jump(REDIRECT_OUTBOUND));
        return;
    };
    for &family in &inputs.families {
        for cidrs in inputs.networks(family, cidrs) {
            b.rule(OUTBOUND, "include-cidrs", "outbound.include_cidrs asks for it")
                .numbered()
                .twin(family)
                .when([Match::Destination(cidrs)], Action::Jump(REDIRECT_OUTBOUND));
        }
    }
}

fn inbound(b: &mut Builder, inputs: &Inputs<'_>) {
    let (inbound, neutral) = (&inputs.settings.inbound, inputs.neutral());
    b.rule(PREROUTING, "enter-inbound", "all TCP that arrives")
        .families(neutral)
        .when([TCP], Action::Jump(INBOUND));
    for interfaces in inputs.split(&inbound.exclude_interfaces) {
        b.rule(INBOUND, "exclude-interfaces-in", "inbound.exclude_interfaces asks for it")
            .numbered()
            .families(neutral)
            .when([Match::In(interfaces)], Action::Return);
    }
    for ports in inputs.destination_ports(&inbound.exclude_ports) {
        b.rule(INBOUND, "exclude-ports-in", "inbound.exclude_ports asks for it")
            .numbered()
            .families(neutral)
            .when([ports], Action::Return);
    }
    let port = |port: u16| Match::DestinationPort(Protocol::Tcp, vec![port.into()]);
    b.rule(INBOUND, "hbone-in", "HBONE arrives at its listener as it is")
        .ours()
        .families(neutral)
        .when([port(inputs.ports.hbone)], Action::Return);
    own_ports::add(b, inputs, INBOUND, "own-ports-in", &spared());
    let health = "the proxy's own metrics and the kubelet's rewritten probes";
    for never in NEVER_CAUGHT {
        b.rule(INBOUND, format!("never-{never}"), health)
            .families(neutral)
            .when([port(never)], Action::Return);
    }
    b.rule(INBOUND, format!("never-{TCP_PROBE}"), health)
        .ours()
        .families(neutral)
        .when([port(TCP_PROBE)], Action::Return);
    capture_inbound(b, inputs);
}

/// The ports that rules of their own spare.
fn spared() -> Vec<u16> {
    NEVER_CAUGHT.into_iter().chain([TCP_PROBE]).collect()
}

fn capture_inbound(b: &mut Builder, inputs: &Inputs<'_>) {
    let neutral = inputs.neutral();
    match &inputs.settings.inbound.include_ports {
        None => b
            .rule(
                INBOUND,
                "capture-inbound",
                "every other connection to the workload passes the proxy",
            )
            .families(neutral)
            .when([TCP], Action::Jump(REDIRECT_INBOUND)),
        Some(ports) => {
            for ports in inputs.destination_ports(ports) {
                b.rule(INBOUND, "include-ports-in", "inbound.include_ports asks for it")
                    .numbered()
                    .families(neutral)
                    .when([ports], Action::Jump(REDIRECT_INBOUND));
            }
        }
    }
}
