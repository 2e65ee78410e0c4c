//! Adds items to the indexes of a mesh, and removes them.
//!
//! An item is indexed as a whole under each of its addresses and names. Items never change: a new
//! version is removed and added.

use std::sync::Arc;

use super::list::{List, add, remove};
use super::names::{Name, NamespacedName, NetworkAddress, NetworkCidr};
use super::network::Network;
use super::policy::{Policy, PolicyScope};
use super::service::Service;
use super::workload::Workload;
use super::{Mesh, MeshSize};

impl Mesh {
    pub(super) fn add_workload(&mut self, workload: &Arc<Workload>) {
        self.touch_workload(workload);
        let network = self.networks.entry(workload.network.clone()).or_default();
        workload.addresses.iter().for_each(|address| network.add_workload(*address, workload));
        if !workload.hostname.is_empty() {
            add(&mut self.workload_hostnames, workload.hostname.clone(), workload);
        }
        add(&mut self.names, name(workload), workload);
        self.size.workloads += 1;
    }

    pub(super) fn remove_workload(&mut self, workload: &Arc<Workload>) {
        self.touch_workload(workload);
        let network = self.networks.entry(workload.network.clone()).or_default();
        workload.addresses.iter().for_each(|address| network.remove_workload(*address, workload));
        if !workload.hostname.is_empty() {
            remove(&mut self.workload_hostnames, &workload.hostname, workload);
        }
        remove(&mut self.names, &name(workload), workload);
        self.size.workloads -= 1;
    }

    fn touch_workload(&mut self, Workload { network, addresses, .. }: &Workload) {
        for address in addresses {
            self.lineage.touch(NetworkAddress { network: network.clone(), address: *address });
        }
    }

    fn touch_service(&mut self, service: &Service) {
        service.vips.iter().for_each(|vip| self.lineage.touch(vip.clone()));
        if !service.cidr_vips.is_empty() {
            self.lineage.touch_all();
        }
    }

    pub(super) fn add_service(&mut self, service: &Arc<Service>) {
        self.touch_service(service);
        for vip in &service.vips {
            self.network(&vip.network).add_vip(vip.address, service);
        }
        for vip in &service.cidr_vips {
            self.network(&vip.network).add_cidr_vip(vip.cidr, service);
        }
        add(&mut self.hostnames, service.hostname.clone(), service);
        self.size.services += 1;
    }

    pub(super) fn remove_service(&mut self, service: &Arc<Service>) {
        self.touch_service(service);
        for vip in &service.vips {
            self.network(&vip.network).remove_vip(vip.address, service);
        }
        for vip in &service.cidr_vips {
            self.network(&vip.network).remove_cidr_vip(vip.cidr, service);
        }
        remove(&mut self.hostnames, &service.hostname, service);
        self.size.services -= 1;
    }

    /// Replaces the policies of a namespace, or the global policies for `None`.
    pub(super) fn set_policies(&mut self, namespace: Option<&Name>, policies: List<Policy>) {
        match namespace {
            None => self.policies.global = policies,
            Some(namespace) if policies.is_empty() => {
                self.policies.namespaces.remove(namespace);
            }
            Some(namespace) => {
                self.policies.namespaces.insert(namespace.clone(), policies);
            }
        }
    }

    pub(super) fn set_policy_count(&mut self, policies: usize) {
        self.size = MeshSize { policies, ..self.size };
    }

    /// Denies connections to workloads that the mesh does not have.
    pub(super) fn deny_unknown_workloads(&mut self) {
        let scope = PolicyScope::WorkloadSelector;
        let denying = Policy::denying("mesh.xds".into(), "(unknown workload)", scope);
        self.policies.unknown = [Arc::new(denying)].into();
    }

    /// Adds a rejected item to the count of each of these ranges, or removes it.
    pub(super) fn withhold(&mut self, ranges: &[NetworkCidr], is_withheld: bool) {
        self.lineage.touch_all();
        for NetworkCidr { network, cidr } in ranges {
            let network = self.network(network);
            if is_withheld { network.withhold(*cidr) } else { network.release(*cidr) }
        }
    }

    pub(super) fn network(&mut self, name: &Name) -> &mut Network {
        self.networks.entry(name.clone()).or_default()
    }
}

fn name(workload: &Workload) -> NamespacedName {
    NamespacedName(workload.namespace.clone(), workload.name.clone())
}
