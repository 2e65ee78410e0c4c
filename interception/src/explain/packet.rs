//! Explains a single packet: its verdict, the deciding rule, and the settings that would change the
//! verdict.
//!
//! A setting is listed only if the plan with another value gives the packet another verdict.

use std::fmt::Display;
use std::net::SocketAddr;

use underpass_config::{Dns, InterceptionSettings, Ipv6, KubeletProbes};

use super::network::ExampleNetwork;
use super::{Explanation, Hop, Party};
use crate::plan::{Packet, Protocol, RulePlan, Verdict};

/// The sender of the packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sender {
    /// The workload.
    App,
    /// The proxy.
    Proxy,
    /// A host outside of the pod.
    Remote,
    /// The kubelet, which sends a probe.
    Probe,
}

/// The explanation of one packet.
#[derive(Debug, Clone)]
pub struct PacketExplanation<'e> {
    pub(super) explanation: &'e Explanation<'e>,
    /// The packet and its path.
    pub hop: Hop<'e>,
    /// Sentences about the deciding setting or address, and about settings that would change the
    /// verdict.
    pub advice: Vec<String>,
}

impl Sender {
    /// All senders.
    pub const ALL: [Self; 4] = [Self::App, Self::Proxy, Self::Remote, Self::Probe];

    /// The sender's name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::App => "app",
            Self::Proxy => "proxy",
            Self::Remote => "remote",
            Self::Probe => "probe",
        }
    }
}

impl Explanation<'_> {
    /// Explains the packet with which `sender` opens a connection to `to`.
    #[must_use]
    pub fn packet(
        &self,
        sender: Sender,
        protocol: Protocol,
        to: SocketAddr,
    ) -> PacketExplanation<'_> {
        let network = ExampleNetwork::new(self, to.is_ipv6());
        let (from, mut packet) = match sender {
            Sender::App => (Party::App, network.opening_packet(network.app(), to)),
            Sender::Proxy => (Party::Proxy, network.opening_packet(network.proxy(), to)),
            Sender::Remote => (Party::Remote, network.arriving_packet(network.remote(), to)),
            Sender::Probe => (Party::Kubelet, network.arriving_packet(network.kubelet(), to)),
        };
        packet.protocol = protocol;
        let hop = self.evaluate_hop(from, packet, self.listener(to));
        let advice = self.advice(sender, &hop);
        PacketExplanation { explanation: self, hop, advice }
    }

    fn listener(&self, to: SocketAddr) -> Party {
        let Self { ports, .. } = self;
        let own = [ports.outbound, ports.inbound, ports.hbone, ports.dns].contains(&to.port())
            || ports.services.iter().any(|service| service.port() == to.port());
        match self.environment.is_local(to.ip()) {
            true if own => Party::Proxy,
            true => Party::App,
            false => Party::Remote,
        }
    }

    fn advice(&self, sender: Sender, hop: &Hop<'_>) -> Vec<String> {
        let to = hop.packet.destination;
        let arrives = matches!(sender, Sender::Remote | Sender::Probe);
        if arrives && to.ip().is_loopback() {
            return vec![format!(
                "No such packet arrives: the kernel drops packets from outside to {}.",
                to.ip()
            )];
        }
        let mut advice = Vec::new();
        if arrives && !self.environment.is_local(to.ip()) {
            let refused =
                [Verdict::Redirected(self.ports.inbound), Verdict::Tproxied(self.ports.inbound)];
            let end = if refused.contains(&hop.walk.end) {
                ": the proxy refuses an inbound connection to it."
            } else {
                "."
            };
            advice.push(format!("{} is not an address of this namespace{end}", to.ip()));
        }
        if sender == Sender::Proxy && hop.walk.end == Verdict::Direct {
            advice.push("The proxy's own connections are not captured.".to_owned());
        }
        advice.extend(self.reasons(&hop.packet, hop.walk.end));
        if matches!(hop.walk.end, Verdict::Redirected(_) | Verdict::Tproxied(_) | Verdict::Rejected)
        {
            advice.extend(self.exemptions(&hop.packet, arrives));
        }
        if advice.is_empty() {
            advice.push("No setting changes this.".to_owned());
        }
        advice
    }

    /// The settings without which the packet would get another verdict.
    fn reasons(&self, packet: &Packet, end: Verdict) -> impl Iterator<Item = String> {
        DECIDING.iter().filter_map(move |(key, value, reset)| {
            let mut settings = self.settings.clone();
            reset(&mut settings);
            let otherwise = self.end_with(&settings, packet);
            (otherwise != end).then(|| {
                let value = value(self.settings);
                format!(
                    "`interception.{key}: {value}` decides: without it, the packet would {}.",
                    alternative_end(otherwise)
                )
            })
        })
    }

    /// The settings that would exempt a captured packet.
    fn exemptions(&self, packet: &Packet, arrives: bool) -> Option<String> {
        let to = packet.destination;
        let direct = |change: &dyn Fn(&mut InterceptionSettings)| {
            let mut settings = self.settings.clone();
            change(&mut settings);
            self.end_with(&settings, packet) == Verdict::Direct
        };
        let mut ways = Vec::new();
        if arrives {
            if direct(&|settings| settings.inbound.exclude_ports.push(to.port().into())) {
                ways.push(format!("`interception.inbound.exclude_ports: {}`", to.port()));
            }
        } else {
            if direct(&|settings| settings.outbound.exclude_cidrs.push(to.ip().into())) {
                ways.push(format!("`interception.outbound.exclude_cidrs: {}`", to.ip()));
            }
            if direct(&|settings| settings.outbound.exclude_ports.push(to.port().into())) {
                ways.push(format!("`interception.outbound.exclude_ports: {}`", to.port()));
            }
        }
        (!ways.is_empty()).then(|| format!("{} would exempt it.", ways.join(" or ")))
    }

    fn end_with(&self, settings: &InterceptionSettings, packet: &Packet) -> Verdict {
        let plan = RulePlan::new(settings, self.ports, self.ipv6);
        plan.walk(packet, self.environment).end
    }
}

