//! The rule plan: the netfilter rules of a profile, with the reason for each.
//!
//! A plan is a list of rules in chains. [`ambient`], [`sidecar`] and [`osm`] build it from the
//! settings. The module is pure: it neither reads nor changes the system.
//!
//! `nft` prints a plan for `nft`, `iptables` prints it for `iptables-restore`, `backend::nftables`
//! encodes it as netlink messages, and `walk` evaluates it for one packet.
//!
//! Nat chains see only the first packet of a connection, so their counters count connections. All
//! other chains see and count every packet.

mod ambient;
mod build;
pub(crate) mod host;
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

pub(crate) use build::HASHED_NETWORKS_MIN;
pub use iptables::Family;
pub(crate) use iptables::TABLES;
pub use types::{
    Action, Chain, ChainId, Direction, Families, Hook, LoopbackAddress, Mark, Match, Origin,
    PolicyRoute, Protocol, Rule, Table,
};
pub(crate) use walk::is_link_local;
pub use walk::{
    ConntrackState, Entry, Environment, Interface, Packet, ReplyOutcome, TraversedChain, Verdict,
    Walk,
};

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use underpass_config::{InterceptionSettings, Profile, Settings};

/// The packet mark of every socket that the proxy opens (Istio's `InpodMark`).
pub const PROXY_MARK: u32 = 0x539;
/// The connection mark of a connection from the proxy to the workload (Istio's `InpodTProxyMark`).
pub const CONNECTION_MARK: u32 = 0x111;
/// The bits of a mark that underpass uses. The CNI owns the other bits, which are never compared or
/// changed.
pub const MARK_MASK: u32 = 0xfff;
/// The routing table that delivers replies to a preserved client address back to the proxy.
pub const ROUTE_TABLE: u32 = 100;
/// The priority of the ip rule that selects [`ROUTE_TABLE`]. It precedes `main` (32766) and equals
/// Istio's.
pub const RULE_PRIORITY: u32 = 32764;
/// The conntrack zone for the original direction of the proxy's own connections. Istio uses zones 1
/// and 2 for DNS.
pub const PROXY_ZONE: u16 = 15;
/// The name of the nftables table. Its family is `inet`.
pub const TABLE: &str = "underpass";
/// The id of the rule that exempts the kubelet's probes. Its IPv6 variant ends in `-v6`.
pub const KUBELET_PROBE_IN: &str = "kubelet-probe-in";
/// The IPv4 source address of kubelet probes in an Istio mesh. The node rewrites their source to
/// it.
pub const KUBELET_PROBE_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 7, 127);
/// The IPv6 source address of kubelet probes in an Istio mesh.
pub const KUBELET_PROBE_V6: Ipv6Addr =
    Ipv6Addr::new(0xfd16, 0x9254, 0x7127, 0x1337, 0xffff, 0xffff, 0xffff, 0xffff);

/// The listening ports of the proxy that rules refer to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// The target port of redirected outbound connections.
    pub outbound: u16,
    /// The target port of redirected plaintext inbound connections.
    pub inbound: u16,
    /// The port on which peers connect with HBONE.
    pub hbone: u16,
    /// The target port of redirected DNS queries.
    pub dns: u16,
    /// The addresses that serve metrics and readiness. They are never captured.
    pub services: [SocketAddr; 2],
}

impl Ports {
    /// The default addresses for metrics and readiness.
    pub const DEFAULT_SERVICES: [SocketAddr; 2] = [any_address(15020), any_address(15021)];

    /// The ports in `settings`.
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

/// All rules of a profile in evaluation order, and the routes and addresses that they depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RulePlan {
    pub(crate) chains: Vec<Chain>,
    pub(crate) rules: Vec<Rule>,
    pub(crate) routes: Vec<PolicyRoute>,
    pub(crate) addresses: Vec<LoopbackAddress>,
}

impl RulePlan {
    /// Builds the rules for `settings`. `ipv6` is true if the kernel supports IPv6, even if it is
    /// disabled ([`crate::namespace::ipv6::ipv6_available`]). The profile `none` has no rules.
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

    /// A plan without rules, but with the routes and addresses of all profiles, to remove them.
    pub(crate) fn routes_and_addresses() -> Self {
        let routes =
            vec![ambient::ROUTE, sidecar::tproxy::route(false), sidecar::tproxy::route(true)];
        let addresses = vec![sidecar::LAST_HOP_V6];
        Self { chains: Vec::new(), rules: Vec::new(), routes, addresses }
    }

    /// The chains in the order of creation: each chain precedes the rules that jump to it.
    #[must_use]
    pub fn chains(&self) -> &[Chain] {
        &self.chains
    }

    /// The rules in order. Rules of different chains may alternate.
    #[must_use]
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// The rules of one chain, in order.
    pub fn rules_in(&self, chain: ChainId) -> impl Iterator<Item = &Rule> {
        self.rules.iter().filter(move |rule| rule.chain == chain)
    }

    /// The ip rules and routes that the rules depend on.
    #[must_use]
    pub fn routes(&self) -> &[PolicyRoute] {
        &self.routes
    }

    /// The loopback addresses that the sockets of the profile depend on.
    #[must_use]
    pub fn addresses(&self) -> &[LoopbackAddress] {
        &self.addresses
    }
}

#[cfg(test)]
mod tests;
