//! The Open Service Mesh profile: the proxy's user distinguishes its connections from the
//! workload's.
//!
//! Chains and their order are those of OSM 0.8. Exclusions and inclusions are where later versions
//! have them.

use super::build::{Builder, Family, Inputs, TCP, chain};
use super::{Action, ChainId, Match, Protocol, RulePlan, Table, invalid, own_ports, reject};

const PREROUTING: ChainId = chain(Table::Nat, "PREROUTING");
const OUTPUT: ChainId = chain(Table::Nat, "OUTPUT");
const INBOUND: ChainId = chain(Table::Nat, "PROXY_INBOUND");
const OUTBOUND: ChainId = chain(Table::Nat, "PROXY_OUTPUT");
const REDIRECT_INBOUND: ChainId = chain(Table::Nat, "PROXY_IN_REDIRECT");
const REDIRECT_OUTBOUND: ChainId = chain(Table::Nat, "PROXY_REDIRECT");

/// The port of Envoy's admin interface. OSM has a rule for it that no packet reaches.
const ADMIN: u16 = 15000;
/// The ports of metrics and of the rewritten kubelet probes, which are never captured.
const EXEMPT_PORTS: [u16; 4] = [15010, 15901, 15902, 15903];
/// The port to which later versions of OSM rewrite TCP probes.
const TCP_PROBE: u16 = 15904;

pub(super) fn plan(inputs: &Inputs<'_>) -> RulePlan {
    let mut builder = Builder::default();
    invalid::add(&mut builder, inputs);
    add_nat_rules(&mut builder, inputs);
    reject::add(&mut builder, inputs, add_nat_rules);
    builder.finish(inputs)
}

fn add_nat_rules(b: &mut Builder, inputs: &Inputs<'_>) {
    add_redirect_chains(b, inputs);
    add_outbound_rules(b, inputs);
    add_inbound_rules(b, inputs);
}

/// Adds the chains that redirect to the proxy.
fn add_redirect_chains(b: &mut Builder, inputs: &Inputs<'_>) {
    let captured = inputs.captured();
    for (redirect, direction, port) in [
        (REDIRECT_OUTBOUND, "out", inputs.ports.outbound),
        (REDIRECT_INBOUND, "in", inputs.ports.inbound),
    ] {
        b.rule(
            redirect,
            format!("established-{direction}"),
            "skips connections that are older than the rules: conntrack treats their next packet as \
             a new connection, and a redirect would reset it",
        )
        .omitted_by_exact()
        .families(captured)
        .when([TCP, Match::NotOpening], Action::Return);
        let reason = "redirects the connection to the proxy";
        let rule = b.rule(redirect, format!("redirect-{direction}bound"), reason);
        rule.families(captured).when([TCP], Action::Redirect(port));
    }
    b.rule(
        REDIRECT_OUTBOUND,
        "admin-dead",
        "for parity with OSM: Envoy's admin port; the redirect before it already takes all TCP",
    )
    .families(captured)
    .when([Match::DestinationPort(Protocol::Tcp, vec![ADMIN.into()])], Action::Accept);
}

fn add_outbound_rules(b: &mut Builder, inputs: &Inputs<'_>) {
    let (settings, captured) = (inputs.settings, inputs.captured());
    let capture = &settings.outbound;
    b.rule(OUTPUT, "enter-outbound", "every TCP connection that a local process opens")
        .families(captured)
        .when([TCP], Action::Jump(OUTBOUND));
    for &family in &inputs.families {
        exclude_cidrs(b, inputs, family);
    }
    for interfaces in inputs.split(&capture.exclude_interfaces) {
        b.rule(OUTBOUND, "exclude-interfaces", "excluded by outbound.exclude_interfaces")
            .numbered()
            .families(captured)
            .when([Match::Out(interfaces)], Action::Return);
    }
    for ports in inputs.destination_ports(&capture.exclude_ports) {
        b.rule(OUTBOUND, "exclude-ports", "excluded by outbound.exclude_ports")
            .numbered()
            .families(captured)
            .when([ports], Action::Return);
    }
    for uids in inputs.split(&capture.exclude_uids) {
        b.rule(OUTBOUND, "exclude-uids", "excluded by outbound.exclude_uids")
            .numbered()
            .families(captured)
            .when([Match::Uid(uids)], Action::Return);
    }
    for gids in inputs.split(&capture.exclude_gids) {
        b.rule(OUTBOUND, "exclude-gids", "excluded by outbound.exclude_gids")
            .numbered()
            .families(captured)
            .when([Match::Gid(gids)], Action::Return);
    }
    for uids in inputs.split(&settings.proxy_uids) {
        b.rule(OUTBOUND, "proxy", "skips the proxy's own connections")
            .numbered()
            .families(captured)
            .when([Match::Uid(uids)], Action::Return);
    }
    for &family in &inputs.families {
        b.rule(OUTBOUND, "localhost", "skips a workload's calls to localhost")
            .for_family(family)
            .when([Match::Destination(vec![family.loopback])], Action::Return);
    }
    capture_outbound(b, inputs);
}

