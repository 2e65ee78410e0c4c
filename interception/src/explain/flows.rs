//! The kinds of traffic that an explanation covers: those of a profile, those of the exceptions in
//! its settings, and those of every profile.
//!
//! A flow defines only packets; evaluating the plan gives their paths.

mod ambient;
mod osm;
mod sidecar;

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use underpass_config::{Dns, Profile};

use super::network::{ExampleNetwork, Process, unnamed_port};
use super::{Explanation, Flow, Hop, Party};
use crate::plan::{ConntrackState, Entry, Protocol};

/// A UDP port without a special meaning.
const ANY_UDP_PORT: u16 = 9999;
const DNS_PORT: u16 = 53;

/// All flows: those of the profile in the order of its article, then those of the settings.
pub(super) fn all<'e>(explanation: &'e Explanation<'e>) -> Vec<Flow<'e>> {
    let network = ExampleNetwork::new(explanation, false);
    let mut flows = match explanation.settings.profile {
        Profile::Ambient => ambient::flows(explanation, network),
        Profile::Sidecar => sidecar::flows(explanation, network),
        Profile::Osm => osm::flows(explanation, network),
        Profile::None => return Vec::new(),
    };
    if explanation.ipv6 {
        flows.extend(ipv6(ExampleNetwork::new(explanation, true)));
    }
    flows.extend(outbound_exceptions(explanation));
    flows.extend(inbound_exceptions(explanation, network));
    flows.extend(virtual_interfaces(explanation, network));
    if explanation.settings.drop_invalid {
        flows.push(invalid_packet(explanation, network));
    }
    flows.extend(established_before(explanation, network));
    flows
}

/// Builds a flow.
struct FlowBuilder<'e> {
    flow: Flow<'e>,
    /// True after a packet did not reach the sender of the next one.
    is_interrupted: bool,
}

impl<'e> FlowBuilder<'e> {
    fn new(id: impl Into<String>, title: impl Into<String>) -> Self {
        let (id, title) = (id.into(), title.into());
        Self {
            flow: Flow { id, title, article: None, note: None, hops: Vec::new() },
            is_interrupted: false,
        }
    }

    /// Sets the path according to the article.
    fn article(mut self, article: &'static str) -> Self {
        self.flow.article = Some(article);
        self
    }

    fn note(mut self, note: &'static str) -> Self {
        self.flow.note = Some(note);
        self
    }

    fn note_if(self, condition: bool, note: &'static str) -> Self {
        if condition { self.note(note) } else { self }
    }

    /// Adds a packet, unless an earlier packet did not reach its sender.
    fn hop(mut self, hop: Hop<'e>) -> Self {
        self.is_interrupted |= self.flow.hops.last().is_some_and(|last| last.to != Some(hop.from));
        if !self.is_interrupted {
            self.flow.hops.push(hop);
        }
        self
    }

    /// Adds the reply to the last packet.
    fn reply(self, network: ExampleNetwork<'e>, process: Process) -> Self {
        match self.flow.hops.last() {
            Some(last) if !self.is_interrupted => {
                let reply = network.reply(process, last);
                self.hop(reply)
            }
            _ => self,
        }
    }

    fn flow(self) -> Flow<'e> {
        self.flow
    }
}

/// The proxy's connection to the destination.
fn proxy_connection<'e>(network: ExampleNetwork<'e>, to: SocketAddr) -> Hop<'e> {
    network.sent(network.proxy(), to, Party::Remote)
}

/// A flow with a connection from another host to the workload.
fn inbound<'e>(network: ExampleNetwork<'e>, id: &str, title: &str) -> FlowBuilder<'e> {
    let client = network.remote();
    FlowBuilder::new(id, title)
        .hop(network.received(Party::Remote, client, network.app_at_pod(), Party::App))
        .hop(network.last_hop(client))
}

/// A flow with a connection to another host, until it leaves the pod.
fn outbound<'e>(
    network: ExampleNetwork<'e>,
    id: &str,
    title: &str,
    process: Process,
) -> FlowBuilder<'e> {
    let to = network.app_at_remote();
    FlowBuilder::new(id, title)
        .hop(network.sent(process, to, Party::Remote))
        .hop(proxy_connection(network, to))
}

/// A flow with an HBONE connection, which reaches its listener without a redirect.
fn hbone<'e>(
    explanation: &'e Explanation<'e>,
    network: ExampleNetwork<'e>,
    id: &str,
) -> FlowBuilder<'e> {
    let (client, port) = (network.remote(), explanation.ports.hbone);
    FlowBuilder::new(id, "Another pod's proxy connects by HBONE")
        .hop(network.received(
            Party::Remote,
            client,
            SocketAddr::new(network.pod(), port),
            Party::Proxy,
        ))
        .hop(network.last_hop(client))
}

