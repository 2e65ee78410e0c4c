//! The flows of the sidecar profile: the six types of its article, and flows that the article
//! omits.

use std::net::SocketAddr;

use super::{FlowBuilder, dns, hbone, inbound, localhost, outbound, proxy_connection, udp};
use crate::explain::network::{ExampleNetwork, Process};
use crate::explain::{Explanation, Flow, Party};
use crate::plan::Protocol;

/// The port of the agent's merged metrics.
const METRICS: u16 = 15020;
/// The port of Envoy's admin interface.
const ADMIN: u16 = 15000;
/// The port of istiod.
const ISTIOD: u16 = 15012;

pub(super) fn flows<'e>(
    explanation: &'e Explanation<'e>,
    network: ExampleNetwork<'e>,
) -> Vec<Flow<'e>> {
    let mut flows = vec![
        from_remote(explanation, network),
        outbound(network, "2", "The app connects to another pod", network.app())
            .article("OUTPUT ▶ ISTIO_OUTPUT rule 9 ▶ ISTIO_REDIRECT ▶ 15001 ▶ OUTPUT ▶ ISTIO_OUTPUT rule 4")
            .flow(),
        metrics(network),
        through_service(network),
        to_own_address(network),
        within_proxy(network),
        agent(network),
    ];
    flows.extend(agent_by_group(explanation, network));
    flows.extend([
        hbone(explanation, network, "HBONE").note("The article predates HBONE in sidecars.").flow(),
        localhost(network, "localhost").flow(),
        dns(explanation, network, "DNS", Protocol::Udp),
        dns(explanation, network, "DNS over TCP", Protocol::Tcp),
        udp(explanation, network, "UDP").flow(),
    ]);
    flows
}

fn from_remote<'e>(explanation: &'e Explanation<'e>, network: ExampleNetwork<'e>) -> Flow<'e> {
    let draft = inbound(network, "1", "Another pod connects to the app").article(
        "PREROUTING ▶ ISTIO_INBOUND ▶ ISTIO_IN_REDIRECT ▶ 15006 ▶ OUTPUT ▶ ISTIO_OUTPUT rule 1",
    );
    if explanation.settings.inbound.mode == underpass_config::InboundMode::Tproxy {
        return draft
            .note(
                "With TPROXY the app sees the client's own address; a mark routes its replies back to \
                 the proxy. The article describes REDIRECT.",
            )
            .reply(network, network.app())
            .flow();
    }
    draft
        .note(
            "The proxy connects from 127.0.0.6, which rule 1 matches. From any other address, rule 2 \
             would redirect it to the proxy again in an endless loop.",
        )
        .flow()
}

fn metrics(network: ExampleNetwork<'_>) -> Flow<'_> {
    let to = SocketAddr::new(network.pod(), METRICS);
    FlowBuilder::new("3", "Prometheus reads the proxy's metrics")
        .article("PREROUTING ▶ ISTIO_INBOUND (not redirected) ▶ INPUT ▶ OUTPUT ▶ ISTIO_OUTPUT rule 3")
        .note(
            "According to the article, the reply passes rule 3. It does not: nat applies only to the \
             packet that opens a connection, and that one arrived. The article's ports (15002, 15090) are 15020, \
             15021 and 15090 today.",
        )
        .hop(network.received(Party::Prometheus, network.remote(), to, Party::Proxy))
        .reply(network, network.proxy())
        .flow()
}

fn through_service(network: ExampleNetwork<'_>) -> Flow<'_> {
    let service = network.app_at_remote();
    FlowBuilder::new("4", "The app connects to a service, and the proxy selects this same pod")
        .article(
            "OUTPUT ▶ ISTIO_OUTPUT rule 9 ▶ ISTIO_REDIRECT ▶ 15001 ▶ OUTPUT ▶ ISTIO_OUTPUT rule 2 ▶ \
             ISTIO_IN_REDIRECT ▶ 15006 ▶ OUTPUT ▶ ISTIO_OUTPUT rule 1",
        )
        .hop(network.sent(network.app(), service, Party::Remote))
        .hop(network.sent(network.proxy(), network.app_at_pod(), Party::App))
        .hop(network.last_hop(network.pod()))
        .flow()
}

fn to_own_address(network: ExampleNetwork<'_>) -> Flow<'_> {
    FlowBuilder::new("4'", "The app connects to its own pod's address")
        .note(
            "The article covers only the path through a service. A direct call bypasses the proxy.",
        )
        .hop(network.sent(network.app(), network.app_at_pod(), Party::App))
        .flow()
}

fn within_proxy(network: ExampleNetwork<'_>) -> Flow<'_> {
    let to = SocketAddr::new(network.localhost(), ADMIN);
    FlowBuilder::new("5", "The proxy connects to itself on localhost")
        .article("OUTPUT ▶ ISTIO_OUTPUT rule 8")
        .note(
            "The article names rule 8; rule 4 precedes it and matches all traffic of the proxy's user. \
             With the default settings rules 5, 6 and 8 never match: traffic that passes rules 3 and 4 is \
             neither on loopback nor from the proxy.",
        )
        .hop(network.sent(network.proxy(), to, Party::Proxy))
        .flow()
}

fn agent(network: ExampleNetwork<'_>) -> Flow<'_> {
    let agent = Process { party: Party::Agent, ..network.proxy() };
    FlowBuilder::new("6", "The agent connects to istiod")
        .article("OUTPUT ▶ ISTIO_OUTPUT rule 9 ▶ 15001 ▶ OUTPUT ▶ ISTIO_OUTPUT rule 4")
        .note(
            "According to the article, this connection is captured. It is not: the agent runs as the proxy's user, which rule 4 excludes.",
        )
        .hop(network.sent(agent, SocketAddr::new(network.remote(), ISTIOD), Party::Istiod))
        .hop(proxy_connection(network, SocketAddr::new(network.remote(), ISTIOD)))
        .flow()
}

fn agent_by_group<'e>(
    explanation: &'e Explanation<'e>,
    network: ExampleNetwork<'e>,
) -> Option<Flow<'e>> {
    let settings = explanation.settings;
    let gid = *settings.proxy_gids.first()?;
    let uid = if settings.proxy_uids.contains(&0) { network.app().uid } else { 0 };
    let agent = Process { party: Party::Agent, uid, gid, mark: 0 };
    let to = SocketAddr::new(network.remote(), ISTIOD);
    let title = format!("An agent of user {uid} and the proxy's group connects to istiod");
    let draft = FlowBuilder::new("6'", title).hop(network.sent(agent, to, Party::Istiod));
    Some(draft.hop(proxy_connection(network, to)).flow())
}
