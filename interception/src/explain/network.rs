//! Selects typical addresses, ports and processes for the flows of an explanation.
//!
//! The selection respects the settings: for example, a typical remote port is not an excluded port.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use underpass_config::{InboundMode, InterceptionSettings, PortRange, Profile};

use super::{Explanation, Hop, Party};
use crate::plan::{
    ConntrackState, Direction, Entry, Environment, KUBELET_PROBE_V4, KUBELET_PROBE_V6, PROXY_MARK,
    Packet, Protocol,
};

/// The source port of clients.
const CLIENT_PORT: u16 = 40000;
/// A user and group that the settings do not mention.
const WORKLOAD_ID: u32 = 1000;
/// Typical ports of workloads, in order of preference.
const USUAL_PORTS: [u16; 6] = [8080, 80, 443, 9000, 3000, 5000];

/// The addresses and processes of one address family.
#[derive(Debug, Clone, Copy)]
pub(super) struct ExampleNetwork<'e> {
    explanation: &'e Explanation<'e>,
    v6: bool,
}

/// The attributes of a process that rules match.
#[derive(Debug, Clone, Copy)]
pub(super) struct Process {
    pub(super) party: Party,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mark: u32,
}

impl<'e> ExampleNetwork<'e> {
    pub(super) fn new(explanation: &'e Explanation<'e>, v6: bool) -> Self {
        Self { explanation, v6 }
    }

