//! The flows of the OSM profile, in the order of OSM's article.

use std::net::SocketAddr;

use super::{FlowBuilder, hbone, inbound, localhost, outbound, udp};
use crate::explain::network::ExampleNetwork;
use crate::explain::{Explanation, Flow, Party};

/// The port of Envoy's admin interface.
const ADMIN: u16 = 15000;
/// The port of Envoy's metrics.
const METRICS: u16 = 15010;
/// One of the ports to which OSM rewrites the kubelet's probes.
const LIVENESS: u16 = 15901;

pub(super) fn flows<'e>(
    explanation: &'e Explanation<'e>,
    network: ExampleNetwork<'e>,
) -> Vec<Flow<'e>> {
    vec![
        outbound(network, "O1", "The app connects to another pod", network.app())
            .article("OUTPUT ▶ PROXY_OUTPUT ▶ PROXY_REDIRECT ▶ 15001; the proxy's own connections by --uid-owner 1500")
            .flow(),
        inbound(network, "O2", "Another pod connects to the app")
            .article("PREROUTING ▶ PROXY_INBOUND ▶ PROXY_IN_REDIRECT ▶ 15003")
            .note("The proxy connects to localhost, so the app sees the client 127.0.0.1.")
            .flow(),
        exempt(network, "O3", "Prometheus reads the proxy's metrics", Party::Prometheus, METRICS),
        exempt(network, "O4", "The kubelet probes the app through the proxy", Party::Kubelet, LIVENESS),
        own_address(network),
        localhost(network, "O6").flow(),
        admin(network),
        hbone(explanation, network, "HBONE").note("OSM has no HBONE; underpass adds it to every profile.").flow(),
        udp(explanation, network, "UDP").article("only TCP is intercepted").flow(),
    ]
}

fn exempt<'e>(
    network: ExampleNetwork<'e>,
    id: &str,
    title: &str,
    from: Party,
    port: u16,
) -> Flow<'e> {
    let to = SocketAddr::new(network.pod(), port);
    FlowBuilder::new(id, title)
        .article("PREROUTING ▶ PROXY_INBOUND, RETURN by port")
        .hop(network.received(from, network.remote(), to, Party::Proxy))
        .flow()
}

fn own_address(network: ExampleNetwork<'_>) -> Flow<'_> {
    let to = network.app_at_pod();
    FlowBuilder::new("O5", "The app connects to its own pod's address")
        .note("OSM 0.8, the article's version, captures it; later versions do not.")
        .hop(network.sent(network.app(), to, Party::App))
        .hop(network.sent(network.proxy(), to, Party::App))
        .flow()
}

fn admin(network: ExampleNetwork<'_>) -> Flow<'_> {
    let to = SocketAddr::new(network.pod(), ADMIN);
    FlowBuilder::new("O7", "The app connects to Envoy's admin port at the pod's address")
        .article("PROXY_REDIRECT, ACCEPT by port 15000")
        .note("The article's rule for this port follows a redirect of all TCP: it never matches.")
        .hop(network.sent(network.app(), to, Party::Proxy))
        .flow()
}
