//! Indexes the addresses of one network: workloads, virtual addresses of services, and their
//! ranges.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::list::{Items, List, SharedMap, add, items, remove};
use super::ranges::Ranges;
use super::service::Service;
use super::workload::{NetworkMode, Protocol, Workload};

/// The addresses of one network.
#[derive(Debug, Clone, Default)]
pub(super) struct Network {
    workloads: SharedMap<IpAddr, Items<Workload>>,
    vips: SharedMap<IpAddr, Items<Service>>,
    cidr_vips: Ranges<List<Service>>,
    /// The number of rejected items for each range.
    withheld: Ranges<usize>,
}

impl Network {
    /// The workload at `address`: the only one, or the newest of several that is not in the host
    /// network.
    pub(super) fn workload(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        match items(&self.workloads, &address) {
            [only] => Some(only),
            several => several.iter().rfind(|one| one.network_mode == NetworkMode::Standard),
        }
    }

    /// Whether at least one workload has this address.
    pub(super) fn has_workload(&self, address: IpAddr) -> bool {
        self.workloads.contains_key(&address)
    }

    /// Whether a workload with this address supports HBONE, or may support it because its last
    /// version was rejected.
    pub(super) fn speaks_hbone(&self, address: IpAddr) -> bool {
        let workloads = items(&self.workloads, &address);
        workloads.iter().any(|workload| workload.protocol == Protocol::Hbone)
            || self.is_withheld(address)
    }

    fn is_withheld(&self, address: IpAddr) -> bool {
        self.withheld.around(address).next().is_some()
    }

    /// Whether a workload or service has this address.
    pub(super) fn has_address(&self, address: IpAddr) -> bool {
        self.workloads.contains_key(&address) || self.services_at(address).next().is_some()
    }

    /// Whether an item has this address, even if it was rejected.
    pub(super) fn knows(&self, address: IpAddr) -> bool {
        self.has_address(address) || self.is_withheld(address)
    }

    /// The service at `address` for a workload of `namespace`: one with this address, otherwise one
    /// with a range that contains it. Services that the workload cannot see are ignored.
    pub(super) fn service(&self, address: IpAddr, namespace: &str) -> Option<&Arc<Service>> {
        select_service(items(&self.vips, &address), namespace, |_| true)
            .or_else(|| self.service_around(address, namespace))
    }

    /// All services with `address` or a range that contains it, regardless of visibility.
    pub(super) fn services_at(&self, address: IpAddr) -> impl Iterator<Item = &Arc<Service>> {
        let around = self.ranges_around(address).flatten();
        items(&self.vips, &address).iter().chain(around)
    }

    /// The services of each range that contains `address`, longest prefix first.
    fn ranges_around(&self, address: IpAddr) -> impl Iterator<Item = &[Arc<Service>]> {
        self.cidr_vips.around(address).map(|services| &**services)
    }

    /// The service whose range contains `address`, ranked like in ztunnel: a range of the own
    /// namespace precedes a longer prefix of another one. Of equal candidates the first in the file
    /// is used, unlike in [`select_service`], because ztunnel replaces it only by a better one
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

    /// The workload that already has this address, unless both share the address of their node.
    pub(super) fn conflict(&self, address: IpAddr, workload: &Workload) -> Option<&Arc<Workload>> {
        let on_node = |workload: &Workload| workload.network_mode == NetworkMode::HostNetwork;
        items(&self.workloads, &address).iter().find(|owner| !(on_node(owner) && on_node(workload)))
    }

    pub(super) fn add_workload(&mut self, address: IpAddr, workload: &Arc<Workload>) {
        add(&mut self.workloads, address, workload);
    }

    pub(super) fn remove_workload(&mut self, address: IpAddr, workload: &Arc<Workload>) {
        remove(&mut self.workloads, &address, workload);
    }

    pub(super) fn add_vip(&mut self, address: IpAddr, service: &Arc<Service>) {
        add(&mut self.vips, address, service);
    }

    pub(super) fn remove_vip(&mut self, address: IpAddr, service: &Arc<Service>) {
        remove(&mut self.vips, &address, service);
    }