    fn settings(&self) -> &'e InterceptionSettings {
        self.explanation.settings
    }

    fn environment(&self) -> &'e Environment {
        self.explanation.environment
    }

    /// The pod's own address.
    pub(super) fn pod(&self) -> IpAddr {
        let example = if self.v6 {
            IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1))
        } else {
            IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1))
        };
        self.environment().address(self.v6).unwrap_or(example)
    }

    pub(super) fn localhost(&self) -> IpAddr {
        if self.v6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() }
    }

    /// A remote address whose connections are captured.
    pub(super) fn remote(&self) -> IpAddr {
        let outbound = &self.settings().outbound;
        let included = outbound.include_cidrs.iter().flatten();
        let included: Vec<IpNet> =
            included.copied().filter(|net| !net.addr().is_loopback()).collect();
        let candidates: Vec<IpAddr> = included
            .iter()
            .filter_map(|net| net.hosts().next())
            .chain(self.documentation_addresses())
            .collect();
        let fits = |address: &IpAddr| {
            let named = |nets: &[IpNet]| nets.iter().any(|net| net.contains(address));
            !named(&outbound.exclude_cidrs) && (included.is_empty() || named(&included))
        };
        self.first(&candidates, fits)
    }

    /// A remote address outside of `include_cidrs`.
    pub(super) fn not_included(&self) -> IpAddr {
        let included = self.settings().outbound.include_cidrs.as_deref().unwrap_or_default();
        let candidates: Vec<IpAddr> = self.documentation_addresses().collect();
        self.first(&candidates, |address| !included.iter().any(|net| net.contains(address)))
    }

    /// The first candidate of the family that is not local and for which `fits` returns true. Falls
    /// back to the first candidate.
    fn first(&self, candidates: &[IpAddr], fits: impl Fn(&IpAddr) -> bool) -> IpAddr {
        let family = || candidates.iter().copied().filter(|address| address.is_ipv6() == self.v6);
        let other = |address: &IpAddr| !self.environment().is_local(*address);
        let fitting = family().find(|address| other(address) && fits(address));
        fitting.or_else(|| family().next()).unwrap_or_else(|| self.pod())
    }

    /// Addresses for documentation (RFC 5737, RFC 3849).
    fn documentation_addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        let v4 = [[198, 51, 100, 10], [203, 0, 113, 10], [192, 0, 2, 10]].map(IpAddr::from);
        let v6 = [0x10, 0x20, 0x30].map(|net| IpAddr::from([0x2001, 0xdb8, net, 0, 0, 0, 0, 0x10]));
        v4.into_iter().chain(v6)
    }

    /// A remote port whose connections are captured.
    pub(super) fn remote_port(&self) -> u16 {
        let outbound = &self.settings().outbound;
        let by_port = outbound.include_cidrs.as_ref().is_some_and(Vec::is_empty);
        match outbound.include_ports.first() {
            Some(range) if by_port => range.first,
            _ => unnamed_port(&outbound.exclude_ports),
        }
    }

    /// A port of the workload whose connections are captured.
    pub(super) fn app_port(&self) -> u16 {
        let inbound = &self.settings().inbound;
        match inbound.include_ports.as_ref().and_then(|ports| ports.first()) {
            Some(range) => range.first,
            None => unnamed_port(&inbound.exclude_ports),
        }
    }

    pub(super) fn app_at_pod(&self) -> SocketAddr {
        SocketAddr::new(self.pod(), self.app_port())
    }

    pub(super) fn app_at_remote(&self) -> SocketAddr {
        SocketAddr::new(self.remote(), self.remote_port())
    }

    /// The workload. The settings do not mention its user and group, except to include them.
    pub(super) fn app(&self) -> Process {
        let settings = self.settings();
        let (outbound, free) = (&settings.outbound, |taken: &[u32], also: &[u32]| {
            let mut ids = WORKLOAD_ID..;
            ids.find(|id| !taken.contains(id) && !also.contains(id)).unwrap_or(WORKLOAD_ID)
        });
        let gid = match outbound.include_gids.first() {
            Some(gid) => *gid,
            None => free(&settings.proxy_gids, &outbound.exclude_gids),
        };
        let uid = free(&settings.proxy_uids, &outbound.exclude_uids);
        Process { party: Party::App, uid, gid, mark: 0 }
    }

    pub(super) fn proxy(&self) -> Process {
        let (settings, app) = (self.settings(), self.app());
        let mark = if settings.profile == Profile::Ambient { PROXY_MARK } else { 0 };
        Process {
            party: Party::Proxy,
            uid: settings.proxy_uids.first().copied().unwrap_or(app.uid),
            gid: settings.proxy_gids.first().copied().unwrap_or(app.gid),
            mark,
        }
    }

    /// The source address of kubelet probes.
    pub(super) fn kubelet(&self) -> IpAddr {
        match self.settings().profile {
            Profile::Ambient if self.v6 => KUBELET_PROBE_V6.into(),
            Profile::Ambient => KUBELET_PROBE_V4.into(),
            Profile::Sidecar | Profile::Osm | Profile::None => self.remote(),
        }
    }

    /// The first packet of a connection that a local process opens.
    pub(super) fn opening_packet(&self, process: Process, to: SocketAddr) -> Packet {
        let source = if to.ip().is_loopback() { self.localhost() } else { self.pod() };
        Packet {
            protocol: Protocol::Tcp,
            source: SocketAddr::new(source, CLIENT_PORT),
            destination: to,
            entry: Entry::Out {
                interface: self.environment().interface_to(to.ip()).to_owned(),
                uid: process.uid,
                gid: process.gid,
            },
            state: ConntrackState::New,
            mark: process.mark,
            connection_mark: 0,
        }
    }

    pub(super) fn sent(&self, process: Process, to: SocketAddr, listener: Party) -> Hop<'e> {
        self.explanation.evaluate_hop(process.party, self.opening_packet(process, to), listener)
    }

    /// The interface that connects the namespace to other hosts.
    pub(super) fn outer_interface(&self) -> &'e str {
        self.environment().interface_to(self.remote())
    }

    /// The first packet of a connection that another host opens.
    pub(super) fn arriving_packet(&self, from: IpAddr, to: SocketAddr) -> Packet {
        Packet {
            protocol: Protocol::Tcp,
            source: SocketAddr::new(from, CLIENT_PORT),
            destination: to,
            entry: Entry::In { interface: self.outer_interface().to_owned() },
            state: ConntrackState::New,
            mark: 0,
            connection_mark: 0,
        }
    }

    pub(super) fn received(
        &self,
        from: Party,
        source: IpAddr,
        to: SocketAddr,
        listener: Party,
    ) -> Hop<'e> {
        self.explanation.evaluate_hop(from, self.arriving_packet(source, to), listener)
    }

    /// The proxy's connection to the workload for a client, as `Sockets` opens it.
    pub(super) fn last_hop(&self, client: IpAddr) -> Hop<'e> {
        let (settings, mut proxy) = (self.settings(), self.proxy());
        let tproxy = settings.inbound.mode == InboundMode::Tproxy;
        let (source, to) = match settings.profile {
            Profile::Osm => (self.localhost(), self.localhost()),
            Profile::Sidecar if !tproxy && self.v6 => {
                (Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6).into(), self.pod())
            }
            Profile::Sidecar if !tproxy => (Ipv4Addr::new(127, 0, 0, 6).into(), self.pod()),
            Profile::Ambient | Profile::Sidecar | Profile::None => (client, self.pod()),
        };
        if tproxy {
            proxy.mark = PROXY_MARK;
        }
        let mut packet = self.opening_packet(proxy, SocketAddr::new(to, self.app_port()));
        packet.source.set_ip(source);
        self.explanation.evaluate_hop(Party::Proxy, packet, Party::App)
    }

    /// The reply to a packet that a local process received.
    pub(super) fn reply(&self, process: Process, hop: &Hop<'_>) -> Hop<'e> {
        let mut packet = self.opening_packet(process, hop.packet.source);
        packet.source = hop.packet.destination;
        packet.state = ConntrackState::Established(Direction::Reply);
        packet.connection_mark = hop.walk.connection_mark;
        // Accepted sockets carry no mark, only sockets that connect do.
        packet.mark = if process.party == Party::Proxy { process.mark } else { 0 };
        let mut reply = self.explanation.evaluate_hop(process.party, packet, hop.from);
        // A reply to a preserved client address leaves for the client if no rule routes it back.
        if reply.to == Some(Party::Proxy) && !reply.walk.local {
            reply.to = Some(Party::Remote);
        }
        reply
    }
}

/// The first typical port outside of `ranges`.
pub(super) fn unnamed_port(ranges: &[PortRange]) -> u16 {
    let free = |port: &u16| !ranges.iter().any(|range| range.contains(*port));
    let [usual, ..] = USUAL_PORTS;
    USUAL_PORTS.into_iter().chain(1024..).find(free).unwrap_or(usual)
}
