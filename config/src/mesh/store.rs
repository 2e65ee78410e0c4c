//! The items of a control plane, and the snapshot of them after each change.
//!
//! Items arrive in any order, and may refer to items that arrive later or never. A change marks the
//! items that depend on it, and [`MeshStore::snapshot`] indexes each marked item once: also a
//! service with many changed endpoints.
//!
//! ```text
//! policy ── selects ──> workload ── is an endpoint of ──> service
//! ```

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::Mesh;
use super::builder::WorkloadDraft;
use super::lookup::Lookup;
use super::names::{Map, Name, NamespacedHostname, NetworkCidr, Set};
use super::policy::{Policy, PolicyScope};
use super::service::{Endpoint, PortMap, Service};
use super::shared::Shared;
use super::workload::Workload;

/// The items of a control plane.
#[derive(Debug)]
pub(crate) struct MeshStore {
    shared: Shared,
    workloads: Map<Name, WorkloadEntry>,
    services: Map<NamespacedHostname, ServiceEntry>,
    policies: Map<Name, Arc<Policy>>,
    /// The policies of each scope that is not a selector, by name.
    scopes: Map<PolicyList, BTreeMap<Name, Arc<Policy>>>,
    /// The uids of the workloads that refer to each service and each policy, known or not.
    endpoints: Map<NamespacedHostname, Set<Name>>,
    selected: Map<Name, Set<Name>>,
    /// The addresses of rejected versions by the name of the resource.
    withheld: Map<Name, Box<[NetworkCidr]>>,
    /// The items that changed since the last snapshot.
    changed: Changed,
    mesh: Mesh,
}

#[derive(Debug)]
struct WorkloadEntry {
    /// The workload without policies.
    draft: Arc<Workload>,
    /// The ports for each of its services.
    ports: Box<[PortMap]>,
    policies: Box<[Name]>,
    /// The indexed version.
    indexed: Option<Arc<Workload>>,
}

#[derive(Debug)]
struct ServiceEntry {
    /// The service without endpoints.
    draft: Service,
    /// The indexed version.
    indexed: Option<Arc<Service>>,
}

#[derive(Debug, Default)]
struct Changed {
    workloads: Set<Name>,
    services: Set<NamespacedHostname>,
    policies: Set<PolicyList>,
}

/// The policies of one namespace; `None` for those of all namespaces.
type PolicyList = Option<Name>;

impl Default for MeshStore {
    fn default() -> Self {
        let mut mesh = Mesh::default();
        mesh.deny_unknown_workloads();
        Self {
            shared: Shared::default(),
            workloads: Map::default(),
            services: Map::default(),
            policies: Map::default(),
            scopes: Map::default(),
            endpoints: Map::default(),
            selected: Map::default(),
            withheld: Map::default(),
            changed: Changed::default(),
            mesh,
        }
    }
}

impl MeshStore {
    /// Interns values of new items.
    pub(crate) fn shared(&mut self) -> &mut Shared {
        &mut self.shared
    }

    /// The workload with this uid, without policies.
    pub(crate) fn workload(&self, uid: &str) -> Option<&Workload> {
        self.workloads.get(uid).map(|entry| &*entry.draft)
    }

    /// Whether there is a policy with this name (`namespace/name`).
    pub(crate) fn has_policy(&self, key: &str) -> bool {
        self.policies.contains_key(key)
    }

    /// The addresses of the workload or service with this name, as names of lookups; with those
    /// that are withheld for a rejected version.
    pub(crate) fn aliases(&self, resource: &str) -> Vec<Lookup> {
        let workload = self.workload(resource).into_iter().flat_map(addresses_of_workload);
        let service = self.service(resource).into_iter().flat_map(vips_of);
        workload.chain(service).chain(self.withheld_for(resource)).collect()
    }

    /// The withheld addresses of a resource, without its ranges.
    fn withheld_for(&self, resource: &str) -> impl Iterator<Item = Lookup> {
        let withheld = self.withheld.get(resource).into_iter().flatten();
        let addresses = withheld.filter(|one| one.cidr.prefix_len() == one.cidr.max_prefix_len());
        addresses.map(|one| Lookup::address(&one.network, one.cidr.addr()))
    }

    /// The service with this name (`namespace/hostname`), without endpoints.
    fn service(&self, name: &str) -> Option<&Service> {
        let key = name.parse::<NamespacedHostname>().ok()?;
        self.services.get(&key).map(|entry| &entry.draft)
    }

    /// The addresses and ranges of the accepted version of a resource.
    fn accepted_ranges(&self, resource: &str) -> Vec<NetworkCidr> {
        let at = |network: &Name, address: IpAddr| NetworkCidr {
            network: network.clone(),
            cidr: address.into(),
        };
        if let Some(workload) = self.workload(resource) {
            let addresses = workload.addresses.iter();
            return addresses.map(|address| at(&workload.network, *address)).collect();
        }
        let Some(service) = self.service(resource) else { return Vec::new() };
        let vips = service.vips.iter().map(|vip| at(&vip.network, vip.address));
        vips.chain(service.cidr_vips.iter().cloned()).collect()
    }

