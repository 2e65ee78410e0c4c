//! Who has which address in one network: workloads, services' virtual addresses and their ranges.

use std::collections::BTreeSet;
use std::collections::hash_map::Entry;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::names::Map;
use super::service::Service;
use super::workload::{NetworkMode, Protocol, Workload};

/// The addresses of one network.
#[derive(Debug, Default)]
pub(super) struct Network {
    workloads: Map<IpAddr, Owner>,
    vips: Map<IpAddr, Vec<Arc<Service>>>,
    cidr_vips: Map<IpNet, Vec<Arc<Service>>>,
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
        self.workloads.contains_key(&address) || self.services_at(address).next().is_some()
    }

    /// The service that a workload of `namespace` means by `address`: one with just this address, or else one with a range
    /// around it. What it cannot see is not there.
    pub(super) fn service(&self, address: IpAddr, namespace: &str) -> Option<&Arc<Service>> {
        let exact = self.vips.get(&address).map(Vec::as_slice).unwrap_or_default();
        best(exact, namespace).or_else(|| self.service_around(address, namespace))
    }

    /// Every service that has `address` or a range around it, whoever can see it.
    pub(super) fn services_at(&self, address: IpAddr) -> impl Iterator<Item = &Arc<Service>> {
        let exact = self.vips.get(&address);
        let around = self.ranges_around(address).flatten();
        exact.into_iter().flatten().chain(around)
    }

    /// The services of each range around `address`, the narrowest range first.
    fn ranges_around(&self, address: IpAddr) -> impl Iterator<Item = &Vec<Arc<Service>>> {
        let longest_first = self.lengths.iter().rev();
        longest_first.filter_map(move |length| {
            let around = IpNet::new(address, *length).ok()?.trunc();
            self.cidr_vips.get(&around)
        })
    }

    /// As ztunnel ranks them: a range of the caller's own namespace goes before a narrower one of another. Of several that are
    /// equally good the first in the file is taken, unlike by [`best`]: only a better one replaces it there
    /// (`state/service.rs`, `get_best_by_cidr_vip`).
    fn service_around(&self, address: IpAddr, namespace: &str) -> Option<&Arc<Service>> {
        let around = self.ranges_around(address).enumerate();
        around
            .flat_map(|(nth, services)| services.iter().map(move |service| (nth, service)))
            .filter(|(_, service)| service.visible_to(namespace))
            .min_by_key(|(nth, service)| {
                (*service.namespace != *namespace, *nth, !service.canonical)
            })
            .map(|(_, service)| service)
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
/// the canonical one, or one of the namespace that comes first. Of several that are equally good it is the last in the file,
/// as with ztunnel, where it takes the place of those before it (`state/service.rs`, `insert_internal`, `find_best_match`).
pub(super) fn best<'a>(services: &'a [Arc<Service>], namespace: &str) -> Option<&'a Arc<Service>> {
    let visible = || services.iter().filter(|service| service.visible_to(namespace));
    let of = |namespace: &str| visible().rfind(|service| *service.namespace == *namespace);
    of(namespace)
        .or_else(|| visible().rfind(|service| service.canonical))
        .or_else(|| of(&visible().next()?.namespace))
}

#[cfg(test)]
mod tests {
    use crate::mesh::Mesh;

    const AT: &str = "vips: [/10.1.0.1], cidrVips: [/10.2.0.0/16], ";

    /// Services `a`, `b`, .. of these words; at one address and in one range around another unless they say where.
    fn mesh(services: &[&str]) -> Mesh {
        let service = |(words, name): (&&str, char)| {
            let there = if words.contains("cidrVips") { "" } else { AT };
            format!("- {{name: {name}, hostname: {name}, {there}{words}}}\n")
        };
        let services: String = services.iter().zip('a'..='z').map(service).collect();
        Mesh::from_text("mesh.yaml", &format!("services:\n{services}")).unwrap()
    }

    /// Which one a workload of namespace `ns` means by the address, and by one in the range.
    fn meant(mesh: &Mesh) -> [&str; 2] {
        let meant = |address: [u8; 4]| mesh.service("", address.into(), "ns");
        [[10, 1, 0, 1], [10, 2, 0, 1]].map(|address| meant(address).map_or("", |it| &it.name))
    }

    #[test]
    fn of_services_that_are_equally_good_the_last_has_an_address_and_the_first_a_range() {
        for (services, expected) in [
            (&["namespace: ns", "namespace: ns"][..], ["b", "a"]),
            (&["namespace: x", "namespace: ns", "namespace: ns", "namespace: x"], ["c", "b"]),
            (
                &["namespace: x, canonical: true", "namespace: y, canonical: true", "namespace: z"],
                ["b", "a"],
            ),
            (&["namespace: ns", "namespace: x, canonical: true"], ["a", "a"]),
            (&["namespace: x", "namespace: y"], ["a", "a"]),
            (&["namespace: x", "namespace: y", "namespace: x"], ["c", "a"]),
            (&["namespace: ns", "namespace: ns, canonical: true", "namespace: ns"], ["c", "b"]),
            (&["namespace: x", "namespace: x, visibility: Namespace"], ["a", "a"]),
            (&["namespace: x, visibility: Namespace"], ["", ""]),
        ] {
            assert_eq!(meant(&mesh(services)), expected, "{services:?}");
        }
    }

    #[test]
    fn a_range_of_the_own_namespace_goes_before_a_narrower_one_and_this_before_a_canonical_one() {
        let mesh = mesh(&[
            "namespace: x, canonical: true, cidrVips: [/10.3.0.0/16]",
            "namespace: y, cidrVips: [/10.3.0.0/24]",
            "namespace: z, cidrVips: [/10.0.0.0/8]",
        ]);
        let meant = |namespace| mesh.service("", [10, 3, 0, 1].into(), namespace).unwrap();
        assert_eq!(["x", "w", "z"].map(|namespace| &*meant(namespace).name), ["a", "b", "c"]);
    }

    #[test]
    fn every_service_at_an_address_is_found_whoever_can_see_it() {
        let mesh = mesh(&[
            "namespace: x, visibility: Namespace",
            "namespace: y, vips: [/10.2.0.1], cidrVips: [/10.1.0.0/24]",
        ]);
        let names = |network, address: [u8; 4]| {
            let services = mesh.services_at(network, address.into());
            services.map(|service| service.name.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(names("", [10, 1, 0, 1]), ["a", "b"]);
        assert_eq!(names("", [10, 2, 0, 1]), ["b", "a"]);
        assert_eq!(names("", [10, 2, 0, 2]), ["a"]);
        assert_eq!(names("", [10, 3, 0, 1]), [""; 0]);
        assert_eq!(names("far", [10, 1, 0, 1]), [""; 0]);
    }
}
