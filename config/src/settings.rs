//! The typed settings, with all defaults: the merged values of the file, the environment and the
//! flags.
//!
//! `declare.rs` and `resolve/` declare and parse them. `load.rs` reads their sources.

mod access_log;
mod admin;
pub(crate) mod declare;
mod dns;
mod egress;
mod identity;
mod interception;
mod limits;
pub(crate) mod load;
mod logging;
mod metrics;
mod mtls;
mod node;
mod otlp;
mod privileges;
mod ratio;
pub(crate) mod resolve;
mod same_node;
pub(crate) mod show;
mod xds;

use std::net::SocketAddr;
use std::path::PathBuf;

pub use access_log::{AccessLogSettings, LoggedConnections, NamespaceLog, NamespaceLogError};
pub use admin::{AdminSettings, LocalSocket};
pub use dns::DnsSettings;
pub use egress::{Egress, EgressSettings};
pub use identity::{
    BundleFile, Cipher, IdentityFiles, IdentitySettings, IstioCaSettings, LocalCaSettings,
    SpireApi, SpireSettings, TrustSettings, TunnelSettings,
};
pub use interception::{
    Backend, Dns, InboundCapture, InboundMode, InterceptionSettings, Ipv6, KubeletProbes, OnExit,
    OutboundCapture, PortRange, PortRangeError, Profile,
};
pub use limits::{Limits, Timeouts};
pub use logging::{LogFilter, LogFilterError, LogFormat, Logging};
pub use metrics::{MetricLabel, SeriesSettings, UnknownLabel};
pub use mtls::{Mtls, MtlsOverride, MtlsOverrideError, MtlsSettings};
pub use node::{CniInstallSettings, KubernetesWatch, NodeProbes, NodeSettings, PodSourceSettings};
pub use otlp::OtlpSettings;
pub use privileges::{Broker, PrivilegesSettings};
pub use ratio::{Ratio, RatioError};
pub use same_node::SameNode;
pub use xds::{XdsHeader, XdsSettings};

use crate::identity::spiffe::{SpiffeError, SpiffeId, TrustDomain};

/// A value with a fixed set of words.
pub(crate) trait Word: Copy + PartialEq + 'static {
    /// Each word with its value.
    const WORDS: &'static [(&'static str, Self)];

    /// The word of this value.
    fn word(self) -> &'static str {
        Self::WORDS.iter().find(|(_, value)| *value == self).map_or("", |(word, _)| word)
    }
}

/// All settings, as `underpass config show` prints them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The name and identity of the proxied workload. With `node.pods` only its trust domain and
    /// network are used.
    pub workload: WorkloadSettings,
    /// The settings of a node daemon, with the source of its pods.
    pub node: NodeSettings,
    /// Whether the privileged part is a process of its own.
    pub privileges: PrivilegesSettings,
    /// The file or folder that describes the mesh: workloads, services and policies. `None` means
    /// that no other workload is known.
    pub mesh_file: Option<PathBuf>,
    /// The control plane that serves the mesh. `mesh_file` adds items that the control plane does
    /// not have.
    pub xds: Option<XdsSettings>,
    /// The source of the proxy's certificate and trusted roots. `None` turns HBONE off in both
    /// directions.
    pub identity: Option<IdentitySettings>,
    /// Trust in addition to the roots of `identity`.
    pub trust: TrustSettings,
    /// The selection and the capture of connections.
    pub interception: InterceptionSettings,
    /// Ports, threads and TCP options of the data path.
    pub proxy: ProxySettings,
    /// Destinations outside the mesh that the workload may connect to.
    pub egress: EgressSettings,
    /// The resolution of names.
    pub dns: DnsSettings,
    /// The number and lifetime of the tunnels to a peer.
    pub tunnels: TunnelSettings,
    /// Limits of the resources that peers and clients can use.
    pub limits: Limits,
    /// Timeouts of connections, handshakes, tunnels and drains.
    pub timeouts: Timeouts,
    /// The socket on which another process requests the listeners (hot restart).
    pub take_over: LocalSocket,
    /// Where the running proxy is administrated.
    pub admin: AdminSettings,
    /// The address of `/metrics`.
    pub metrics: SocketAddr,
    /// The number and lifetime of the metric series of connections.
    pub series: SeriesSettings,
    /// The address of `/healthz/ready`.
    pub readiness: SocketAddr,
    /// Log levels and log format.
    pub logging: Logging,
    /// The collector of traces and log events.
    pub otlp: Option<OtlpSettings>,
}

/// The settings that name files, as far as they are valid.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InputSettings {
    /// As [`Settings::workload`].
    pub workload: Option<WorkloadSettings>,
    /// As [`Settings::mesh_file`].
    pub mesh_file: Option<PathBuf>,
    /// As [`Settings::xds`].
    pub xds: Option<XdsSettings>,
    /// As [`Settings::identity`].
    pub identity: Option<IdentitySettings>,
    /// As [`Settings::trust`].
    pub trust: TrustSettings,
    /// Whether the settings are those of a node daemon, whose pods have their own workloads.
    pub serves_pods: bool,
}

impl From<&Settings> for InputSettings {
    fn from(settings: &Settings) -> Self {
        let Settings { workload, mesh_file, xds, identity, trust, node, .. } = settings.clone();
        let (workload, serves_pods) = (Some(workload), node.pods.is_some());
        Self { workload, mesh_file, xds, identity, trust, serves_pods }
    }
}

/// The workload that this proxy serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkloadSettings {
    /// The name in logs and metrics.
    pub name: String,
    /// The namespace of the workload.
    pub namespace: String,
    /// The service account in the identity.
    pub service_account: String,
    /// The trust domain of the identity.
    pub trust_domain: TrustDomain,
    /// The network of the workload's addresses; may be empty. Networks may reuse addresses.
    pub network: String,
    /// The identity, derived from namespace, service account and trust domain.
    pub spiffe_id: SpiffeId,
}

impl WorkloadSettings {
    /// The workload of a pod on a node with these settings.
    ///
    /// # Errors
    /// Namespace and service account make no SPIFFE identity.
    pub fn of_pod(
        &self,
        name: &str,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, SpiffeError> {
        Ok(Self {
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            service_account: service_account.to_owned(),
            trust_domain: self.trust_domain.clone(),
            network: self.network.clone(),
            spiffe_id: SpiffeId::istio(self.trust_domain.clone(), namespace, service_account)?,
        })
    }
}

/// The connections whose packets are paced, if the kernel's congestion control supports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PacedConnections {
    /// Connections to distant peers.
    Distant,
    /// All connections.
    All,
}

impl Word for PacedConnections {
    const WORDS: &'static [(&'static str, Self)] =
        &[("distant", Self::Distant), ("all", Self::All)];
}

/// Ports, threads and TCP options of the data path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxySettings {
    /// The port of the listener for captured outbound connections.
    pub outbound_port: u16,
    /// The port of the listener for captured plaintext inbound connections.
    pub inbound_port: u16,
    /// The HBONE port of this proxy's listener, and of the peers' listeners.
    pub hbone_port: u16,
    /// The port of the DNS proxy.
    pub dns_port: u16,
    /// The number of data workers. `None` means one for each CPU that the process may use.
    pub workers: Option<usize>,
    /// The connections whose packets are paced.
    pub pacing: PacedConnections,
    /// The connection between two pods of this process.
    pub same_node: SameNode,
    /// Whether inbound plaintext connections are accepted.
    pub mtls: MtlsSettings,
}
