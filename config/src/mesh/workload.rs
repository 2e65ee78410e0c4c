//! Workloads: pods, VMs and processes with an address and an identity.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::names::{Name, NamespacedHostname, NetworkAddress};
use super::policy::Policy;
use crate::SpiffeId;

/// How a workload is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// By plain TCP.
    Tcp,
    /// Through a tunnel, and never otherwise.
    Hbone,
}

/// What kind of thing a workload is part of: Istio's four.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WorkloadType {
    /// A Deployment, or what is scaled like one.
    Deployment,
    /// A CronJob.
    CronJob,
    /// Nothing larger: a pod, or a process, by itself.
    Pod,
    /// A Job.
    Job,
}

impl WorkloadType {
    /// Every type.
    pub const ALL: [Self; 4] = [Self::Deployment, Self::CronJob, Self::Pod, Self::Job];

    /// As the mesh file and `baggage` call it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deployment => "deployment",
            Self::CronJob => "cronjob",
            Self::Pod => "pod",
            Self::Job => "job",
        }
    }
}

/// Whether a workload has its addresses to itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NetworkMode {
    /// It has.
    Standard,
    /// It shares those of its node with others, so that an address alone does not tell who is meant.
    HostNetwork,
}

/// Where in the world a workload runs. Empty: unknown.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Locality {
    /// A cloud's region.
    pub region: Name,
    /// A zone in that region.
    pub zone: Name,
    /// A part of that zone, such as a rack.
    pub subzone: Name,
}

/// What a gateway, or a waypoint, is known by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum GatewayDestination {
    /// The address of a workload or a service.
    Address(NetworkAddress),
    /// The hostname of a service or a workload.
    Hostname(NamespacedHostname),
}

/// A proxy through which others are reached: a waypoint, or the gateway of another network.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Gateway {
    /// Who it is.
    pub destination: GatewayDestination,
    /// The port that it accepts tunnels at.
    pub hbone_port: u16,
}

/// What a workload is told of a connection that comes out of a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TunnelHeader {
    /// Nothing.
    None,
    /// Both addresses and the client's identity, in a PROXY protocol header (version 2).
    Proxy,
}

/// A workload that does more with a tunnel than its own traffic, such as a waypoint: it takes connections to any destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ApplicationTunnel {
    /// What a connection begins with.
    pub header: TunnelHeader,
    /// The port that takes them; `None`: the one that the tunnel asks for.
    pub port: Option<u16>,
}

/// One workload: a pod, a VM, a process with an address and an identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// Unique in the mesh; made of its namespace and name if the source gives none.
    pub uid: Name,
    /// Its name.
    pub name: Name,
    /// Its namespace.
    pub namespace: Name,
    /// The service account that its identity is made of.
    pub service_account: Name,
    /// Who it must prove to be.
    pub identity: SpiffeId,
    /// The network in which its addresses mean something.
    pub network: Name,
    /// Where it is. Without an address it has a hostname, or is behind a gateway.
    pub addresses: Box<[IpAddr]>,
    /// Where it is, in DNS; empty unless it has no address.
    pub hostname: Name,
    /// Whether it has its addresses to itself.
    pub network_mode: NetworkMode,
    /// How it is reached.
    pub protocol: Protocol,
    /// The waypoint that connections to its own address go through.
    pub waypoint: Option<Arc<Gateway>>,
    /// The gateway through which it is reached from another network.
    pub network_gateway: Option<Arc<Gateway>>,
    /// What it takes out of tunnels beside its own traffic.
    pub application_tunnel: Option<ApplicationTunnel>,
    /// Whether it is fit to take connections.
    pub healthy: bool,
    /// How much it takes, compared with the other endpoints of a service.
    pub capacity: u32,
    /// The policies that select it.
    pub policies: Box<[Arc<Policy>]>,
    /// The services that it is an endpoint of.
    pub services: Box<[NamespacedHostname]>,
    /// What it is part of, as metrics call it (`source_workload`): a Deployment's name, or its own.
    pub workload_name: Name,
    /// What kind of thing that is.
    pub workload_type: WorkloadType,
    /// The service that it mainly is, as metrics call it.
    pub canonical_name: Name,
    /// The revision of that service.
    pub canonical_revision: Name,
    /// The cluster that it is in.
    pub cluster_id: Name,
    /// The node that it runs on; may be empty.
    pub node: Name,
    /// Where it runs.
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
