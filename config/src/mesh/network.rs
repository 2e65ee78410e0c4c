//! Who has which address in one network: workloads, services' virtual addresses and their ranges.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::service::Service;
use super::workload::{NetworkMode, Protocol, Workload};

/// The addresses of one network.
#[derive(Debug, Default)]
pub(super) struct Network {
    workloads: HashMap<IpAddr, Owner>,
    vips: HashMap<IpAddr, Vec<Arc<Service>>>,
    cidr_vips: HashMap<IpNet, Vec<Arc<Service>>>,
    /// The lengths that the ranges have, so that only these are tried.
    lengths: BTreeSet<u8>,
}

/// Whose an address is.
#[derive(Debug)]
struct Owner {
    workload: Arc<Workload>,
    /// Whether others have it too, so that it tells of none of them.
    shared: bool,
    /// Whether any of them speaks HBONE.
    hbone: bool,
}

impl Network {
    pub(super) fn workload(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        let owner = self.workloads.get(&address)?;
        (!owner.shared).then_some(&owner.workload)
    }

    /// Whether anybody has this address, if only together with others.
    pub(super) fn has_workload(&self, address: IpAddr) -> bool {
        self.workloads.contains_key(&address)
    }

    /// Whether somebody who has this address speaks HBONE.
    pub(super) fn speaks_hbone(&self, address: IpAddr) -> bool {
        self.workloads.get(&address).is_some_and(|owner| owner.hbone)
    }

    /// Whether anybody has this address.
    pub(super) fn knows(&self, address: IpAddr) -> bool {
        let around = |length: &u8| IpNet::new(address, *length).ok().map(|net| net.trunc());
        self.workloads.contains_key(&address)
            || self.vips.contains_key(&address)
            || self.lengths.iter().filter_map(around).any(|net| self.cidr_vips.contains_key(&net))
    }

    /// The service that a workload of `namespace` means by `address`: one with just this address, or else one with a range
    /// around it. What it cannot see is not there.
    pub(super) fn service(&self, address: IpAddr, namespace: &str) -> Option<&Arc<Service>> {
        let exact = self.vips.get(&address).map(Vec::as_slice).unwrap_or_default();
        best(exact, namespace).or_else(|| self.service_around(address, namespace))
    }

    /// As ztunnel ranks them: a range of the caller's own namespace goes before a narrower one of another.
    fn service_around(&self, address: IpAddr, namespace: &str) -> Option<&Arc<Service>> {
        let longest_first = self.lengths.iter().rev();
        let matches = longest_first.filter_map(|length| {
            let around = IpNet::new(address, *length).ok()?.trunc();
            best(self.cidr_vips.get(&around)?, namespace)
        });
        let mut first = None;
        for service in matches {
            if &*service.namespace == namespace {
                return Some(service);
            }
            first = first.or(Some(service));
        }
        first
    }

    /// Adds a workload's address; gives back whose it is already, unless both share the addresses of a node.
    pub(super) fn add_workload(
        &mut self,
        address: IpAddr,
        workload: &Arc<Workload>,
    ) -> Result<(), Arc<Workload>> {
        let on_node = |workload: &Workload| workload.network_mode == NetworkMode::HostNetwork;
        let hbone = workload.protocol == Protocol::Hbone;
        let owner = match self.workloads.entry(address) {
            Entry::Vacant(free) => {
                free.insert(Owner { workload: workload.clone(), shared: false, hbone });
                return Ok(());
            }
            Entry::Occupied(taken) => taken.into_mut(),
        };
        if !(on_node(&owner.workload) && on_node(workload)) {
            return Err(owner.workload.clone());
        }
        owner.shared = true;
        owner.hbone |= hbone;
        Ok(())
    }

    pub(super) fn add_vip(&mut self, address: IpAddr, service: &Arc<Service>) {
        self.vips.entry(address).or_default().push(service.clone());
    }

    pub(super) fn add_cidr_vip(&mut self, cidr: IpNet, service: &Arc<Service>) {
        self.lengths.insert(cidr.prefix_len());
        self.cidr_vips.entry(cidr).or_default().push(service.clone());
    }
}

/// Of services with the same address or hostname, the one that a workload of `namespace` means: one of its own namespace, or
/// the canonical one, or the first.
pub(super) fn best<'a>(services: &'a [Arc<Service>], namespace: &str) -> Option<&'a Arc<Service>> {
    let visible = || services.iter().filter(|service| service.visible_to(namespace));
    visible()
        .find(|service| &*service.namespace == namespace)
        .or_else(|| visible().find(|service| service.canonical))
        .or_else(|| visible().next())
}
