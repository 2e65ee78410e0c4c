//! The configuration of the proxy: its settings, and the mesh.
//!
//! This crate reads, checks and publishes both. It opens no data socket, and does not depend on
//! rustls, h2 or netfilter. All mistakes of a document are reported at once, each with location,
//! key, value and remedy.

mod cidr;
mod cluster;
mod error;
mod hint;
mod identity;
mod mesh;
mod pod;
mod settings;
#[doc(hidden)]
pub mod testing;
mod ticks;
mod watch;
mod xds;
mod yaml;

pub use cluster::{ClusterAccess, ClusterCredential, ClusterDocument};
pub use error::{ConfigErrors, Problem};
pub use hint::Hint;
pub use identity::ca_clients::{CaClient, CaClients, CaToken, IdentityPattern};
pub use identity::spiffe::{SpiffeError, SpiffeId, TrustDomain};
pub use ipnet::{IpNet, Ipv4Net};
pub use mesh::{
    ApplicationTunnel, Background, Condition, Connection, Destination, Endpoint, Gateway,
    GatewayDestination, IpFamilies, Item, LoadBalancing, LoadBalancingMode, Locality, Lookup,
    Match, Mesh, MeshBuilder, MeshSize, MeshSource, Mistake, Name, NamespacedHostname,
    NetworkAddress, NetworkCidr, NetworkMode, Policy, PolicyAction, PolicyLayers, PolicyScope,
    PolicySet, PortMap, Protocol, Rules, Scope, Service, StringMatch, TunnelHeader, Values,
    Visibility, WeightedWaypoint, Workload, WorkloadDraft, WorkloadType, retire_mesh,
};
pub use pod::dns::{DnsPolicy, MAX_NAME_SERVERS, PodDns, is_local_server};
pub use pod::file::PodFile;
pub use pod::folder::{PodDocument, PodFolder};
pub use pod::overlay::InterceptionOverlay;
pub use pod::uid::{PodUid, PodUidError};
pub use settings::declare::{Reference, Written as SettingValue};
pub use settings::load::Sources;
pub use settings::resolve::{keys, reference};
pub use settings::{
    AccessLogSettings, AdminSettings, Backend, Broker, BundleFile, Cipher, CniInstallSettings, Dns,
    DnsSettings, Egress, EgressSettings, IdentityFiles, IdentitySettings, InboundCapture,
    InboundMode, InputSettings, InterceptionSettings, Ipv6, IstioCaSettings, KubeletProbes,
    KubernetesWatch, Limits, LocalCaSettings, LocalSocket, LogFilter, LogFilterError, LogFormat,
    LoggedConnections, Logging, MetricLabel, Mtls, MtlsOverride, MtlsOverrideError, MtlsSettings,
    NamespaceLog, NamespaceLogError, NodeProbes, NodeSettings, OnExit, OtlpSettings,
    OutboundCapture, PacedConnections, PodSourceSettings, PortRange, PortRangeError,
    PrivilegesSettings, Profile, ProxySettings, Ratio, RatioError, SameNode, SeriesSettings,
    Settings, SpireApi, SpireSettings, Timeouts, TrustSettings, TunnelSettings, UnknownLabel,
    WorkloadSettings, XdsHeader, XdsSettings,
};
pub use ticks::{interval_at_multiples, next_multiple};
pub use watch::events::{ChangeStep, FolderEvent, FolderEvents, FolderWatch, OpenFolderEvents};
pub use watch::{FileWatch, FileWatcher, FolderFilesWatch};
pub use xds::control_plane::{Applied, ControlPlane, LocalWorkloads, Urgency};
pub use xds::convert::Rejection;
pub use xds::message::{
    Any, DeltaRequest, DeltaResponse, Metadata, MetadataValue, Node, Resource, Status,
};
pub use xds::resource_type::ResourceType;
pub use xds::session::SessionError;
pub use yaml::document::Origin;
pub use yaml::quote::Quoted;
pub use yaml::read::parse_duration;

/// Entry points for the fuzz targets in `fuzz/` only.
#[cfg(feature = "fuzz")]
pub mod fuzz {
    /// Runs a script of a control plane against the client. Panics if the client differs from its
    /// model.
    pub fn xds_session(script: &[u8]) {
        crate::xds::script::run(script);
    }
}
