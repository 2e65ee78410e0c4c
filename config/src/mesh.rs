//! The mesh: an immutable snapshot of who is where, who speaks HBONE and who may talk to whom, and the source that publishes it.
//!
//! A snapshot is built whole, checked whole and swapped whole; whoever holds one sees one state of the mesh. Not here:
//! what is done with it. Routing and the decision by policies belong to the proxy.

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
pub use source::MeshSource;
pub use workload::{
    ApplicationTunnel, Gateway, GatewayDestination, Locality, NetworkMode, Protocol, TunnelHeader,
    Workload, WorkloadType,
};

use crate::ConfigErrors;
use names::Map;
use network::{Network, best};

/// What has a name or an address in the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destination<'a> {
    /// A workload.
    Workload(&'a Arc<Workload>),
    /// A service.
    Service(&'a Arc<Service>),
}

/// One state of the mesh.
#[derive(Debug, Default)]
pub struct Mesh {
    networks: Map<Name, Network>,
    hostnames: Map<Name, Vec<Arc<Service>>>,
    workload_hostnames: Map<Name, Vec<Arc<Workload>>>,
    policies: Policies,
    workloads: Vec<Arc<Workload>>,
    services: Vec<Arc<Service>>,
}

/// The policies that hold for more than the workloads which name them.
#[derive(Debug, Default)]
struct Policies {
    global: Box<[Arc<Policy>]>,
    namespaces: Map<Name, Box<[Arc<Policy>]>>,
    /// How many policies there are in all.
    count: usize,
}

impl Mesh {
    /// Reads a mesh file, ztunnel's `LOCAL_XDS_PATH` document, or every one in a folder (`*.yaml`, `*.yml`, `*.json`).
    ///
    /// # Errors
    /// Every mistake in the files, or why they could not be read.
    pub fn from_file(path: &Path) -> Result<Self, ConfigErrors> {
        reader::Reader::default().read(path)
    }

    /// Reads the same document from a text that is called `name` in errors.
    ///
    /// # Errors
    /// Every mistake in the text.
    pub fn from_text(name: &str, text: &str) -> Result<Self, ConfigErrors> {
        reader::from_text(name, text)
    }

    /// The workload that has this address in `network`; none if several share it.
    pub fn workload(&self, network: &str, address: IpAddr) -> Option<&Arc<Workload>> {
        self.networks.get(network)?.workload(address.to_canonical())
    }

    /// Whether any workload has this address in `network`, if only together with others.
    pub fn has_workload(&self, network: &str, address: IpAddr) -> bool {
        let known = self.networks.get(network);
        known.is_some_and(|known| known.has_workload(address.to_canonical()))
    }

    /// Whether a workload that has this address in `network` speaks HBONE, even if several share it.
    pub fn speaks_hbone(&self, network: &str, address: IpAddr) -> bool {
        self.networks.get(network).is_some_and(|known| known.speaks_hbone(address.to_canonical()))
    }

    /// The service that a workload of `namespace` means by this address in `network`.
    pub fn service(
        &self,
        network: &str,
        address: IpAddr,
        namespace: &str,
    ) -> Option<&Arc<Service>> {
        self.networks.get(network)?.service(address.to_canonical(), namespace)
    }

    /// Every service that has this address in `network` or a range around it, whoever can see it.
    pub fn services_at(
        &self,
        network: &str,
        address: IpAddr,
    ) -> impl Iterator<Item = &Arc<Service>> {
        let known = self.networks.get(network).into_iter();
        known.flat_map(move |known| known.services_at(address.to_canonical()))
    }

    /// The service that a workload of `namespace` means by this hostname.
    pub fn service_by_hostname(&self, hostname: &str, namespace: &str) -> Option<&Arc<Service>> {
        best(self.services_named(hostname), namespace)
    }

    /// Every service with this hostname, whoever can see it.
    pub fn services_named(&self, hostname: &str) -> &[Arc<Service>] {
        self.hostnames.get(hostname).map(Vec::as_slice).unwrap_or_default()
    }

    /// The service with this name, or else the workload with this hostname.
    pub fn named(&self, name: &NamespacedHostname) -> Option<Destination<'_>> {
        let mut services = self.services_named(&name.hostname).iter();
        let service = services.find(|service| service.namespace == name.namespace);
        service.map(Destination::Service).or_else(|| {
            let workloads = self.workload_hostnames.get(&name.hostname)?;
            let workload = workloads.iter().find(|workload| workload.namespace == name.namespace);
            workload.map(Destination::Workload)
        })
    }

    /// The policies that hold for a workload of `namespace`, which is `workload` if the mesh knows it.
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

    /// Every workload.
    pub fn workloads(&self) -> &[Arc<Workload>] {
        &self.workloads
    }

    /// Every service.
    pub fn services(&self) -> &[Arc<Service>] {
        &self.services
    }

    /// How many policies there are.
    pub fn policy_count(&self) -> usize {
        self.policies.count
    }
}