/// A flow with a DNS query over UDP or TCP, and the query that the DNS proxy sends then.
fn dns<'e>(
    explanation: &'e Explanation<'e>,
    network: ExampleNetwork<'e>,
    id: &str,
    protocol: Protocol,
) -> Flow<'e> {
    let servers = &explanation.settings.dns_servers;
    let server = servers.iter().copied().find(IpAddr::is_ipv4).unwrap_or_else(|| network.remote());
    let query = |process: Process| {
        let mut packet = network.opening_packet(process, SocketAddr::new(server, DNS_PORT));
        packet.protocol = protocol;
        explanation.evaluate_hop(process.party, packet, Party::DnsServer)
    };
    let by = if protocol == Protocol::Udp { "UDP" } else { "TCP" };
    let off = explanation.settings.dns == Dns::Off;
    FlowBuilder::new(id, format!("The app asks a DNS server by {by}"))
        .note_if(
            off && protocol == Protocol::Udp,
            "interception.dns is off: queries are not captured. With `capture` they are redirected to the DNS proxy.",
        )
        .note_if(
            off && protocol == Protocol::Tcp,
            "interception.dns is off: a query over TCP is captured like any other connection.",
        )
        .hop(query(network.app()))
        .hop(query(network.proxy()))
        .flow()
}

/// A flow with traffic that is neither TCP nor DNS.
fn udp<'e>(
    explanation: &'e Explanation<'e>,
    network: ExampleNetwork<'e>,
    id: &str,
) -> FlowBuilder<'e> {
    let to = SocketAddr::new(network.remote(), ANY_UDP_PORT);
    let mut packet = network.opening_packet(network.app(), to);
    packet.protocol = Protocol::Udp;
    FlowBuilder::new(id, "The app sends UDP").hop(explanation.evaluate_hop(
        Party::App,
        packet,
        Party::Remote,
    ))
}

fn localhost<'e>(network: ExampleNetwork<'e>, id: &str) -> FlowBuilder<'e> {
    let to = SocketAddr::new(network.localhost(), network.app_port());
    FlowBuilder::new(id, "The app connects to localhost").hop(network.sent(
        network.app(),
        to,
        Party::App,
    ))
}

fn ipv6(network: ExampleNetwork<'_>) -> Vec<Flow<'_>> {
    vec![
        outbound(network, "IPv6 out", "The app connects to another pod over IPv6", network.app())
            .flow(),
        inbound(network, "IPv6 in", "Another pod connects to the app over IPv6").flow(),
    ]
}

/// A flow for each kind of outbound exception in the settings.
fn outbound_exceptions<'e>(explanation: &'e Explanation<'e>) -> Vec<Flow<'e>> {
    let outbound = &explanation.settings.outbound;
    let network = ExampleNetwork::new(explanation, false);
    let mut flows = Vec::new();
    let mut flow =
        |key: &str, what: String, network: ExampleNetwork<'e>, process: Process, to: SocketAddr| {
            let draft = FlowBuilder::new(format!("outbound.{key}"), what);
            flows.push(
                draft
                    .hop(network.sent(process, to, Party::Remote))
                    .hop(proxy_connection(network, to))
                    .flow(),
            );
        };
    for v6 in [false, true] {
        let cidr = outbound.exclude_cidrs.iter().find(|cidr| cidr.addr().is_ipv6() == v6);
        if let Some((cidr, host)) = cidr.and_then(|cidr| Some((cidr, host_of(explanation, *cidr)?)))
        {
            let network = ExampleNetwork::new(explanation, v6);
            let to = SocketAddr::new(host, network.remote_port());
            let what = format!("The app connects to {cidr}, which is excluded");
            flow("exclude_cidrs", what, network, network.app(), to);
        }
    }
    let to = network.app_at_remote();
    if let Some(range) = outbound.exclude_ports.first() {
        let what = format!("The app connects to port {range}, which is excluded");
        flow("exclude_ports", what, network, network.app(), SocketAddr::new(to.ip(), range.first));
    }
    if outbound.include_cidrs.is_some() {
        let elsewhere =
            SocketAddr::new(network.not_included(), unnamed_port(&outbound.include_ports));
        let what = "The app connects to an address that is not included".to_owned();
        flow("include_cidrs", what, network, network.app(), elsewhere);
    }
    if let Some(&uid) = outbound.exclude_uids.first() {
        let what = format!("A process of user {uid}, which is excluded, connects");
        flow("exclude_uids", what, network, Process { uid, ..network.app() }, to);
    }
    if let Some(&gid) = outbound.exclude_gids.first() {
        let what = format!("A process of group {gid}, which is excluded, connects");
        flow("exclude_gids", what, network, Process { gid, ..network.app() }, to);
    }
    if !outbound.include_gids.is_empty() {
        let taken = |gid: &u32| outbound.include_gids.contains(gid);
        let gid = (1..).find(|gid| !taken(gid)).unwrap_or_default();
        let what = format!("A process of group {gid}, which is not included, connects");
        flow("include_gids", what, network, Process { gid, ..network.app() }, to);
    }
    flows.extend(excluded_interface(explanation, network));
    flows
}

