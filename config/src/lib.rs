//! The configuration of the proxy: its settings, and the mesh.
//!
//! This crate reads, checks and publishes both. It opens no data socket and has no knowledge of
//! rustls, h2 or netfilter. All mistakes of a document are reported at once, each with location,
//! key, value and remedy.

mod ca_clients;
mod cidr;
mod declare;
mod document;
mod error;
mod files;
mod load;
mod mesh;
mod quote;
mod read;
mod resolve;
mod settings;
mod show;
mod spiffe;
#[cfg(test)]
mod test_folder;
mod watch;

pub use ca_clients::{CaClient, CaClients, CaToken, IdentityPattern};
pub use declare::Reference;
pub use document::Origin;
pub use error::{ConfigErrors, Problem};
pub use ipnet::{IpNet, Ipv4Net};
pub use load::Sources;
pub use mesh::{
    ApplicationTunnel, Condition, Connection, Destination, Endpoint, Gateway, GatewayDestination,
    IpFamilies, Item, LoadBalancing, LoadBalancingMode, Locality, Match, Mesh, MeshBuilder,
    MeshSource, Mistake, Name, NamespacedHostname, NetworkAddress, NetworkCidr, NetworkMode,
    Policy, PolicyAction, PolicyScope, PolicySet, PortMap, Protocol, Rules, Scope, Service,
    StringMatch, TunnelHeader, Values, Visibility, WeightedWaypoint, Workload, WorkloadDraft,
    WorkloadType,
};
pub use quote::Quoted;
pub use read::parse_duration;
pub use resolve::{keys, reference};
pub use settings::{
    Backend, BundleFile, Cipher, Dns, Egress, EgressSettings, IdentityFiles, IdentitySettings,
    InboundCapture, InboundMode, InterceptionSettings, Ipv6, IstioCaSettings, KubeletProbes,
    Limits, LocalCaSettings, LogFilter, LogFilterError, LogFormat, Logging, Mtls, MtlsOverride,
    MtlsOverrideError, MtlsSettings, OnExit, OutboundCapture, PortRange, PortRangeError, Profile,
    ProxySettings, SeriesSettings, Settings, SpireSettings, TakeOver, Timeouts, TrustSettings,
    TunnelSettings, WorkloadSettings,
};
pub use spiffe::{SpiffeError, SpiffeId, TrustDomain};
pub use watch::{FileWatch, FileWatcher};
