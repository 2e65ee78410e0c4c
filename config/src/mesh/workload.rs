//! Workloads: pods, VMs and processes with an address and an identity.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::names::{Name, NamespacedHostname, NetworkAddress};
use super::policy::Policy;
use crate::identity::spiffe::SpiffeId;

/// The protocol that reaches a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Plaintext TCP.
    Tcp,
    /// Only HBONE tunnels.
    Hbone,
}

/// The kind of a workload's owner: Istio's four kinds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WorkloadType {
    /// A Deployment or a similar resource.
    Deployment,
    /// A CronJob.
    CronJob,
    /// A pod or process without an owner.
    Pod,
    /// A Job.
    Job,
}

impl WorkloadType {
    /// All types.
    pub const ALL: [Self; 4] = [Self::Deployment, Self::CronJob, Self::Pod, Self::Job];

    /// The name in the mesh file and in `baggage`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deployment => "deployment",
            Self::CronJob => "cronjob",
            Self::Pod => "pod",
            Self::Job => "job",
        }
    }
}

/// Whether a workload shares its addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NetworkMode {
    /// The addresses belong to this workload only.
    Standard,
    /// The workload has the addresses of its node, which do not identify it.
    HostNetwork,
}

/// The location of a workload. Empty values are unknown.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Locality {
    /// The region of the cloud.
    pub region: Name,
    /// The zone within the region.
    pub zone: Name,
    /// A part of the zone, such as a rack.
    pub subzone: Name,
}

/// The reference to a gateway or waypoint.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum GatewayDestination {
    /// The address of a workload or a service.
    Address(NetworkAddress),
    /// The hostname of a service or a workload.
    Hostname(NamespacedHostname),
}

/// A proxy in front of workloads: a waypoint, or the gateway of another network.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Gateway {
    /// The reference to the proxy's workload or service.
    pub destination: GatewayDestination,
    /// The port for tunnels.
    pub hbone_port: u16,
}

/// The header before the data of each connection from a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TunnelHeader {
    /// No header.
    None,
    /// A PROXY protocol header (version 2) with both addresses and the client's identity.
    Proxy,
}

/// A workload that accepts tunnels to any destination, such as a waypoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ApplicationTunnel {
    /// The header of each connection.
    pub header: TunnelHeader,
    /// The port that receives the connections; `None` means the requested port.
    pub port: Option<u16>,
}

/// A workload: a pod, a VM, or a process with an address and an identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// The id, unique in the mesh. If the source has none, it is derived from namespace and name.
    pub uid: Name,
    /// The name.
    pub name: Name,
    /// The namespace.
    pub namespace: Name,
    /// The service account from which the identity is derived.
    pub service_account: Name,
    /// The identity that the workload must prove.
    pub identity: SpiffeId,
    /// The network of its addresses.
    pub network: Name,
    /// The addresses. A workload without an address has a hostname or a gateway.
    pub addresses: Box<[IpAddr]>,
    /// The DNS name; empty if the workload has an address.
    pub hostname: Name,
    /// Whether the workload shares its addresses.
    pub network_mode: NetworkMode,
    /// The protocol that reaches it.
    pub protocol: Protocol,
    /// The waypoint of connections to the workload's own address.
    pub waypoint: Option<Arc<Gateway>>,
    /// The gateway through which other networks reach the workload.
    pub network_gateway: Option<Arc<Gateway>>,
    /// Tunnels to other destinations that the workload accepts.
    pub application_tunnel: Option<ApplicationTunnel>,
    /// Whether the workload is selectable as an endpoint.
    pub healthy: bool,
    /// The relative capacity as an endpoint.
    pub capacity: u32,
    /// The policies that the workload references.
    pub policies: Box<[Arc<Policy>]>,
    /// The services of which the workload is an endpoint.
    pub services: Box<[NamespacedHostname]>,
    /// The name of the owner in metrics (`source_workload`): a Deployment, or the workload itself.
    pub workload_name: Name,
    /// The kind of the owner.
    pub workload_type: WorkloadType,
    /// The main service of the workload, for metrics.
    pub canonical_name: Name,
    /// The revision of the main service.
    pub canonical_revision: Name,
    /// The cluster.
    pub cluster_id: Name,
    /// The node; may be empty.
    pub node: Name,
    /// The location.
    pub locality: Arc<Locality>,
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl fmt::Display for GatewayDestination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Hostname(hostname) => hostname.fmt(f),
        }
    }
}