    pub(super) fn add_cidr_vip(&mut self, cidr: IpNet, service: &Arc<Service>) {
        self.cidr_vips.change(cidr, |before| {
            let before = before.map(|list| &**list).unwrap_or_default();
            Some(before.iter().chain([service]).cloned().collect())
        });
    }

    pub(super) fn remove_cidr_vip(&mut self, cidr: IpNet, service: &Arc<Service>) {
        self.cidr_vips.change(cidr, |before| {
            let others = before?.iter().filter(|one| !Arc::ptr_eq(one, service));
            let rest: List<Service> = others.cloned().collect();
            (!rest.is_empty()).then_some(rest)
        });
    }

    /// Counts a rejected item in this range, which may support HBONE.
    pub(super) fn withhold(&mut self, range: IpNet) {
        self.withheld.change(range, |items| Some(items.map_or(1, |items| items + 1)));
    }

    /// Removes an item that [`withhold`](Self::withhold) counted.
    pub(super) fn release(&mut self, range: IpNet) {
        self.withheld.change(range, |items| items?.checked_sub(1).filter(|items| *items > 0));
    }
}

/// Selects among the accepted services with the same address or hostname, for a workload of
/// `namespace`: one of its own namespace, otherwise the canonical one, otherwise the one with the
/// first namespace. Of equal candidates the last in the file is used, because it replaces earlier
/// ones in ztunnel (`state/service.rs`, `insert_internal`, `find_best_match`).
pub(super) fn select_service<'a>(
    services: &'a [Arc<Service>],
    namespace: &str,
    accept: impl Fn(&Service) -> bool,
) -> Option<&'a Arc<Service>> {
    let is_candidate =
        |service: &&'a Arc<Service>| service.visible_to(namespace) && accept(service);
    let visible = || services.iter().filter(is_candidate);
    let of = |namespace: &str| visible().rfind(|service| *service.namespace == *namespace);
    of(namespace)
        .or_else(|| visible().rfind(|service| service.canonical))
        .or_else(|| of(&visible().next()?.namespace))
}

#[cfg(test)]
mod tests {
    use crate::mesh::Mesh;

    const AT: &str = "vips: [/10.1.0.1], cidrVips: [/10.2.0.0/16], ";

    /// Services named `a`, `b` and so on with these fields; by default with one address and one
    /// range.
    fn mesh(services: &[&str]) -> Mesh {
        let service = |(words, name): (&&str, char)| {
            let addresses = if words.contains("cidrVips") { "" } else { AT };
            format!("- {{name: {name}, hostname: {name}, {addresses}{words}}}\n")
        };
        let services: String = services.iter().zip('a'..='z').map(service).collect();
        Mesh::from_text("mesh.yaml", &format!("services:\n{services}")).unwrap()
    }

    /// The services at the address and at an address of the range, for a workload of namespace
    /// `ns`.
    fn resolved(mesh: &Mesh) -> [&str; 2] {
        let resolved = |address: [u8; 4]| mesh.service("", address.into(), "ns");
        [[10, 1, 0, 1], [10, 2, 0, 1]].map(|address| resolved(address).map_or("", |it| &it.name))
    }

    #[test]
    fn duplicate_vip_resolves_to_last_service_and_duplicate_range_to_first() {
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
            assert_eq!(resolved(&mesh(services)), expected, "{services:?}");
        }
    }

    #[test]
    fn service_selection_prefers_own_namespace_then_longer_prefix_then_canonical() {
        let mesh = mesh(&[
            "namespace: x, canonical: true, cidrVips: [/10.3.0.0/16]",
            "namespace: y, cidrVips: [/10.3.0.0/24]",
            "namespace: z, cidrVips: [/10.0.0.0/8]",
        ]);
        let resolved = |namespace| mesh.service("", [10, 3, 0, 1].into(), namespace).unwrap();
        assert_eq!(["x", "w", "z"].map(|namespace| &*resolved(namespace).name), ["a", "b", "c"]);
    }

    #[test]
    fn lists_services_at_address_regardless_of_visibility() {
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