/// Describes a verdict that another setting would cause.
fn alternative_end(end: Verdict) -> String {
    match end {
        Verdict::Direct => "reach its destination unmodified".to_owned(),
        Verdict::Redirected(port) => format!("be redirected to the proxy's port {port}"),
        Verdict::Tproxied(port) => format!("be delivered unmodified to the proxy's port {port}"),
        Verdict::Rejected => "be refused".to_owned(),
        Verdict::Dropped => "be dropped".to_owned(),
    }
}

/// A setting, its value as text, and a function that gives it another value.
type DecidingSetting =
    (&'static str, fn(&InterceptionSettings) -> String, fn(&mut InterceptionSettings));

const DECIDING: &[DecidingSetting] = &[
    ("ipv6", |s| ipv6(s.ipv6).to_owned(), |s| s.ipv6 = Ipv6::Capture),
    (
        "dns",
        |s| dns(s.dns).to_owned(),
        |s| {
            s.dns = match s.dns {
                Dns::Off => Dns::Capture,
                Dns::Capture => Dns::Off,
            };
        },
    ),
    ("dns_servers", |s| list(&s.dns_servers), |s| s.dns_servers.clear()),
    ("ingress", |s| s.ingress.to_string(), |s| s.ingress = false),
    (
        "kubelet_probes",
        |s| s.kubelet_probes.to_string(),
        |s| {
            s.kubelet_probes = match s.kubelet_probes {
                KubeletProbes::Off => KubeletProbes::On,
                KubeletProbes::On | KubeletProbes::Ports(_) => KubeletProbes::Off,
            };
        },
    ),
    ("virtual_interfaces", |s| list(&s.virtual_interfaces), |s| s.virtual_interfaces.clear()),
    (
        "outbound.exclude_cidrs",
        |s| list(&s.outbound.exclude_cidrs),
        |s| s.outbound.exclude_cidrs.clear(),
    ),
    (
        "outbound.include_cidrs",
        |s| list(s.outbound.include_cidrs.as_deref().unwrap_or_default()),
        |s| s.outbound.include_cidrs = None,
    ),
    (
        "outbound.include_ports",
        |s| list(&s.outbound.include_ports),
        |s| s.outbound.include_ports.clear(),
    ),
    (
        "outbound.exclude_ports",
        |s| list(&s.outbound.exclude_ports),
        |s| s.outbound.exclude_ports.clear(),
    ),
    (
        "outbound.exclude_interfaces",
        |s| list(&s.outbound.exclude_interfaces),
        |s| s.outbound.exclude_interfaces.clear(),
    ),
    (
        "inbound.exclude_ports",
        |s| list(&s.inbound.exclude_ports),
        |s| s.inbound.exclude_ports.clear(),
    ),
    (
        "inbound.include_ports",
        |s| list(s.inbound.include_ports.as_deref().unwrap_or_default()),
        |s| s.inbound.include_ports = None,
    ),
    (
        "inbound.exclude_interfaces",
        |s| list(&s.inbound.exclude_interfaces),
        |s| s.inbound.exclude_interfaces.clear(),
    ),
];

fn list<T: Display>(values: &[T]) -> String {
    let values: Vec<String> = values.iter().map(ToString::to_string).collect();
    if values.is_empty() { "none".to_owned() } else { values.join(",") }
}

fn ipv6(ipv6: Ipv6) -> &'static str {
    match ipv6 {
        Ipv6::Capture => "capture",
        Ipv6::Reject => "reject",
        Ipv6::Bypass => "bypass",
    }
}

fn dns(dns: Dns) -> &'static str {
    match dns {
        Dns::Off => "off",
        Dns::Capture => "capture",
    }
}