fn excluded_interface<'e>(
    explanation: &'e Explanation<'e>,
    network: ExampleNetwork<'e>,
) -> Option<Flow<'e>> {
    let name = explanation.settings.outbound.exclude_interfaces.first()?;
    let mut packet = network.opening_packet(network.app(), network.app_at_remote());
    if let Entry::Out { interface, .. } = &mut packet.entry {
        interface.clone_from(name);
    }
    let title = format!("The app connects through {name}, which is excluded");
    let draft = FlowBuilder::new("outbound.exclude_interfaces", title);
    Some(draft.hop(explanation.evaluate_hop(Party::App, packet, Party::Remote)).flow())
}

/// A flow for each kind of inbound exception in the settings.
fn inbound_exceptions<'e>(
    explanation: &'e Explanation<'e>,
    network: ExampleNetwork<'e>,
) -> Vec<Flow<'e>> {
    let inbound = &explanation.settings.inbound;
    let mut flows = Vec::new();
    let mut flow = |key: &str, what: String, port: u16, interface: Option<&String>| {
        let mut packet =
            network.arriving_packet(network.remote(), SocketAddr::new(network.pod(), port));
        if let Some(name) = interface {
            packet.entry = Entry::In { interface: name.clone() };
        }
        let hop = explanation.evaluate_hop(Party::Remote, packet, Party::App);
        flows.push(FlowBuilder::new(format!("inbound.{key}"), what).hop(hop).flow());
    };
    if let Some(range) = inbound.exclude_ports.first() {
        let what = format!("Another pod connects to port {range}, which is excluded");
        flow("exclude_ports", what, range.first, None);
    }
    if let Some(included) = &inbound.include_ports {
        let what = "Another pod connects to a port that is not included".to_owned();
        flow("include_ports", what, unnamed_port(included), None);
    }
    if let Some(name) = inbound.exclude_interfaces.first() {
        let what = format!("A connection to the app arrives by {name}, which is excluded");
        flow("exclude_interfaces", what, network.app_port(), Some(name));
    }
    flows
}

fn virtual_interfaces<'e>(
    explanation: &'e Explanation<'e>,
    network: ExampleNetwork<'e>,
) -> Option<Flow<'e>> {
    let name = explanation.settings.virtual_interfaces.first()?;
    let to = network.app_at_remote();
    let mut packet = network.arriving_packet(IpAddr::from([192, 0, 2, 99]), to);
    packet.entry = Entry::In { interface: name.clone() };
    let title = format!("A virtual machine behind {name} connects to another pod");
    let draft = FlowBuilder::new("virtual_interfaces", title)
        .hop(explanation.evaluate_hop(Party::VirtualMachine, packet, Party::Remote))
        .hop(proxy_connection(network, to));
    Some(draft.flow())
}

fn invalid_packet<'e>(explanation: &'e Explanation<'e>, network: ExampleNetwork<'e>) -> Flow<'e> {
    let mut packet = network.arriving_packet(network.remote(), network.app_at_pod());
    packet.state = ConntrackState::Invalid;
    FlowBuilder::new("drop_invalid", "A packet arrives that belongs to no connection")
        .note("If it were delivered, the kernel would answer with a RST and end the connection.")
        .hop(explanation.evaluate_hop(Party::Remote, packet, Party::App))
        .flow()
}

/// The flows of connections that existed before the rules.
fn established_before<'e>(
    explanation: &'e Explanation<'e>,
    network: ExampleNetwork<'e>,
) -> Vec<Flow<'e>> {
    const OLDER_CONNECTION_NOTE: &str = "Conntrack did not see it open and treats its next packet as a new connection. \
                        A redirect would reset it.";
    let mut sent = network.opening_packet(network.app(), network.app_at_remote());
    sent.state = ConntrackState::PickedUp;
    let mut received = network.arriving_packet(network.remote(), network.app_at_pod());
    received.state = ConntrackState::PickedUp;
    let established_before = |id: &str, title: &str, from, packet, to| {
        FlowBuilder::new(id, title)
            .note(OLDER_CONNECTION_NOTE)
            .hop(explanation.evaluate_hop(from, packet, to))
            .flow()
    };
    vec![
        established_before(
            "older out",
            "The app sends on a connection that is older than the rules",
            Party::App,
            sent,
            Party::Remote,
        ),
        established_before(
            "older in",
            "Another pod sends on a connection that is older than the rules",
            Party::Remote,
            received,
            Party::App,
        ),
    ]
}

/// An address in the network that is not the pod's own.
fn host_of(explanation: &Explanation<'_>, cidr: IpNet) -> Option<IpAddr> {
    cidr.hosts()
        .take(8)
        .find(|host| !explanation.environment.is_local(*host) || cidr.addr().is_loopback())
}
