//! DNS capture of the sidecar profile: redirects and conntrack zones.
//!
//! The queries of the workload and those of the DNS proxy may use the same source port, so they
//! need separate zones. Zone 1 is for connections between the DNS proxy and the servers, zone 2 for
//! connections between the workload and the DNS proxy.

use ipnet::IpNet;

use super::{ISTIO_OUTPUT, skip_established};
use crate::plan::build::{Builder, Family, Inputs, chain};
use crate::plan::{Action, ChainId, Families, Match, Protocol, Table};

const NAT: ChainId = chain(Table::Nat, "ISTIO_OUTPUT_DNS");
const RAW: ChainId = chain(Table::Raw, "ISTIO_OUTPUT_DNS");
const RAW_INBOUND: ChainId = chain(Table::Raw, "ISTIO_INBOUND");

const UPSTREAM: Action = Action::Zone(1, None);
const DOWNSTREAM: Action = Action::Zone(2, None);

/// The DNS servers of one rule, which captures queries to them. `None`: any server.
#[derive(Debug, Clone)]
struct Servers {
    families: Families,
    addresses: Option<Vec<IpNet>>,
}

/// Adds the redirects to `ISTIO_OUTPUT`.
pub(super) fn add_nat_rules(b: &mut Builder, inputs: &Inputs<'_>) {
    let servers = servers(inputs);
    if servers.is_empty() {
        return;
    }
    for families in distinct(&servers) {
        b.rule(ISTIO_OUTPUT, "enter-dns", "captures queries to a local resolver too")
            .families(families)
            .when([], Action::Jump(NAT));
    }
    skip_established(b, NAT, "established-dns", inputs.captured());
    let redirect = Action::Redirect(inputs.ports.dns);
    for (protocol, id) in [(Protocol::Tcp, "capture-dns-tcp"), (Protocol::Udp, "capture-dns-udp")] {
        for servers in &servers {
            let mut matches = vec![Match::DestinationPort(protocol, vec![53.into()])];
            if let Some(addresses) = &servers.addresses {
                matches.insert(0, Match::Destination(addresses.clone()));
            }
            b.rule(NAT, id, "redirects the workload's DNS queries to the DNS proxy")
                .numbered()
                .families(servers.families)
                .when_all(matches, redirect);
        }
    }
}

/// Adds the conntrack zones.
pub(super) fn add_raw_rules(b: &mut Builder, inputs: &Inputs<'_>) {
    let (settings, captured) = (inputs.settings, inputs.captured());
    b.rule(
        chain(Table::Raw, "OUTPUT"),
        "enter-raw-output",
        "every packet that a local process sends",
    )
    .families(captured)
    .when([], Action::Jump(RAW));
    let uids = inputs.split(&settings.proxy_uids).into_iter().map(Match::Uid);
    let gids = inputs.split(&settings.proxy_gids).into_iter().map(Match::Gid);
    for owner in uids.chain(gids) {
        let to_server = Match::DestinationPort(Protocol::Udp, vec![53.into()]);
        b.rule(RAW, "zone-proxy-query", "puts the DNS proxy's queries to the servers in zone 1")
            .numbered()
            .families(captured)
            .when([to_server, owner.clone()], UPSTREAM);
        let from_proxy = Match::SourcePort(Protocol::Udp, inputs.ports.dns);
        b.rule(RAW, "zone-proxy-answer", "puts the DNS proxy's answers to the workload in zone 2")
            .numbered()
            .families(captured)
            .when([from_proxy, owner], DOWNSTREAM);
    }
    for servers in servers(inputs) {
        add_zone_rules(b, &servers);
    }
}

fn add_zone_rules(b: &mut Builder, Servers { families, addresses }: &Servers) {
    let entered = b.has_rule("enter-raw-prerouting", *families);
    if !entered {
        b.rule(
            chain(Table::Raw, "PREROUTING"),
            "enter-raw-prerouting",
            "every packet that arrives",
        )
        .families(*families)
        .when([], Action::Jump(RAW_INBOUND));
    }
    let mut query = vec![Match::DestinationPort(Protocol::Udp, vec![53.into()])];
    let mut reply = vec![Match::SourcePort(Protocol::Udp, 53)];
    if let Some(addresses) = addresses {
        query.insert(0, Match::Destination(addresses.clone()));
        reply.insert(0, Match::Source(addresses.clone()));
    }
    b.rule(RAW, "zone-query", "puts the workload's queries in zone 2")
        .numbered()
        .families(*families)
        .when_all(query, DOWNSTREAM);
    b.rule(RAW_INBOUND, "zone-answer", "puts the servers' answers in zone 1")
        .numbered()
        .families(*families)
        .when_all(reply, UPSTREAM);
}

fn servers(inputs: &Inputs<'_>) -> Vec<Servers> {
    let addresses: Vec<IpNet> =
        inputs.settings.dns_servers.iter().copied().map(IpNet::from).collect();
    if addresses.is_empty() {
        return vec![Servers { families: inputs.captured(), addresses: None }];
    }
    let of = |family: &Family| {
        let families = family.families();
        let lists = inputs.networks(*family, &addresses).into_iter();
        lists.map(move |list| Servers { families, addresses: Some(list) }).collect::<Vec<_>>()
    };
    inputs.families.iter().flat_map(of).collect()
}

/// The families in `servers`, without duplicates.
fn distinct(servers: &[Servers]) -> Vec<Families> {
    let mut families: Vec<_> = servers.iter().map(|servers| servers.families).collect();
    families.dedup();
    families
}
