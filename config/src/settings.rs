//! The typed settings: the values of the file, the environment and the flags, with all defaults.
//!
//! Not here: declaring and parsing them (`declare.rs`, `resolve/`), and their sources (`load.rs`).

pub(crate) mod declare;
mod egress;
mod identity;
mod interception;
mod limits;
pub(crate) mod load;
mod logging;
mod mtls;
mod node;
pub(crate) mod resolve;
mod same_node;
pub(crate) mod show;

use std::net::SocketAddr;
use std::path::PathBuf;

pub use egress::{Egress, EgressSettings};
pub use identity::{
    BundleFile, Cipher, IdentityFiles, IdentitySettings, IstioCaSettings, LocalCaSettings,
    SpireSettings, TrustSettings, TunnelSettings,
};
pub use interception::{
    Backend, Dns, InboundCapture, InboundMode, InterceptionSettings, Ipv6, KubeletProbes, OnExit,
    OutboundCapture, PortRange, PortRangeError, Profile,
};
pub use limits::{Limits, SeriesSettings, TakeOver, Timeouts};
pub use logging::{LogFilter, LogFilterError, LogFormat, Logging};
pub use mtls::{Mtls, MtlsOverride, MtlsOverrideError, MtlsSettings};
pub use node::{CniInstallSettings, NodeProbes, NodeSettings, PodSourceSettings};
pub use same_node::SameNode;

use crate::identity::spiffe::{SpiffeId, TrustDomain};

/// A value written as one of a fixed set of words.
pub(crate) trait Word: Copy + PartialEq + 'static {
    /// Each word with its value.
    const WORDS: &'static [(&'static str, Self)];

    /// The word of this value.
    fn word(self) -> &'static str {
        Self::WORDS.iter().find(|(_, value)| *value == self).map_or("", |(word, _)| word)
    }
}

/// All settings. `underpass config show` prints them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Name and identity of the proxied workload. With `node.pods` only its trust domain and its
    /// network have a meaning.
    pub workload: WorkloadSettings,
    /// The node, and where its daemon learns of its pods.
    pub node: NodeSettings,
    /// The file or folder that describes the mesh: workloads, services and policies. `None`: no
    /// other workload is known.
    pub mesh_file: Option<PathBuf>,
    /// The source of our certificate and trusted roots. `None`: no HBONE in either direction.
    pub identity: Option<IdentitySettings>,
    /// Trust in addition to the roots of `identity`.
    pub trust: TrustSettings,
    /// Which connections are captured, and how.
    pub interception: InterceptionSettings,
    /// The ports, the threads and the TCP of the data path.
    pub proxy: ProxySettings,
    /// Destinations outside the mesh that the workload may connect to.
    pub egress: EgressSettings,
    /// Number and lifetime of the tunnels to a peer.
    pub tunnels: TunnelSettings,
    /// Limits on resources that peers and clients can use.
    pub limits: Limits,
    /// Timeouts of connections, handshakes, tunnels and drains.
    pub timeouts: Timeouts,
    /// The socket at which another process requests our listeners (hot restart).
    pub take_over: TakeOver,
    /// The address of `/metrics`.
    pub metrics: SocketAddr,
    /// Number and lifetime of the metric series of connections.
    pub series: SeriesSettings,
    /// The address of `/healthz/ready`.
    pub readiness: SocketAddr,
    /// Log levels and log format.
    pub logging: Logging,
}

/// The workload that this proxy serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkloadSettings {
    /// Its name in logs and metrics.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// The service account in its identity.
    pub service_account: String,
    /// The trust domain of its identity.
    pub trust_domain: TrustDomain,
    /// The network that its addresses belong to; may be empty. Networks may reuse addresses.
    pub network: String,
    /// The identity that follows from namespace, service account and trust domain.
    pub spiffe_id: SpiffeId,
}

/// The connections that pace, if the kernel's congestion control does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PacedConnections {
    /// Those to distant peers.
    Distant,
    /// All.
    All,
}

impl Word for PacedConnections {
    const WORDS: &'static [(&'static str, Self)] =
        &[("distant", Self::Distant), ("all", Self::All)];
}

/// The ports, the threads and the TCP of the data path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxySettings {
    /// The port of the listener for captured outbound connections.
    pub outbound_port: u16,
    /// The port of the listener for captured plaintext inbound connections.
    pub inbound_port: u16,
    /// The HBONE port: our listener's, and the one at which peers are expected to listen.
    pub hbone_port: u16,
    /// The port of the DNS proxy.
    pub dns_port: u16,
    /// Number of data workers. `None`: as many as CPUs that the process may use.
    pub workers: Option<usize>,
    /// Which connections pace.
    pub pacing: PacedConnections,
    /// How two pods of this process are connected.
    pub same_node: SameNode,
    /// Whether inbound plaintext connections are accepted.
    pub mtls: MtlsSettings,
}