/// Adds a rule for each network. OSM inserts each at the head of the chain, so the last network
/// comes first.
fn exclude_cidrs(b: &mut Builder, inputs: &Inputs<'_>, family: Family) {
    let mut cidrs = inputs.settings.outbound.exclude_cidrs.clone();
    cidrs.reverse();
    for cidrs in inputs.networks(family, &cidrs) {
        b.rule(OUTBOUND, "exclude-cidrs", "excluded by outbound.exclude_cidrs")
            .numbered()
            .for_family(family)
            .when([Match::Destination(cidrs)], Action::Return);
    }
}

fn capture_outbound(b: &mut Builder, inputs: &Inputs<'_>) {
    let (outbound, captured) = (&inputs.settings.outbound, inputs.captured());
    for ports in inputs.destination_ports(&outbound.include_ports) {
        b.rule(OUTBOUND, "include-ports", "included by outbound.include_ports")
            .numbered()
            .families(captured)
            .when([ports], Action::Jump(REDIRECT_OUTBOUND));
    }
    let Some(cidrs) = &outbound.include_cidrs else {
        b.rule(OUTBOUND, "capture-outbound", "redirects every other connection")
            .families(captured)
            .when([], Action::Jump(REDIRECT_OUTBOUND));
        return;
    };
    for &family in &inputs.families {
        for cidrs in inputs.networks(family, cidrs) {
            b.rule(OUTBOUND, "include-cidrs", "included by outbound.include_cidrs")
                .numbered()
                .for_family(family)
                .when([Match::Destination(cidrs)], Action::Jump(REDIRECT_OUTBOUND));
        }
    }
}

fn add_inbound_rules(b: &mut Builder, inputs: &Inputs<'_>) {
    let (inbound, captured) = (&inputs.settings.inbound, inputs.captured());
    b.rule(PREROUTING, "enter-inbound", "every TCP connection that arrives")
        .families(captured)
        .when([TCP], Action::Jump(INBOUND));
    for interfaces in inputs.split(&inbound.exclude_interfaces) {
        b.rule(INBOUND, "exclude-interfaces-in", "excluded by inbound.exclude_interfaces")
            .numbered()
            .families(captured)
            .when([Match::In(interfaces)], Action::Return);
    }
    for ports in inputs.destination_ports(&inbound.exclude_ports) {
        b.rule(INBOUND, "exclude-ports-in", "excluded by inbound.exclude_ports")
            .numbered()
            .families(captured)
            .when([ports], Action::Return);
    }
    let port = |port: u16| Match::DestinationPort(Protocol::Tcp, vec![port.into()]);
    b.rule(INBOUND, "hbone-in", "HBONE reaches its listener without a redirect")
        .omitted_by_exact()
        .families(captured)
        .when([port(inputs.ports.hbone)], Action::Return);
    own_ports::add(b, inputs, INBOUND, "own-ports-in", &exempt_ports());
    let health = "the proxy's own metrics and the kubelet's rewritten probes";
    for never in EXEMPT_PORTS {
        b.rule(INBOUND, format!("never-{never}"), health)
            .families(captured)
            .when([port(never)], Action::Return);
    }
    b.rule(INBOUND, format!("never-{TCP_PROBE}"), health)
        .omitted_by_exact()
        .families(captured)
        .when([port(TCP_PROBE)], Action::Return);
    capture_inbound(b, inputs);
}

/// The ports that other rules exempt.
fn exempt_ports() -> Vec<u16> {
    EXEMPT_PORTS.into_iter().chain([TCP_PROBE]).collect()
}

fn capture_inbound(b: &mut Builder, inputs: &Inputs<'_>) {
    let captured = inputs.captured();
    match &inputs.settings.inbound.include_ports {
        None => b
            .rule(INBOUND, "capture-inbound", "redirects every other connection to the workload")
            .families(captured)
            .when([TCP], Action::Jump(REDIRECT_INBOUND)),
        Some(ports) => {
            for ports in inputs.destination_ports(ports) {
                b.rule(INBOUND, "include-ports-in", "included by inbound.include_ports")
                    .numbered()
                    .families(captured)
                    .when([ports], Action::Jump(REDIRECT_INBOUND));
            }
        }
    }
}
