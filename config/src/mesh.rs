//! The mesh: an immutable snapshot of workloads, services and policies, and the source of
//! snapshots.
//!
//! A snapshot is built, checked and replaced as a whole, so its users see a consistent state. The
//! proxy decides about routes and policies.

mod builder;
mod document;
mod names;
mod network;
mod policy;
mod reader;
mod service;
mod source;
mod workload;

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

pub use builder::{Item, MeshBuilder, Mistake, WorkloadDraft};
pub use names::{Name, NamespacedHostname, NetworkAddress, NetworkCidr};
pub use policy::{
    Condition, Connection, Match, Policy, PolicyAction, PolicyScope, PolicySet, Rules, StringMatch,
    Values,
};
pub use service::{
    Endpoint, IpFamilies, LoadBalancing, LoadBalancingMode, PortMap, Scope, Service, Visibility,
    WeightedWaypoint,
};
pub use source::{Background, MeshSource};
pub use workload::{
    ApplicationTunnel, Gateway, GatewayDestination, Locality, NetworkMode, Protocol, TunnelHeader,
    Workload, WorkloadType,
};

use crate::error::ConfigErrors;
use names::Map;
use network::{Network, select_service};

/// A destination with a name or address in the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destination<'a> {
    /// A workload.
    Workload(&'a Arc<Workload>),
    /// A service.
    Service(&'a Arc<Service>),
}

/// A snapshot of the mesh.
#[derive(Debug, Default)]
pub struct Mesh {
    networks: Map<Name, Network>,
    hostnames: Map<Name, Vec<Arc<Service>>>,
    workload_hostnames: Map<Name, Vec<Arc<Workload>>>,
    policies: Policies,
    workloads: Vec<Arc<Workload>>,
    services: Vec<Arc<Service>>,
}

/// The policies whose scope is global or a namespace.
#[derive(Debug, Default)]
struct Policies {
    global: Box<[Arc<Policy>]>,
    namespaces: Map<Name, Box<[Arc<Policy>]>>,
    /// The number of all policies, including those that workloads reference.
    count: usize,
}

impl Mesh {
    /// Reads a mesh file, which is ztunnel's `LOCAL_XDS_PATH` document, or all of them in a folder
    /// (`*.yaml`, `*.yml`, `*.json`).
    ///
    /// # Errors
    /// All mistakes in the files, or the reason why they cannot be read.
    pub fn from_file(path: &Path) -> Result<Self, ConfigErrors> {
        reader::Reader::default().read(path)
    }

    /// Reads the same document from a string; errors use `name` as its name.
    ///
    /// # Errors
    /// All mistakes in the text.
    pub fn from_text(name: &str, text: &str) -> Result<Self, ConfigErrors> {
        reader::from_text(name, text)
    }

    /// The workload with this address in `network`; `None` if several share it.
    pub fn workload(&self, network: &str, address: IpAddr) -> Option<&Arc<Workload>> {
        self.networks.get(network)?.workload(address.to_canonical())
    }

    /// Whether at least one workload has this address in `network`.
    pub fn has_workload(&self, network: &str, address: IpAddr) -> bool {
        let known = self.networks.get(network);
        known.is_some_and(|known| known.has_workload(address.to_canonical()))
    }

    /// Whether a workload with this address in `network` supports HBONE, even if several share the
    /// address.
    pub fn speaks_hbone(&self, network: &str, address: IpAddr) -> bool {
        self.networks.get(network).is_some_and(|known| known.speaks_hbone(address.to_canonical()))
    }

    /// The service that this address in `network` denotes for a workload of `namespace`.
    pub fn service(
        &self,
        network: &str,
        address: IpAddr,
        namespace: &str,
    ) -> Option<&Arc<Service>> {
        self.networks.get(network)?.service(address.to_canonical(), namespace)
    }

    /// All services with this address in `network` or a range that contains it, regardless of
    /// visibility.
    pub fn services_at(
        &self,
        network: &str,
        address: IpAddr,
    ) -> impl Iterator<Item = &Arc<Service>> {
        let known = self.networks.get(network).into_iter();
        known.flat_map(move |known| known.services_at(address.to_canonical()))
    }

    /// The service that this hostname denotes for a workload of `namespace`.
    pub fn service_by_hostname(&self, hostname: &str, namespace: &str) -> Option<&Arc<Service>> {
        select_service(self.services_named(hostname), namespace)
    }

    /// All services with this hostname, regardless of visibility.
    pub fn services_named(&self, hostname: &str) -> &[Arc<Service>] {
        self.hostnames.get(hostname).map(Vec::as_slice).unwrap_or_default()
    }

    /// The service with this name, otherwise the workload with this hostname.
    pub fn named(&self, name: &NamespacedHostname) -> Option<Destination<'_>> {
        let mut services = self.services_named(&name.hostname).iter();
        let service = services.find(|service| service.namespace == name.namespace);
        service.map(Destination::Service).or_else(|| {
            let workloads = self.workload_hostnames.get(&name.hostname)?;
            let workload = workloads.iter().find(|workload| workload.namespace == name.namespace);
            workload.map(Destination::Workload)
        })
    }

    /// The policies for a workload of `namespace`, and those that `workload` references.
    pub fn policies<'a>(
        &'a self,
        namespace: &str,
        workload: Option<&'a Workload>,
    ) -> PolicySet<'a> {
        let of_namespace = self.policies.namespaces.get(namespace);
        PolicySet {
            global: &self.policies.global,
            namespace: of_namespace.map(|policies| &**policies).unwrap_or_default(),
            workload: workload.map(|workload| &*workload.policies).unwrap_or_default(),
        }
    }

    /// All workloads.
    pub fn workloads(&self) -> &[Arc<Workload>] {
        &self.workloads
    }

    /// All services.
    pub fn services(&self) -> &[Arc<Service>] {
        &self.services
    }

    /// The number of policies.
    pub fn policy_count(&self) -> usize {
        self.policies.count
    }
}
