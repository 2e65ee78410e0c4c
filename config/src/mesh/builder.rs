//! Builds a snapshot: collects items, checks their references, and indexes them.
//!
//! `document.rs` reads the items, and translates mistakes into locations.

use std::sync::Arc;

use super::Mesh;
use super::names::{Map, Name, NamespacedHostname, Set};
use super::policy::{Policy, PolicyScope};
use super::service::{Endpoint, PortMap, Service};
use super::workload::{Gateway, GatewayDestination, Workload};

/// A workload with unresolved references.
#[derive(Debug)]
pub struct WorkloadDraft {
    /// The workload, without services and policies.
    pub workload: Workload,
    /// The services of which the workload is an endpoint, each with the workload's ports.
    pub services: Vec<(NamespacedHostname, PortMap)>,
    /// The policies that the workload references, as `namespace/name`.
    pub policies: Vec<Name>,
}

/// An item by its index within its kind, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Item {
    /// A workload.
    Workload(usize),
    /// A service.
    Service(usize),
    /// A policy.
    Policy(usize),
}

/// A mistake of an item in relation to other items.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// The item.
    pub item: Item,
    /// The key of the item in the mesh file.
    pub key: &'static str,
    /// The reason.
    pub reason: String,
    /// The remedy, if the reason does not imply it.
    pub hint: Option<String>,
}

/// An unresolved workload in its final allocation.
#[derive(Debug)]
struct Draft {
    workload: Arc<Workload>,
    /// The ports for each of its services.
    ports: Box<[PortMap]>,
    policies: Box<[Name]>,
    has_uid: bool,
}

/// Collects the items of a mesh.
#[derive(Debug, Default)]
pub struct MeshBuilder {
    workloads: Vec<Draft>,
    services: Vec<Service>,
    policies: Vec<Arc<Policy>>,
}

impl MeshBuilder {
    /// Adds a workload.
    pub fn workload(&mut self, draft: WorkloadDraft) {
        let WorkloadDraft { mut workload, services, policies } = draft;
        let has_uid = !workload.uid.is_empty();
        if !has_uid {
            workload.uid = workload.to_string().into();
        }
        let (services, ports): (Vec<_>, Vec<_>) = services.into_iter().unzip();
        workload.services = services.into();
        workload.policies = Box::default();
        let (workload, ports, policies) = (Arc::new(workload), ports.into(), policies.into());
        self.workloads.push(Draft { workload, ports, policies, has_uid });
    }

    /// Adds a service. Its endpoints come from the workloads.
    pub fn service(&mut self, service: Service) {
        self.services.push(service);
    }

    /// Adds a policy.
    pub fn policy(&mut self, policy: Policy) {
        self.policies.push(Arc::new(policy));
    }

    /// Builds the mesh.
    ///
    /// # Errors
    /// All duplicate names and unresolved references.
    pub fn build(self) -> Result<Mesh, Vec<Mistake>> {
        build(&[&self])
    }

    /// Releases unused capacity.
    pub(super) fn shrink(&mut self) {
        self.workloads.shrink_to_fit();
        self.services.shrink_to_fit();
        self.policies.shrink_to_fit();
    }
}

/// Builds the mesh of all items in `parts`, which share memory with it. Mistakes index items across
/// all parts.
pub(super) fn build(parts: &[&MeshBuilder]) -> Result<Mesh, Vec<Mistake>> {
    let mut build = Build::default();
    build.policies(parts);
    let mut services = build.name_services(parts);
    build.workloads(parts, &mut services);
    build.services(services);
    build.check_gateways();
    if build.mistakes.is_empty() { Ok(build.mesh) } else { Err(build.mistakes) }
}

/// A mesh under construction.
#[derive(Default)]
struct Build<'a> {
    mesh: Mesh,
    /// The workloads and services of `mesh` in their order.
    workloads: Vec<Arc<Workload>>,
    services: Vec<Arc<Service>>,
    policies: Map<String, Arc<Policy>>,
    /// Indexes of services by namespace and hostname.
    names: Map<(&'a str, &'a str), usize>,
    uids: Set<&'a str>,
    mistakes: Vec<Mistake>,
}

impl<'a> Build<'a> {
    fn mistake(&mut self, item: Item, key: &'static str, reason: String) {
        self.mistakes.push(Mistake { item, key, reason, hint: None });
    }

    fn policies(&mut self, parts: &[&MeshBuilder]) {
        let mut global = Vec::new();
        let mut namespaces: Map<Name, Vec<Arc<Policy>>> = Map::default();
        let policies = parts.iter().flat_map(|part| &part.policies);
        for (index, policy) in policies.enumerate() {
            match policy.scope {
                PolicyScope::Global => global.push(policy.clone()),
                PolicyScope::Namespace => {
                    namespaces.entry(policy.namespace.clone()).or_default().push(policy.clone());
                }
                PolicyScope::WorkloadSelector => {}
            }
            let key = policy.to_string();
            if self.policies.insert(key, policy.clone()).is_some() {
                let reason = format!("duplicate policy {policy}");
                self.mistake(Item::Policy(index), "name", reason);
            }
        }
        self.mesh.set_policies(None, global.into());
        for (namespace, list) in namespaces {
            self.mesh.set_policies(Some(&namespace), list.into());
        }
        self.mesh.set_policy_count(self.policies.len());
    }