    /// The names of the workloads and services that no lookup needs: no name of theirs `is_asked`,
    /// and they are neither local nor an endpoint of a needed service.
    pub(crate) fn unneeded(
        &self,
        is_asked: impl Fn(&str) -> bool,
        is_local: impl Fn(&Workload) -> bool,
    ) -> Vec<Name> {
        let needed = self.services.iter().filter(|(key, entry)| {
            let name = key.to_string();
            let mut vips = vips_of(&entry.draft).chain(self.withheld_for(&name));
            is_asked(&name) || vips.any(|vip| is_asked(vip.as_str()))
        });
        let needed: Set<_> = needed.map(|(key, _)| key).collect();
        let workloads = self.workloads.iter().filter(|(uid, WorkloadEntry { draft, .. })| {
            !is_asked(uid)
                && !is_local(draft)
                && !draft.services.iter().any(|service| needed.contains(service))
                && !addresses_of_workload(draft)
                    .chain(self.withheld_for(uid))
                    .any(|address| is_asked(address.as_str()))
        });
        let services = self.services.keys().filter(|key| !needed.contains(key));
        let names = workloads.map(|(uid, _)| uid.clone());
        names.chain(services.map(|key| key.to_string().into())).collect()
    }

    /// Adds or replaces the workload with its uid.
    pub(crate) fn set_workload(&mut self, draft: WorkloadDraft) {
        let WorkloadDraft { mut workload, services, policies } = draft;
        let uid = workload.uid.clone();
        self.release(&uid);
        let indexed = self.unlink(&uid);
        let (services, ports): (Vec<_>, Vec<_>) = services.into_iter().unzip();
        for service in &services {
            self.endpoints.entry(service.clone()).or_default().insert(uid.clone());
        }
        for policy in &policies {
            self.selected.entry(policy.clone()).or_default().insert(uid.clone());
        }
        self.changed.services.extend(services.iter().cloned());
        workload.services = services.into();
        let (draft, ports, policies) = (Arc::new(workload), ports.into(), policies.into());
        self.workloads.insert(uid.clone(), WorkloadEntry { draft, ports, policies, indexed });
        self.changed.workloads.insert(uid);
    }

    /// Removes a workload. Returns false if there is none with this uid.
    pub(crate) fn remove_workload(&mut self, uid: &str) -> bool {
        self.release(uid);
        let is_known = self.workloads.contains_key(uid);
        if let Some(indexed) = self.unlink(uid) {
            self.mesh.remove_workload(&indexed);
        }
        self.changed.workloads.remove(uid);
        is_known
    }

    /// Removes the entry of a workload and the references from it. Returns its indexed version.
    fn unlink(&mut self, uid: &str) -> Option<Arc<Workload>> {
        let WorkloadEntry { draft, policies, indexed, .. } = self.workloads.remove(uid)?;
        for service in &draft.services {
            remove_reference(&mut self.endpoints, service, uid);
        }
        for policy in &policies {
            remove_reference(&mut self.selected, policy, uid);
        }
        self.changed.services.extend(draft.services.iter().cloned());
        indexed
    }

    /// Adds or replaces the service with its name.
    pub(crate) fn set_service(&mut self, draft: Service) {
        let key = draft.key();
        self.release(&key.to_string());
        let indexed = self.services.remove(&key).and_then(|entry| entry.indexed);
        self.services.insert(key.clone(), ServiceEntry { draft, indexed });
        self.changed.services.insert(key);
    }

    /// Removes a service. Returns false if there is none with this name.
    pub(crate) fn remove_service(&mut self, key: &NamespacedHostname) -> bool {
        self.release(&key.to_string());
        let Some(entry) = self.services.remove(key) else { return false };
        if let Some(indexed) = entry.indexed {
            self.mesh.remove_service(&indexed);
        }
        true
    }

    /// Adds or replaces the policy with the name `key` (`namespace/name`).
    pub(crate) fn set_policy(&mut self, key: Name, policy: Policy) {
        self.remove_policy(&key);
        let policy = Arc::new(policy);
        if let Some(list) = policy_list(&policy) {
            self.scopes.entry(list.clone()).or_default().insert(key.clone(), policy.clone());
            self.changed.policies.insert(list);
        }
        self.policies.insert(key, policy);
    }

    /// Removes a policy. Returns false if there is none with this name.
    pub(crate) fn remove_policy(&mut self, key: &str) -> bool {
        if let Some(selected) = self.selected.get(key) {
            self.changed.workloads.extend(selected.iter().cloned());
        }
        let Some(policy) = self.policies.remove(key) else { return false };
        if let Some(list) = policy_list(&policy) {
            if let Some(policies) = self.scopes.get_mut(&list) {
                policies.remove(key);
                if policies.is_empty() {
                    self.scopes.remove(&list);
                }
            }
            self.changed.policies.insert(list);
        }
        true
    }

