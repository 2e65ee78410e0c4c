//! What is caught and how: the settings that the packet rules are made of.
//!
//! Not here: the rules (the interception crate), and what each key defaults to (`resolve/interception.rs`).

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net};
use thiserror::Error;

use super::Word;

/// What is caught, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterceptionSettings {
    /// Whose traffic scheme the rules follow.
    pub profile: Profile,
    /// What the rules are installed with.
    pub backend: Backend,
    /// Only the rules that Istio or OSM have, none of ours beside them.
    pub exact: bool,
    /// Whether the proxy installs the rules; if not, `underpass rules install` does it before (an init container), and
    /// the proxy installs, repairs and removes none.
    pub install: bool,
    /// Whether the proxy puts back what another tool changed.
    pub repair: bool,
    /// What happens to IPv6 traffic.
    pub ipv6: Ipv6,
    /// What happens to the rules when the proxy stops.
    pub on_exit: OnExit,
    /// Whether the rules may be installed in the host's own network namespace.
    pub allow_host: bool,
    /// Which connections of the workload are caught.
    pub outbound: OutboundCapture,
    /// Which connections to the workload are caught.
    pub inbound: InboundCapture,
    /// What comes in through these interfaces (a VM's, a nested container's) is outbound traffic.
    pub virtual_interfaces: Vec<String>,
    /// The users that the proxy runs as, where the profile tells it by its user (sidecar, OSM).
    pub proxy_uids: Vec<u32>,
    /// The groups that the proxy runs as, where the profile tells it by its group (sidecar).
    pub proxy_gids: Vec<u32>,
    /// Whether DNS queries are caught.
    pub dns: Dns,
    /// Whose queries are caught: those to these servers; empty: those to any.
    pub dns_servers: Vec<IpAddr>,
    /// Whether packets that conntrack calls invalid are dropped, rather than answered with a reset.
    pub drop_invalid: bool,
    /// The workload is an ingress gateway: what reaches it in plain is not caught (ambient).
    pub ingress: bool,
    /// Which connections from the kubelet's probe address bypass the proxy (ambient).
    pub kubelet_probes: KubeletProbes,
    /// What the workload sends to these loopback addresses is left alone (sidecar); within 127.0.0.0/8.
    pub loopback_cidr: Ipv4Net,
}

/// Which connections of the workload are caught: what either `include_cidrs` or `include_ports` names, minus all that is
/// excluded.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OutboundCapture {
    /// Connections to these are never caught.
    pub exclude_cidrs: Vec<IpNet>,
    /// Connections to these are caught; `None`: to everywhere.
    pub include_cidrs: Option<Vec<IpNet>>,
    /// Connections to these ports are never caught.
    pub exclude_ports: Vec<PortRange>,
    /// Connections to these ports are caught, wherever they go.
    pub include_ports: Vec<PortRange>,
    /// Connections that leave through these interfaces are never caught.
    pub exclude_interfaces: Vec<String>,
    /// Connections of these users are never caught.
    pub exclude_uids: Vec<u32>,
    /// Connections of these groups are never caught.
    pub exclude_gids: Vec<u32>,
    /// Connections of these groups only are caught; empty: of all.
    pub include_gids: Vec<u32>,
}

/// Which connections to the workload are caught.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct InboundCapture {
    /// How they reach the proxy.
    pub mode: InboundMode,
    /// Connections to these ports are caught; `None`: to every port.
    pub include_ports: Option<Vec<PortRange>>,
    /// Connections to these ports are never caught.
    pub exclude_ports: Vec<PortRange>,
    /// Connections that come in through these interfaces are never caught.
    pub exclude_interfaces: Vec<String>,
}

/// The rule profile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// Istio ambient: the proxy's packets are told by their mark.
    Ambient,
    /// Istio's sidecar: the proxy is told by its user and group.
    Sidecar,
    /// Open Service Mesh: the proxy is told by its user.
    Osm,
    /// The rules are someone else's: none are installed, and client addresses are not imitated.
    None,
}

/// What the rules are installed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// nftables; where the kernel has none, iptables: legacy first.
    Auto,
    /// A table of nftables, over netlink.
    Nftables,
    /// iptables in its variant for nf_tables.
    Iptables,
    /// iptables in its variant for the kernel's ip_tables.
    IptablesLegacy,
}

/// What happens to IPv6 traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ipv6 {
    /// It is caught as IPv4 is; where the kernel has no IPv6, there is none to catch.
    Capture,
    /// It is refused, so that clients fall back to IPv4, which is caught.
    Reject,
    /// It goes its way uncaught and unencrypted.
    Bypass,
}

/// What happens to the rules when the proxy stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnExit {
    /// They stay: without a proxy the pod's connections are refused (fail closed).
    Keep,
    /// They go: without a proxy the pod's connections are direct and plain (fail open).
    Remove,
}

/// How caught inbound connections reach the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum InboundMode {
    /// Their destination is rewritten (`REDIRECT`).
    #[default]
    Redirect,
    /// They are delivered as they are (`TPROXY`), so that the workload can see the client's address.
    Tproxy,
}

/// Whether DNS queries are caught.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dns {
    /// They go their way.
    Off,
    /// They are led to `proxy.dns_port`.
    Capture,
}

