//! The rule plan: which packets are caught, in which order, and why. Pure: it reads and changes
//! nothing.
//!
//! A plan is a list of rules in chains, as netfilter has them: [`ambient`], [`sidecar`] and [`osm`]
//! make it of the settings. Everything else is made of the plan: nft's text (`nft.rs`), that of
//! iptables-restore (`iptables.rs`), what goes to the kernel over netlink
//! (`backend/nftables.rs`), and the walk of a packet through it (`walk.rs`).
//!
//! The nat chains see the first packet of a connection only, so their counters count connections;
//! the other chains see, and count, packets.

mod ambient;
mod build;
mod invalid;
mod iptables;
mod json;
pub(crate) mod nft;
mod osm;
mod own_ports;
mod reject;
mod sidecar;
mod types;
mod walk;

pub(crate) use build::MANY;
pub use iptables::Family;
pub(crate) use iptables::TABLES;
pub use types::{
    Action, Chain, ChainId, Direction, Families, Hook, LoopbackAddress, Mark, Match, Origin,
    PolicyRoute, Protocol, Rule, Table,
};
pub(crate) use walk::is_link_local;
pub use walk::{Answer, End, Environment, Interface, Packet, Passage, State, Walk, Way};

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use underpass_config::{InterceptionSettings, Profile, Settings};

/// The packet mark of every socket that the proxy opens (Istio's `InpodMark`).
pub const PROXY_MARK: u32 = 0x539;
/// The connection mark of a connection from the proxy to the workload (Istio's `InpodTProxyMark`).
pub const CONNECTION_MARK: u32 = 0x111;
/// The bits of a mark that are ours; the others belong to the CNI and are neither read nor changed.
pub const MARK_MASK: u32 = 0xfff;
/// The routing table that delivers replies to imitated clients back to the proxy.
pub const ROUTE_TABLE: u32 = 100;
/// The priority of the ip rule that chooses [`ROUTE_TABLE`]: just before `main` (32766), as Istio
/// has it.
pub const RULE_PRIORITY: u32 = 32764;
/// The conntrack zone of the original direction of what the proxy opens. Istio uses 1 and 2 for DNS.
pub const PROXY_ZONE: u16 = 15;
/// The name of our nftables table; its family is `inet`.
pub const TABLE: &str = "underpass";
/// The id of the rule that exempts the kubelet's probes; that of its IPv6 twin ends in `-v6`.
pub const KUBELET_PROBE_IN: &str = "kubelet-probe-in";
/// Where the kubelet's probes come from in an Istio mesh, IPv4: the node rewrites their source to
/// it.
pub const KUBELET_PROBE_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 7, 127);
/// Where the kubelet's probes come from in an Istio mesh, IPv6.
pub const KUBELET_PROBE_V6: Ipv6Addr =
    Ipv6Addr::new(0xfd16, 0x9254, 0x7127, 0x1337, 0xffff, 0xffff, 0xffff, 0xffff);

/// The ports that the rules lead to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// Where caught outbound connections arrive.
    pub outbound: u16,
    /// Where caught plaintext inbound connections arrive.
    pub inbound: u16,
    /// Where peers connect with HBONE.
    pub hbone: u16,
    /// Where caught DNS queries arrive.
    pub dns: u16,
    /// Where the proxy serves metrics and readiness: never caught.
    pub services: [SocketAddr; 2],
}

impl Ports {
    /// Where metrics and readiness are served by default.
    pub const DEFAULT_SERVICES: [SocketAddr; 2] = [any_address(15020), any_address(15021)];

    /// Those of the settings.
    #[must_use]
    pub fn of(settings: &Settings) -> Self {
        let proxy = &settings.proxy;
        Self {
            outbound: proxy.outbound_port,
            inbound: proxy.inbound_port,
            hbone: proxy.hbone_port,
            dns: proxy.dns_port,
            services: [settings.metrics, settings.readiness],
        }
    }
}

const fn any_address(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port)
}

/// All rules of a profile, in the order in which the kernel tries them, and what they rely on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RulePlan {
    pub(crate) chains: Vec<Chain>,
    pub(crate) rules: Vec<Rule>,
    pub(crate) routes: Vec<PolicyRoute>,
    pub(crate) addresses: Vec<LoopbackAddress>,
}

impl RulePlan {
    /// The rules that `settings` ask for. `ipv6`: whether the kernel has IPv6, enabled here
    /// or not ([`crate::ipv6_available`]). The profile `none` has no rules.
    #[must_use]
    pub fn new(settings: &InterceptionSettings, ports: Ports, ipv6: bool) -> Self {
        let inputs = build::Inputs::new(settings, ports, ipv6);
        match settings.profile {
            Profile::Ambient => ambient::plan(&inputs),
            Profile::Sidecar => sidecar::plan(&inputs),
            Profile::Osm => osm::plan(&inputs),
            Profile::None => build::Builder::default().finish(&inputs),
        }
    }

    /// No rules, but all that the rules of any settings rely on: for its removal.
    pub(crate) fn beside_rules() -> Self {
        let routes =
            vec![ambient::ROUTE, sidecar::tproxy::route(false), sidecar::tproxy::route(true)];
        let addresses = vec![sidecar::LAST_HOP_V6];
        Self { chains: Vec::new(), rules: Vec::new(), routes, addresses }
    }

    /// The chains, in the order in which they are created: a chain stands before what jumps to it
    /// needs it.
    #[must_use]
    pub fn chains(&self) -> &[Chain] {
        &self.chains
    }

    /// The rules, in order; those of one chain need not stand together.
    #[must_use]
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// The rules of one chain, in order.
    pub fn rules_of(&self, chain: ChainId) -> impl Iterator<Item = &Rule> {
        self.rules.iter().filter(move |rule| rule.chain == chain)
    }

    /// The ip rules and routes that the rules rely on.
    #[must_use]
    pub fn routes(&self) -> &[PolicyRoute] {
        &self.routes
    }

    /// The addresses of the loopback interface that the sockets of the profile rely on.
    #[must_use]
    pub fn addresses(&self) -> &[LoopbackAddress] {
        &self.addresses
    }
}

#[cfg(test)]
mod tests;
