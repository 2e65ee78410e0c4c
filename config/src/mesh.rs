//! The mesh: an immutable snapshot of workloads, services and policies, and the source of
//! snapshots.
//!
//! A snapshot never changes, so its users see a consistent state. The next one shares all unchanged
//! parts with it. The proxy decides about routes and policies.
//!
//! ```text
//! mesh file ─▶ document.rs ─▶ builder.rs ┐
//!                                        ├─▶ index.rs ─▶ Mesh
//! control plane ─▶ xds/ ────▶ store.rs ──┘
//! ```

mod builder;
mod document;
mod index;
mod lineage;
mod list;
pub(crate) mod lookup;
pub(crate) mod names;
mod network;
mod policy;
mod ranges;
mod reader;
mod references;
mod service;
pub(crate) mod shared;
mod source;
pub(crate) mod store;
mod workload;

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

pub use builder::{Item, MeshBuilder, Mistake, WorkloadDraft};
pub use lookup::Lookup;
pub use names::{Name, NamespacedHostname, NetworkAddress, NetworkCidr};
pub use policy::{
    Condition, Connection, Match, Policy, PolicyAction, PolicyLayers, PolicyScope, PolicySet,
    Rules, StringMatch, Values,
};
pub use service::{
    Endpoint, IpFamilies, LoadBalancing, LoadBalancingMode, PortMap, Scope, Service, Visibility,
    WeightedWaypoint,
};
pub use source::{Background, MeshSource, retire_mesh};
pub use workload::{
    ApplicationTunnel, Gateway, GatewayDestination, Locality, NetworkMode, Protocol, TunnelHeader,
    Workload, WorkloadType,
};

use crate::error::ConfigErrors;
use lineage::Lineage;
use list::{Items, List, SharedMap, items};
use lookup::Answered;
use names::{NamespacedName, Set};
use network::{Network, select_service};

