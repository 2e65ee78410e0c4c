//! Building a snapshot: everything is added, then checked against everything else, then indexed.
//!
//! Not here: where things come from (`document.rs`). Whoever adds them tells where a mistake was written.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::names::{Name, NamespacedHostname};
use super::network::Network;
use super::policy::{Policy, PolicyScope};
use super::service::{Endpoint, PortMap, Service};
use super::workload::{Gateway, GatewayDestination, Workload};
use super::{Mesh, Policies};

/// A workload whose references are still names.
#[derive(Debug)]
pub struct WorkloadDraft {
    /// The workload, of no service and no policy yet.
    pub workload: Workload,
    /// The services that it is an endpoint of, and where it serves their ports.
    pub services: Vec<(NamespacedHostname, PortMap)>,
    /// The policies that select it, as `namespace/name`.
    pub policies: Vec<Name>,
}

/// What was added, counted from 0 within its kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Item {
    /// A workload.
    Workload(usize),
    /// A service.
    Service(usize),
    /// A policy.
    Policy(usize),
}

/// What is wrong with one item in the light of the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// Which item.
    pub item: Item,
    /// The key of the item, in the mesh file's words.
    pub key: &'static str,
    /// Why it cannot be, and what would be right.
    pub reason: String,
}

/// A draft where its workload is going to stay.
#[derive(Debug)]
struct Draft {
    workload: Arc<Workload>,
    services: Vec<(NamespacedHostname, PortMap)>,
    policies: Vec<Name>,
}

/// Collects the parts of a mesh.
#[derive(Debug, Default)]
pub struct MeshBuilder {
    workloads: Vec<Draft>,
    services: Vec<Service>,
    policies: Vec<Policy>,
}

impl MeshBuilder {
    /// Adds a workload.
    pub fn workload(&mut self, draft: WorkloadDraft) {
        let WorkloadDraft { workload, services, policies } = draft;
        self.workloads.push(Draft { workload: Arc::new(workload), services, policies });
    }

    /// Adds a service; its endpoints come from the workloads.
    pub fn service(&mut self, service: Service) {
        self.services.push(service);
    }

    /// Adds a policy.
    pub fn policy(&mut self, policy: Policy) {
        self.policies.push(policy);
    }

    /// The mesh of all that was added.
    ///
    /// # Errors
    /// Every name that is given twice or leads to nothing.
    pub fn build(self) -> Result<Mesh, Vec<Mistake>> {
        let mut build = Build::default();
        build.policies(self.policies);
        let mut services = build.name_services(self.services);
        build.workloads(self.workloads, &mut services);
        build.services(services);
        build.check_gateways();
        if build.mistakes.is_empty() { Ok(build.mesh) } else { Err(build.mistakes) }
    }
}

/// A mesh that is being built.
#[derive(Default)]
struct Build {
    mesh: Mesh,
    policies: HashMap<String, Arc<Policy>>,
    names: HashMap<NamespacedHostname, usize>,
    uids: HashSet<Name>,
    mistakes: Vec<Mistake>,
}

impl Build {
    fn mistake(&mut self, item: Item, key: &'static str, reason: String) {
        self.mistakes.push(Mistake { item, key, reason });
    }

    fn policies(&mut self, policies: Vec<Policy>) {
        let mut global = Vec::new();
        let mut namespaces: HashMap<Name, Vec<Arc<Policy>>> = HashMap::new();
        for (index, policy) in policies.into_iter().enumerate() {
            let policy = Arc::new(policy);
            match policy.scope {
                PolicyScope::Global => global.push(policy.clone()),
                PolicyScope::Namespace => {
                    namespaces.entry(policy.namespace.clone()).or_default().push(policy.clone());
                }
                PolicyScope::WorkloadSelector => {}
            }
            let key = policy.to_string();
            if self.policies.insert(key, policy.clone()).is_some() {
                let reason = format!("there is another policy {policy}");
                self.mistake(Item::Policy(index), "name", reason);
            }
        }
        let namespaces = namespaces.into_iter().map(|(name, list)| (name, list.into())).collect();
        let count = self.policies.len();
        self.mesh.policies = Policies { global: global.into(), namespaces, count };
    }

    fn name_services(&mut self, services: Vec<Service>) -> Vec<(Service, Vec<Endpoint>)> {
        for (index, service) in services.iter().enumerate() {
            if self.names.insert(service.key(), index).is_some() {
                let reason = format!("there is another service {service}");
                self.mistake(Item::Service(index), "hostname", reason);
            }
        }
        services.into_iter().map(|service| (service, Vec::new())).collect()
    }