    fn name_services(&mut self, parts: &[&'a MeshBuilder]) -> Vec<(&'a Service, Vec<Endpoint>)> {
        let mut services = Vec::new();
        for (index, service) in parts.iter().flat_map(|part| &part.services).enumerate() {
            if self.names.insert((&service.namespace, &service.hostname), index).is_some() {
                let reason = format!("duplicate service {service}");
                self.mistake(Item::Service(index), "hostname", reason);
            }
            services.push((service, Vec::new()));
        }
        services
    }

    fn workloads(&mut self, parts: &[&'a MeshBuilder], services: &mut [(&Service, Vec<Endpoint>)]) {
        for (index, draft) in parts.iter().flat_map(|part| &part.workloads).enumerate() {
            let item = Item::Workload(index);
            self.name_workload(item, draft);
            let workload = self.with_policies(item, draft);
            self.add_endpoint(item, &workload, &draft.ports, services);
            self.check_addresses(item, &workload);
            self.workloads.push(workload.clone());
            self.mesh.add_workload(&workload);
        }
    }

    fn name_workload(&mut self, item: Item, draft: &'a Draft) {
        let uid = &draft.workload.uid;
        if !self.uids.insert(uid) {
            let (key, hint) = match draft.has_uid {
                true => ("uid", None),
                false => ("name", Some("give them different names, or each a uid".to_owned())),
            };
            let reason = format!("duplicate workload {uid}");
            self.mistakes.push(Mistake { item, key, reason, hint });
        }
    }

    /// The workload with its policies. Without policies, the draft's allocation is shared.
    fn with_policies(&mut self, item: Item, draft: &Draft) -> Arc<Workload> {
        if draft.policies.is_empty() {
            return draft.workload.clone();
        }
        let mut policies = Vec::with_capacity(draft.policies.len());
        for key in &draft.policies {
            match self.policies.get(&**key) {
                Some(policy) => policies.push(policy.clone()),
                None => {
                    self.mistake(item, "authorizationPolicies", format!("there is no policy {key}"))
                }
            }
        }
        Arc::new(Workload { policies: policies.into(), ..Workload::clone(&draft.workload) })
    }

    fn add_endpoint(
        &mut self,
        item: Item,
        workload: &Arc<Workload>,
        ports: &[PortMap],
        services: &mut [(&Service, Vec<Endpoint>)],
    ) {
        for (name, ports) in workload.services.iter().zip(ports) {
            let index = self.names.get(&(&*name.namespace, &*name.hostname));
            let Some((service, endpoints)) = index.and_then(|index| services.get_mut(*index))
            else {
                self.mistake(item, "services", format!("there is no service {name}"));
                continue;
            };
            if workload.healthy || service.load_balancing.allow_unhealthy {
                let (workload, ports) = (workload.clone(), ports.clone());
                endpoints.push(Endpoint { workload, ports, capacity_through: 0 });
            }
        }
    }

    fn check_addresses(&mut self, item: Item, workload: &Arc<Workload>) {
        let network = self.mesh.network(&workload.network);
        let earlier = |at: usize| workload.addresses.get(..at).unwrap_or_default();
        let taken = workload.addresses.iter().enumerate().filter_map(|(at, address)| {
            let repeated = earlier(at).contains(address).then_some(workload);
            let other = network.conflict(*address, workload).or(repeated)?;
            Some(format!("{address} already belongs to {other}"))
        });
        for reason in taken.collect::<Vec<_>>() {
            self.mistake(item, "workloadIps", reason);
        }
    }

    fn services(&mut self, services: Vec<(&Service, Vec<Endpoint>)>) {
        for (service, endpoints) in services {
            let service = Arc::new(service.with_endpoints(endpoints));
            self.mesh.add_service(&service);
            self.services.push(service);
        }
    }

    /// Checks that waypoints and gateways exist. Otherwise the mistake would appear only with the
    /// first connection.
    fn check_gateways(&mut self) {
        let mut mistakes = Vec::new();
        let mut check = |item, key, gateway: Option<&Gateway>| {
            if let Some(Gateway { destination, .. }) = gateway
                && !self.is_known(destination)
            {
                let reason = format!("there is no service and no workload {destination}");
                mistakes.push(Mistake { item, key, reason, hint: None });
            }
        };
        for (index, workload) in self.workloads.iter().enumerate() {
            check(Item::Workload(index), "waypoint", workload.waypoint.as_deref());
            check(Item::Workload(index), "networkGateway", workload.network_gateway.as_deref());
        }
        for (index, service) in self.services.iter().enumerate() {
            check(Item::Service(index), "waypoint", service.waypoint.as_ref());
            for weighted in &service.weighted_waypoints {
                check(Item::Service(index), "weightedWaypoints", Some(&weighted.gateway));
            }
        }
        self.mistakes.append(&mut mistakes);
    }

    fn is_known(&self, destination: &GatewayDestination) -> bool {
        match destination {
            GatewayDestination::Hostname(name) => self.mesh.named(name).is_some(),
            GatewayDestination::Address(at) => self
                .mesh
                .networks
                .get(&at.network)
                .is_some_and(|network| network.has_address(at.address)),
        }
    }
}
