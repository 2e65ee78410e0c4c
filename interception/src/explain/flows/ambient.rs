//! The flows of the ambient profile, numbered like this project's kernel tests: A1 to A12.

use std::net::SocketAddr;

use underpass_config::{InterceptionSettings, KubeletProbes};

use super::{FlowBuilder, dns, hbone, inbound, localhost, outbound, udp};
use crate::explain::network::ExampleNetwork;
use crate::explain::{Explanation, Flow, Party};
use crate::plan::Protocol;

pub(super) fn flows<'e>(
    explanation: &'e Explanation<'e>,
    network: ExampleNetwork<'e>,
) -> Vec<Flow<'e>> {
    vec![
        outbound(network, "A1", "The app connects to another pod", network.app())
            .article("OUTPUT ▶ ISTIO_OUTPUT, the last rule ▶ 15001")
            .note("The proxy's own connection carries the mark 0x539, which the last rule excludes.")
            .flow(),
        from_remote(explanation, network),
        hbone(explanation, network, "A3")
            .article("PREROUTING ▶ ISTIO_PRERT ▶ 15008")
            .note("Connections to 15008 are not redirected: the rule that captures excludes the port.")
            .reply(network, network.app())
            .flow(),
        probe(explanation, network),
        metrics(explanation, network),
        own_address(network),
        localhost(network, "A5'").flow(),
        other_loopback(network),
        own_hbone(explanation, network),
        dns(explanation, network, "A9", Protocol::Udp),
        dns(explanation, network, "A9'", Protocol::Tcp),
        udp(explanation, network, "UDP").flow(),
    ]
}

fn from_remote<'e>(explanation: &'e Explanation<'e>, network: ExampleNetwork<'e>) -> Flow<'e> {
    let ingress = explanation.settings.ingress;
    inbound(network, "A2", "Another pod connects to the app in plaintext")
        .article("PREROUTING ▶ ISTIO_PRERT, the last rule ▶ 15006")
        .note(
            "The proxy connects to the app from the client's address. The connection mark 0x111 routes the \
             app's replies back: it selects routing table 100. The article only says that the mark speeds up matching.",
        )
        .note_if(ingress, "interception.ingress: plaintext connections reach the gateway without a redirect (A10).")
        .reply(network, network.app())
        .flow()
}

fn probe<'e>(explanation: &'e Explanation<'e>, network: ExampleNetwork<'e>) -> Flow<'e> {
    let InterceptionSettings { kubelet_probes: probes, ingress, .. } = explanation.settings;
    let mut to = network.app_at_pod();
    if let KubeletProbes::Ports(ports) = probes
        && let Some(range) = ports.first()
    {
        to.set_port(range.first);
    }
    FlowBuilder::new("A4", "The kubelet probes the app")
        .article("PREROUTING ▶ ISTIO_PRERT, ACCEPT by source 169.254.7.127")
        .note(
            "The article calls 169.254.7.127 an address of Istio. It is not: istio-cni's node agent rewrites \
             the source of the kubelet's probes to it. Without that agent, probes are treated like other clients.",
        )
        .note_if(
            *probes == KubeletProbes::Off,
            "interception.kubelet_probes is off: connections from 169.254.7.127 are captured like \
             all others. Without a node agent, any host on the link can use that address.",
        )
        .note_if(
            *ingress,
            "interception.ingress: inbound connections are not captured, so probes need no rule.",
        )
        .hop(network.received(Party::Kubelet, network.kubelet(), to, Party::App))
        .flow()
}

fn metrics<'e>(explanation: &'e Explanation<'e>, network: ExampleNetwork<'e>) -> Flow<'e> {
    let [metrics, _] = explanation.ports.services;
    let to = SocketAddr::new(network.pod(), metrics.port());
    FlowBuilder::new("metrics", "Prometheus reads the proxy's metrics")
        .note_if(
            explanation.settings.exact,
            "Istio's ambient rules capture it, and the workload's policies apply to it.",
        )
        .hop(network.received(Party::Prometheus, network.remote(), to, Party::Proxy))
        .flow()
}

fn own_address(network: ExampleNetwork<'_>) -> Flow<'_> {
    FlowBuilder::new("A5", "The app connects to its own pod's address")
        .article("OUTPUT ▶ ISTIO_OUTPUT, ACCEPT on loopback")
        .hop(network.sent(network.app(), network.app_at_pod(), Party::App))
        .flow()
}

fn other_loopback(network: ExampleNetwork<'_>) -> Flow<'_> {
    let to = SocketAddr::new([127, 0, 0, 2].into(), network.app_port());
    FlowBuilder::new("A5''", "The app connects to another loopback address")
        .hop(network.sent(network.app(), to, Party::App))
        .flow()
}

fn own_hbone<'e>(explanation: &'e Explanation<'e>, network: ExampleNetwork<'e>) -> Flow<'e> {
    let to = SocketAddr::new(network.pod(), explanation.ports.hbone);
    FlowBuilder::new("A8", "The app connects to a service, and the proxy selects this same pod")
        .hop(network.sent(network.app(), network.app_at_remote(), Party::Remote))
        .hop(network.sent(network.proxy(), to, Party::Proxy))
        .hop(network.last_hop(network.pod()))
        .flow()
}