/// A destination with a name or address in the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destination<'a> {
    /// A workload.
    Workload(&'a Arc<Workload>),
    /// A service.
    Service(&'a Arc<Service>),
}

/// A snapshot of the mesh. A clone takes constant time.
#[derive(Debug, Clone, Default)]
pub struct Mesh {
    networks: SharedMap<Name, Network>,
    hostnames: SharedMap<Name, Items<Service>>,
    workload_hostnames: SharedMap<Name, Items<Workload>>,
    names: SharedMap<NamespacedName, Items<Workload>>,
    policies: Policies,
    size: MeshSize,
    /// The mesh of a file beside a control plane, for addresses and names that the control plane
    /// does not know.
    fallback: Option<Arc<Self>>,
    /// The difference from the previous snapshot of the control plane.
    lineage: Lineage,
    /// The lookups that the control plane has answered; `None` if the mesh is complete.
    answered: Option<Answered>,
}

/// The policies whose scope is global or a namespace.
#[derive(Debug, Clone, Default)]
struct Policies {
    global: List<Policy>,
    namespaces: SharedMap<Name, List<Policy>>,
    /// The policies for a workload that the mesh does not contain. With a control plane: one policy
    /// that denies every connection, because the control plane may have policies that select the
    /// workload.
    unknown: List<Policy>,
}

/// The numbers of items in a mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MeshSize {
    /// The number of workloads.
    pub workloads: usize,
    /// The number of services.
    pub services: usize,
    /// The number of policies.
    pub policies: usize,
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

    /// This mesh, with `fallback` for every address and name that it does not know. The policies of
    /// both must allow a connection.
    #[must_use]
    pub fn with_fallback(&self, fallback: Option<Arc<Self>>) -> Self {
        Self { fallback, ..self.clone() }
    }

    /// The addresses at which this mesh may differ from `old`, the one before it; `None` for any
    /// address. Policies may differ too.
    pub fn touched_since(
        &self,
        old: &Self,
    ) -> Option<impl Iterator<Item = &NetworkAddress> + use<'_>> {
        let fallbacks = [&self.fallback, &old.fallback].map(|mesh| mesh.as_ref().map(Arc::as_ptr));
        let [new, old_fallback] = fallbacks;
        let touched = self.lineage.touched_since(&old.lineage).filter(|_| new == old_fallback);
        touched.map(|addresses| addresses.iter())
    }

    pub(crate) fn with_answered(self, answered: Option<Answered>) -> Self {
        Self { answered, ..self }
    }

    /// The workload with this address in `network`; `None` if several share it.
    pub fn workload(&self, network: &str, address: IpAddr) -> Option<&Arc<Workload>> {
        let address = address.to_canonical();
        self.network_at(network, address)?.workload(address)
    }

    /// Whether at least one workload has this address in `network`.
    pub fn has_workload(&self, network: &str, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.network_at(network, address).is_some_and(|known| known.has_workload(address))
    }

    /// Whether a workload with this address in `network` supports HBONE. Also true if the control
    /// plane's item for the address was rejected.
    pub fn speaks_hbone(&self, network: &str, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.network_at(network, address).is_some_and(|known| known.speaks_hbone(address))
    }

    /// The service that this address in `network` denotes for a workload of `namespace`.
    pub fn service(
        &self,
        network: &str,
        address: IpAddr,
        namespace: &str,
    ) -> Option<&Arc<Service>> {
        let address = address.to_canonical();
        self.network_at(network, address)?.service(address, namespace)
    }

    /// All services with this address in `network` or a range that contains it, regardless of
    /// visibility.
    pub fn services_at(
        &self,
        network: &str,
        address: IpAddr,
    ) -> impl Iterator<Item = &Arc<Service>> {
        let address = address.to_canonical();
        let known = self.network_at(network, address).into_iter();
        known.flat_map(move |known| known.services_at(address))
    }

    /// The network with this address: that of this mesh, otherwise that of the fallback.
    fn network_at(&self, network: &str, address: IpAddr) -> Option<&Network> {
        let own = self.networks.get(network);
        let Some(fallback) = &self.fallback else { return own };
        own.filter(|own| own.knows(address)).or_else(|| fallback.network_at(network, address))
    }

    /// The service that this hostname denotes for a workload of `namespace`.
    pub fn service_by_hostname(&self, hostname: &str, namespace: &str) -> Option<&Arc<Service>> {
        self.service_named(hostname, namespace, |_| true)
    }

    /// The accepted service that this hostname denotes for a workload of `namespace`.
    pub fn service_named(
        &self,
        hostname: &str,
        namespace: &str,
        accept: impl Fn(&Service) -> bool,
    ) -> Option<&Arc<Service>> {
        select_service(self.services_named(hostname), namespace, accept)
    }

    /// All services with this hostname, regardless of visibility.
    pub fn services_named(&self, hostname: &str) -> &[Arc<Service>] {
        match (items(&self.hostnames, hostname), &self.fallback) {
            ([], Some(fallback)) => fallback.services_named(hostname),
            (known, _) => known,
        }
    }

    /// All workloads with this name.
    pub fn workloads_named(&self, namespace: &str, name: &str) -> &[Arc<Workload>] {
        match (items(&self.names, &(namespace, name)), &self.fallback) {
            ([], Some(fallback)) => fallback.workloads_named(namespace, name),
            (known, _) => known,
        }
    }

    /// The service with this name, otherwise the workload with this hostname.
    pub fn named(&self, name: &NamespacedHostname) -> Option<Destination<'_>> {
        let mut services = items(&self.hostnames, &name.hostname).iter();
        let service = services.find(|service| service.namespace == name.namespace);
        let known = service.map(Destination::Service).or_else(|| {
            let mut workloads = items(&self.workload_hostnames, &name.hostname).iter();
            let workload = workloads.find(|workload| workload.namespace == name.namespace);
            workload.map(Destination::Workload)
        });
        known.or_else(|| self.fallback.as_ref()?.named(name))
    }

    /// The policies for a workload of `namespace`, and those that `workload` references. A mesh of
    /// a control plane denies every connection to a workload that it does not have.
    pub fn policies<'a>(
        &'a self,
        namespace: &str,
        workload: Option<&'a Workload>,
    ) -> PolicyLayers<'a> {
        let selecting = workload.map(|workload| &*workload.policies);
        let Some(fallback) = &self.fallback else {
            return PolicyLayers([self.policies.of(namespace, selecting), PolicySet::default()]);
        };
        let is_own = workload.is_some_and(|workload| self.contains(workload));
        let (selecting, of_fallback) = if is_own { (selecting, None) } else { (None, selecting) };
        PolicyLayers([
            self.policies.of(namespace, selecting),
            fallback.policies.of(namespace, of_fallback),
        ])
    }

    /// Whether the policies that select `workload` are known. They are not if the control plane has
    /// not sent the workload yet.
    pub fn has_policies_of(&self, workload: Option<&Workload>) -> bool {
        self.policies.unknown.is_empty() || workload.is_some_and(|one| self.contains(one))
    }

    /// Whether `workload` itself is in this mesh, and not in its fallback.
    fn contains(&self, workload: &Workload) -> bool {
        let same_name = items(&self.names, &(&*workload.namespace, &*workload.name));
        same_name.iter().any(|one| std::ptr::eq(&**one, workload))
    }

    /// All workloads by uid, without those of the fallback.
    pub fn workloads(&self) -> Vec<&Arc<Workload>> {
        let mut all: Vec<_> = self.names.values().flat_map(Items::as_slice).collect();
        all.sort_by(|one, other| one.uid.cmp(&other.uid));
        all
    }

    /// All services by namespace and hostname, without those of the fallback.
    pub fn services(&self) -> Vec<&Arc<Service>> {
        let mut all: Vec<_> = self.hostnames.values().flat_map(Items::as_slice).collect();
        all.sort_by_key(|service| (&service.namespace, &service.hostname));
        all
    }

    /// All policies by namespace and name, without those of the fallback: those with global or
    /// namespace scope, and those that workloads reference.
    pub fn all_policies(&self) -> Vec<&Arc<Policy>> {
        let namespaces = self.policies.namespaces.values().flat_map(|list| list.iter());
        let workloads = self.names.values().flat_map(Items::as_slice);
        let selecting = workloads.flat_map(|workload| &workload.policies);
        let mut seen = Set::default();
        let referenced = self.policies.global.iter().chain(namespaces).chain(selecting);
        let mut all: Vec<_> =
            referenced.filter(|policy| seen.insert(Arc::as_ptr(policy))).collect();
        all.sort_by_key(|policy| (&policy.namespace, &policy.name));
        all
    }

    /// The mesh of a file beside a control plane.
    pub fn fallback(&self) -> Option<&Arc<Self>> {
        self.fallback.as_ref()
    }

    /// The numbers of items, without those of the fallback.
    pub fn size(&self) -> MeshSize {
        self.size
    }
}

impl Policies {
    fn of<'a>(&'a self, namespace: &str, workload: Option<&'a [Arc<Policy>]>) -> PolicySet<'a> {
        let namespace = self.namespaces.get(namespace).map(|list| &**list).unwrap_or_default();
        PolicySet { global: &self.global, namespace, workload: workload.unwrap_or(&self.unknown) }
    }
}
