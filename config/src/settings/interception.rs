//! The settings from which the packet rules are generated.
//!
//! The interception crate generates the rules; `resolve/interception.rs` has the defaults.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net};
use thiserror::Error;

use super::Word;

/// The selection and the capture of connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterceptionSettings {
    /// The mesh whose rules are imitated.
    pub profile: Profile,
    /// The tool that installs the rules.
    pub backend: Backend,
    /// Whether to install only the rules of Istio or OSM, without additional ones of underpass.
    pub exact: bool,
    /// Whether the proxy installs the rules. Otherwise `underpass rules install` installs them
    /// before, in an init container, and the proxy neither repairs nor removes them.
    pub install: bool,
    /// Whether the proxy restores rules that another program changed.
    pub repair: bool,
    /// The treatment of IPv6 traffic.
    pub ipv6: Ipv6,
    /// The treatment of the rules when the proxy stops.
    pub on_exit: OnExit,
    /// Whether the rules may be installed in the host's own network namespace.
    pub allow_host: bool,
    /// The outbound connections that are captured.
    pub outbound: OutboundCapture,
    /// The inbound connections that are captured.
    pub inbound: InboundCapture,
    /// Interfaces of VMs and nested containers, whose incoming connections are treated as outbound.
    pub virtual_interfaces: Vec<String>,
    /// The user IDs of the proxy, where the profile identifies it by user (sidecar, OSM).
    pub proxy_uids: Vec<u32>,
    /// The group IDs of the proxy, where the profile identifies it by group (sidecar).
    pub proxy_gids: Vec<u32>,
    /// Whether DNS queries are captured.
    pub dns: Dns,
    /// The servers to which DNS queries are captured; empty means all servers.
    pub dns_servers: Vec<IpAddr>,
    /// Whether packets in conntrack state INVALID are dropped instead of answered with RST.
    pub drop_invalid: bool,
    /// Whether the workload is an ingress gateway, whose plaintext inbound connections are not
    /// captured (ambient).
    pub ingress: bool,
    /// The connections from the kubelet's probe address that bypass the proxy (ambient).
    pub kubelet_probes: KubeletProbes,
    /// Loopback addresses within 127.0.0.0/8; the workload's connections to them are not captured
    /// (sidecar).
    pub loopback_cidr: Ipv4Net,
}

/// The outbound connections that are captured: those that match `include_cidrs` or `include_ports`,
/// except for excluded ones.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OutboundCapture {
    /// Connections to these addresses are never captured.
    pub exclude_cidrs: Vec<IpNet>,
    /// Only connections to these addresses are captured; `None` means to all addresses.
    pub include_cidrs: Option<Vec<IpNet>>,
    /// Connections to these ports are never captured.
    pub exclude_ports: Vec<PortRange>,
    /// Connections to these ports are captured, even to other addresses.
    pub include_ports: Vec<PortRange>,
    /// Connections that leave through these interfaces are never captured.
    pub exclude_interfaces: Vec<String>,
    /// Connections of these users are never captured.
    pub exclude_uids: Vec<u32>,
    /// Connections of these groups are never captured.
    pub exclude_gids: Vec<u32>,
    /// Only connections of these groups are captured; empty means of all groups.
    pub include_gids: Vec<u32>,
}

/// The inbound connections that are captured.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct InboundCapture {
    /// The method of capture.
    pub mode: InboundMode,
    /// Only connections to these ports are captured; `None` means to all ports.
    pub include_ports: Option<Vec<PortRange>>,
    /// Connections to these ports are never captured.
    pub exclude_ports: Vec<PortRange>,
    /// Connections that arrive through these interfaces are never captured.
    pub exclude_interfaces: Vec<String>,
}

/// The rule profile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// Istio ambient: rules identify the proxy's packets by their mark.
    Ambient,
    /// Istio's sidecar: rules identify the proxy by its user and group.
    Sidecar,
    /// Open Service Mesh: rules identify the proxy by its user.
    Osm,
    /// Another program installs the rules. The proxy installs none, and connects from its own
    /// address.
    None,
}