    /// Refuses plaintext to the addresses of a rejected version of a resource, because it may have
    /// announced HBONE. Those of the accepted version stay as they are.
    pub(crate) fn withhold(&mut self, resource: Name, mut addresses: Vec<NetworkCidr>) {
        self.release(&resource);
        let accepted = self.accepted_ranges(&resource);
        addresses.retain(|one| !accepted.contains(one));
        if !addresses.is_empty() {
            self.mesh.withhold(&addresses, true);
            self.withheld.insert(resource, addresses.into());
        }
    }

    /// Ends what [`withhold`](Self::withhold) began.
    pub(crate) fn release(&mut self, resource: &str) {
        if let Some(addresses) = self.withheld.remove(resource) {
            self.mesh.withhold(&addresses, false);
        }
    }

    /// The mesh after all changes.
    pub(crate) fn snapshot(&mut self) -> Mesh {
        self.index();
        let mesh = self.mesh.clone();
        self.mesh.lineage = mesh.lineage.next();
        mesh
    }

    /// Indexes all changes, which takes most of the time of a snapshot.
    pub(crate) fn index(&mut self) {
        let Changed { workloads, services, policies } = std::mem::take(&mut self.changed);
        for list in policies {
            self.index_policies(&list);
        }
        self.mesh.set_policy_count(self.policies.len());
        let mut services = services;
        for uid in workloads {
            self.index_workload(&uid, &mut services);
        }
        for key in services {
            self.index_service(&key);
        }
    }

    /// Drops interned values that no item uses any longer.
    pub(crate) fn drop_unused(&mut self) {
        self.shared.drop_unused();
    }

    fn index_policies(&mut self, list: &PolicyList) {
        let policies = self.scopes.get(list).into_iter().flat_map(BTreeMap::values).cloned();
        self.mesh.set_policies(list.as_ref(), policies.collect());
    }

    fn index_workload(&mut self, uid: &Name, changed: &mut Set<NamespacedHostname>) {
        let Self { workloads, policies, mesh, .. } = self;
        let Some(entry) = workloads.get_mut(uid) else { return };
        let selecting = entry.policies.iter().map(|key| match policies.get(key) {
            Some(policy) => policy.clone(),
            None => substitute_for_missing(key),
        });
        let workload = match &*entry.policies {
            [] => entry.draft.clone(),
            _ => Arc::new(Workload { policies: selecting.collect(), ..(*entry.draft).clone() }),
        };
        if let Some(before) = entry.indexed.replace(workload.clone()) {
            mesh.remove_workload(&before);
        }
        mesh.add_workload(&workload);
        changed.extend(workload.services.iter().cloned());
    }

    fn index_service(&mut self, key: &NamespacedHostname) {
        let endpoints = self.endpoints_of(key);
        let Some(entry) = self.services.get_mut(key) else { return };
        let accepts = |endpoint: &Endpoint| {
            endpoint.workload.healthy || entry.draft.load_balancing.allow_unhealthy
        };
        let endpoints = endpoints.into_iter().filter(accepts).collect();
        let service = Arc::new(entry.draft.with_endpoints(endpoints));
        if let Some(before) = entry.indexed.replace(service.clone()) {
            self.mesh.remove_service(&before);
        }
        self.mesh.add_service(&service);
    }

    fn endpoints_of(&self, key: &NamespacedHostname) -> Vec<Endpoint> {
        let uids = self.endpoints.get(key).into_iter().flatten();
        let endpoint = |uid: &Name| {
            let WorkloadEntry { ports, indexed, .. } = self.workloads.get(uid)?;
            let workload = indexed.clone()?;
            let at = workload.services.iter().position(|service| service == key)?;
            let ports = ports.get(at)?.clone();
            Some(Endpoint { workload, ports, capacity_through: 0 })
        };
        uids.filter_map(endpoint).collect()
    }
}

fn addresses_of_workload(workload: &Workload) -> impl Iterator<Item = Lookup> {
    workload.addresses.iter().map(|address| Lookup::address(&workload.network, *address))
}

fn vips_of(service: &Service) -> impl Iterator<Item = Lookup> {
    service.vips.iter().map(|vip| Lookup::address(&vip.network, vip.address))
}

/// The list that a policy is in: that of its namespace, or of all namespaces. `None` if workloads
/// refer to it.
fn policy_list(policy: &Policy) -> Option<PolicyList> {
    match policy.scope {
        PolicyScope::Global => Some(None),
        PolicyScope::Namespace => Some(Some(policy.namespace.clone())),
        PolicyScope::WorkloadSelector => None,
    }
}

/// A substitute for a policy that a workload refers to and that is unknown.
fn substitute_for_missing(key: &str) -> Arc<Policy> {
    let (namespace, name) = key.split_once('/').unwrap_or(("", key));
    let name = format!("{name} (missing)");
    Arc::new(Policy::denying(namespace.into(), &name, PolicyScope::WorkloadSelector))
}

fn remove_reference<K: std::hash::Hash + Eq>(
    references: &mut Map<K, Set<Name>>,
    key: &K,
    uid: &str,
) {
    if let Some(uids) = references.get_mut(key) {
        uids.remove(uid);
        if uids.is_empty() {
            references.remove(key);
        }
    }
}