    fn workloads(&mut self, drafts: Vec<Draft>, services: &mut [(Service, Vec<Endpoint>)]) {
        self.mesh.workloads.reserve_exact(drafts.len());
        for (index, draft) in drafts.into_iter().enumerate() {
            let item = Item::Workload(index);
            let Draft { workload: mut shared, services: endpoint_of, policies } = draft;
            // Nobody else has it yet, so that nothing is copied.
            let workload = Arc::make_mut(&mut shared);
            self.name_workload(item, workload);
            workload.policies = self.selected_by(item, policies);
            workload.services = endpoint_of.iter().map(|(name, _)| name.clone()).collect();
            self.endpoint(item, &shared, endpoint_of, services);
            self.index_workload(item, &shared);
            self.mesh.workloads.push(shared);
        }
    }

    fn name_workload(&mut self, item: Item, workload: &mut Workload) {
        let (key, advice) = if workload.uid.is_empty() {
            workload.uid = workload.to_string().into();
            ("name", ": give them different names, or each a uid")
        } else {
            ("uid", "")
        };
        if !self.uids.insert(workload.uid.clone()) {
            let reason = format!("there is another workload {}{advice}", workload.uid);
            self.mistake(item, key, reason);
        }
    }

    fn selected_by(&mut self, item: Item, policies: Vec<Name>) -> Box<[Arc<Policy>]> {
        let mut found = Vec::with_capacity(policies.len());
        for key in policies {
            match self.policies.get(&*key) {
                Some(policy) => found.push(policy.clone()),
                None => {
                    self.mistake(item, "authorizationPolicies", format!("there is no policy {key}"))
                }
            }
        }
        found.into()
    }

    fn endpoint(
        &mut self,
        item: Item,
        workload: &Arc<Workload>,
        endpoint_of: Vec<(NamespacedHostname, PortMap)>,
        services: &mut [(Service, Vec<Endpoint>)],
    ) {
        for (name, ports) in endpoint_of {
            let service = self.names.get(&name).and_then(|index| services.get_mut(*index));
            let Some((service, endpoints)) = service else {
                self.mistake(item, "services", format!("there is no service {name}"));
                continue;
            };
            if workload.healthy || service.load_balancing.allow_unhealthy {
                endpoints.push(Endpoint { workload: workload.clone(), ports, capacity_through: 0 });
            }
        }
    }

    fn index_workload(&mut self, item: Item, workload: &Arc<Workload>) {
        let network = self.network(&workload.network);
        let taken: Vec<_> = workload
            .addresses
            .iter()
            .filter_map(|address| Some((*address, network.add_workload(*address, workload).err()?)))
            .collect();
        for (address, other) in taken {
            let reason = format!("{address} already belongs to {other}");
            self.mistake(item, "workloadIps", reason);
        }
        if !workload.hostname.is_empty() {
            let named = self.mesh.workload_hostnames.entry(workload.hostname.clone());
            named.or_default().push(workload.clone());
        }
    }

    fn network(&mut self, name: &Name) -> &mut Network {
        self.mesh.networks.entry(name.clone()).or_default()
    }

    fn services(&mut self, services: Vec<(Service, Vec<Endpoint>)>) {
        for (mut service, mut endpoints) in services {
            endpoints.sort_by(|one, other| service.order(&one.workload, &other.workload));
            let mut capacity = 0;
            for endpoint in &mut endpoints {
                capacity += u64::from(endpoint.workload.capacity);
                endpoint.capacity_through = capacity;
            }
            service.endpoints = endpoints.into();
            let service = Arc::new(service);
            for vip in &service.vips {
                self.network(&vip.network).add_vip(vip.address, &service);
            }
            for vip in &service.cidr_vips {
                self.network(&vip.network).add_cidr_vip(vip.cidr, &service);
            }
            let named = self.mesh.hostnames.entry(service.hostname.clone());
            named.or_default().push(service.clone());
            self.mesh.services.push(service);
        }
    }

    /// A waypoint or gateway that is not there would be found out only when somebody is in need of it.
    fn check_gateways(&mut self) {
        let mut mistakes = Vec::new();
        let mut check = |item, key, gateway: Option<&Gateway>| {
            if let Some(Gateway { destination, .. }) = gateway
                && !self.is_known(destination)
            {
                let reason = format!("there is no service and no workload {destination}");
                mistakes.push(Mistake { item, key, reason });
            }
        };
        for (index, workload) in self.mesh.workloads.iter().enumerate() {
            check(Item::Workload(index), "waypoint", workload.waypoint.as_deref());
            check(Item::Workload(index), "networkGateway", workload.network_gateway.as_deref());
        }
        for (index, service) in self.mesh.services.iter().enumerate() {
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
            GatewayDestination::Address(at) => {
                self.mesh.networks.get(&at.network).is_some_and(|network| network.knows(at.address))
            }
        }
    }
}