/// The tool that installs the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// nftables. If the kernel lacks it, iptables, preferably the legacy variant.
    Auto,
    /// A table of nftables, over netlink.
    Nftables,
    /// iptables in its variant for nf_tables.
    Iptables,
    /// iptables in its variant for the kernel's ip_tables.
    IptablesLegacy,
}

/// The treatment of IPv6 traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ipv6 {
    /// Captured like IPv4. Without IPv6 in the kernel nothing has to be captured.
    Capture,
    /// Refused, so that clients fall back to IPv4, which is captured.
    Reject,
    /// Neither captured nor encrypted.
    Bypass,
}

/// The treatment of the rules when the proxy stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnExit {
    /// Kept: without a proxy the pod's connections are refused (fail closed).
    Keep,
    /// Removed: without a proxy the pod's connections are direct and plaintext (fail open).
    Remove,
}

/// The method of capturing inbound connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum InboundMode {
    /// Rewrites the destination (`REDIRECT`).
    #[default]
    Redirect,
    /// Keeps the destination (`TPROXY`), so that the workload can see the client's address.
    Tproxy,
}

/// Whether DNS queries are captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dns {
    /// Not captured.
    Off,
    /// Redirected to `proxy.dns_port`.
    Capture,
}

/// The connections from the kubelet's probe addresses (169.254.7.127 and an IPv6 equivalent) that
/// bypass the proxy, and so mTLS and every policy.
///
/// The address identifies the kubelet only if a node agent rewrites the source of its probes.
/// Otherwise any host on the link can use it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum KubeletProbes {
    /// No exemption: the address is an ordinary client's.
    #[default]
    Off,
    /// Connections to every port, as in Istio's rules.
    On,
    /// Connections to these ports.
    Ports(Vec<PortRange>),
}

/// An inclusive range of ports.
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

/// The reason why a text is neither a port nor a range of ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PortRangeError {
    /// The text is not one or two numbers from 1 to 65535.
    #[error("must be a port, 1 to 65535, or a range of them, such as 8000-8100")]
    Port,
    /// The first port is above the last.
    #[error("must have its lower port first: {last}-{first}")]
    Order {
        /// The port before the separator.
        first: u16,
        /// The port after the separator.
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

    /// Parses `80`, `8000-8100`, or `8000:8100` as in iptables.
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
    /// Whether a connection from the probe address to `port` of the workload bypasses the proxy.
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
    // The standard parser would accept "+80".
    let is_number = text.bytes().all(|c| c.is_ascii_digit());
    text.parse().ok().filter(|port| is_number && *port != 0).ok_or(PortRangeError::Port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_range_prints_as_parsed() {
        for text in ["1", "80", "8000-8100", "1-65535"] {
            assert_eq!(text.parse::<PortRange>().unwrap().to_string(), text);
        }
        assert_eq!("8000:8100".parse::<PortRange>().unwrap().to_string(), "8000-8100");
        assert_eq!("80-80".parse::<PortRange>(), Ok(PortRange::from(80)));
    }

    #[test]
    fn port_range_includes_both_ends() {
        let range = PortRange { first: 10, last: 12 };
        let inside: Vec<u16> = (9..=13).filter(|port| range.contains(*port)).collect();
        assert_eq!(inside, [10, 11, 12]);
    }

    #[test]
    fn rejects_invalid_port_ranges() {
        for text in ["", "0", "0-80", "65536", "+80", "-80", "80-", "1-2-3", "http", " 80", "*"] {
            assert_eq!(text.parse::<PortRange>(), Err(PortRangeError::Port), "{text}");
        }
        let order = PortRangeError::Order { first: 90, last: 80 };
        assert_eq!("90-80".parse::<PortRange>(), Err(order));
    }
}