/// Which connections from the kubelet's probe address (169.254.7.127 and its IPv6 twin) bypass the
/// proxy, and with it mTLS and every policy.
///
/// Only a node agent that rewrites the source of the kubelet's probes makes that address mean the
/// kubelet. Without such an agent any host on the link can use it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum KubeletProbes {
    /// None: the address is a client's address like any other.
    #[default]
    Off,
    /// Connections to every port, as Istio's rules have it.
    On,
    /// Connections to these ports.
    Ports(Vec<PortRange>),
}

/// An inclusive range of ports, often of one.
///
/// ```
/// use underpass_config::PortRange;
/// let range: PortRange = "8000-8100".parse().unwrap();
/// assert!(range.contains(8080));
/// assert_eq!(PortRange::from(80).to_string(), "80");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortRange {
    /// The lowest port.
    pub first: u16,
    /// The highest port.
    pub last: u16,
}

/// Why a text is not a port or a range of ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PortRangeError {
    /// It is not one or two numbers from 1 to 65535.
    #[error("must be a port, 1 to 65535, or a range of them, such as 8000-8100")]
    Port,
    /// The range ends before it begins.
    #[error("must begin with its lower port: {last}-{first}")]
    Order {
        /// The port that stands first.
        first: u16,
        /// The port that stands last.
        last: u16,
    },
}

impl PortRange {
    /// Whether `port` is in the range.
    #[must_use]
    pub fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }
}

impl From<u16> for PortRange {
    fn from(port: u16) -> Self {
        Self { first: port, last: port }
    }
}

impl FromStr for PortRange {
    type Err = PortRangeError;

    /// Reads `80`, `8000-8100`, or, as iptables writes it, `8000:8100`.
    fn from_str(text: &str) -> Result<Self, PortRangeError> {
        let (first, last) = text.split_once(['-', ':']).unwrap_or((text, text));
        let (first, last) = (port(first)?, port(last)?);
        if first > last {
            return Err(PortRangeError::Order { first, last });
        }
        Ok(Self { first, last })
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

impl Word for Profile {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("ambient", Self::Ambient),
        ("sidecar", Self::Sidecar),
        ("osm", Self::Osm),
        ("none", Self::None),
    ];
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl Word for Backend {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("auto", Self::Auto),
        ("nftables", Self::Nftables),
        ("iptables", Self::Iptables),
        ("iptables-legacy", Self::IptablesLegacy),
    ];
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl Word for Ipv6 {
    const WORDS: &'static [(&'static str, Self)] =
        &[("capture", Self::Capture), ("reject", Self::Reject), ("bypass", Self::Bypass)];
}

impl fmt::Display for Ipv6 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl Word for OnExit {
    const WORDS: &'static [(&'static str, Self)] =
        &[("keep", Self::Keep), ("remove", Self::Remove)];
}

impl fmt::Display for OnExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl Word for InboundMode {
    const WORDS: &'static [(&'static str, Self)] =
        &[("redirect", Self::Redirect), ("tproxy", Self::Tproxy)];
}

impl fmt::Display for InboundMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl Word for Dns {
    const WORDS: &'static [(&'static str, Self)] =
        &[("off", Self::Off), ("capture", Self::Capture)];
}

impl fmt::Display for Dns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl KubeletProbes {
    /// Whether a connection from the probe address to `port` of the workload is exempt.
    #[must_use]
    pub fn exempt(&self, port: u16) -> bool {
        match self {
            Self::Off => false,
            Self::On => true,
            Self::Ports(ports) => ports.iter().any(|range| range.contains(port)),
        }
    }
}

impl fmt::Display for KubeletProbes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::On => f.write_str("on"),
            Self::Ports(ports) => {
                let ports: Vec<_> = ports.iter().map(ToString::to_string).collect();
                f.write_str(&ports.join(","))
            }
        }
    }
}

pub(super) fn port(text: &str) -> Result<u16, PortRangeError> {
    // `parse` alone would take "+80".
    let digits = text.bytes().all(|c| c.is_ascii_digit());
    text.parse().ok().filter(|port| digits && *port != 0).ok_or(PortRangeError::Port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_prints_as_it_was_read() {
        for text in ["1", "80", "8000-8100", "1-65535"] {
            assert_eq!(text.parse::<PortRange>().unwrap().to_string(), text);
        }
        assert_eq!("8000:8100".parse::<PortRange>().unwrap().to_string(), "8000-8100");
        assert_eq!("80-80".parse::<PortRange>(), Ok(PortRange::from(80)));
    }

    #[test]
    fn both_ends_are_in_the_range() {
        let range = PortRange { first: 10, last: 12 };
        let inside: Vec<u16> = (9..=13).filter(|port| range.contains(*port)).collect();
        assert_eq!(inside, [10, 11, 12]);
    }

    #[test]
    fn what_is_no_range_is_refused() {
        for text in ["", "0", "0-80", "65536", "+80", "-80", "80-", "1-2-3", "http", " 80", "*"] {
            assert_eq!(text.parse::<PortRange>(), Err(PortRangeError::Port), "{text}");
        }
        let order = PortRangeError::Order { first: 90, last: 80 };
        assert_eq!("90-80".parse::<PortRange>(), Err(order));
    }
}
