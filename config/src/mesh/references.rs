//! The lookups on which a decision depends, if the control plane answers on demand.

use std::net::IpAddr;

use super::lookup::{Answer, Lookup};
use super::names::NamespacedHostname;
use super::service::Service;
use super::workload::{Gateway, GatewayDestination, Workload};
use super::{Destination, Mesh};

/// The longest chain of references: a destination, its waypoint, the gateway of the waypoint's
/// network, and the gateway's service.
const MAX_DEPTH: usize = 3;

impl Mesh {
    /// Whether the control plane has answered `lookup`, also if it has nothing for it. Always true
    /// if the mesh is complete.
    pub fn is_answered(&self, lookup: &Lookup) -> bool {
        self.answered.as_ref().is_none_or(|answered| answered.contains_key(lookup))
    }

    /// Whether the control plane has answered `lookup` with a resource.
    pub fn is_known(&self, lookup: &Lookup) -> bool {
        let answer = self.answered.as_ref().and_then(|answered| answered.get(lookup));
        answer == Some(&Answer::Known)
    }

    /// The lookups for connections to `address`: the address, and the waypoints and gateways that
    /// the mesh has for it so far. None if the mesh is complete.
    pub fn lookups_to_address(&self, network: &str, address: IpAddr) -> Vec<Lookup> {
        self.lookups(network, |references| references.address(network, address, 0))
    }

    /// The lookups for connections to the service `name`. None if the mesh is complete.
    pub fn lookups_to_name(&self, network: &str, name: &NamespacedHostname) -> Vec<Lookup> {
        self.lookups(network, |references| references.name(name, 0))
    }

    fn lookups(&self, network: &str, collect: impl FnOnce(&mut References<'_>)) -> Vec<Lookup> {
        let mut references = References { mesh: self, network, lookups: Vec::new() };
        if self.answered.is_some() {
            collect(&mut references);
        }
        references.lookups
    }
}

/// Follows the references from a destination.
struct References<'a> {
    mesh: &'a Mesh,
    /// The client's network.
    network: &'a str,
    lookups: Vec<Lookup>,
}

impl References<'_> {
    fn address(&mut self, network: &str, address: IpAddr, depth: usize) {
        if self.add(Lookup::address(network, address)) {
            let mesh = self.mesh;
            if let Some(workload) = mesh.workload(network, address) {
                self.workload(workload, depth);
            }
            mesh.services_at(network, address).for_each(|service| self.service(service, depth));
        }
    }

    fn name(&mut self, name: &NamespacedHostname, depth: usize) {
        if self.add(Lookup::hostname(name)) {
            match self.mesh.named(name) {
                Some(Destination::Service(service)) => self.service(service, depth),
                Some(Destination::Workload(workload)) => self.workload(workload, depth),
                None => {}
            }
        }
    }

    fn workload(&mut self, workload: &Workload, depth: usize) {
        let gateways = workload.waypoint.iter().chain(&workload.network_gateway);
        gateways.for_each(|gateway| self.gateway(gateway, depth));
    }

    fn service(&mut self, service: &Service, depth: usize) {
        let weighted = service.weighted_waypoints.iter().map(|weighted| &weighted.gateway);
        service.waypoint.iter().chain(weighted).for_each(|gateway| self.gateway(gateway, depth));
        for endpoint in &service.endpoints {
            let workload = &endpoint.workload;
            if *workload.network != *self.network
                && let Some(gateway) = &workload.network_gateway
            {
                self.gateway(gateway, depth);
            }
        }
    }

    fn gateway(&mut self, gateway: &Gateway, depth: usize) {
        if depth == MAX_DEPTH {
            return;
        }
        match &gateway.destination {
            GatewayDestination::Hostname(name) => self.name(name, depth + 1),
            GatewayDestination::Address(at) => self.address(&at.network, at.address, depth + 1),
        }
    }

    /// Adds a lookup. Returns false if it is there already.
    fn add(&mut self, lookup: Lookup) -> bool {
        let is_new = !self.lookups.contains(&lookup);
        if is_new {
            self.lookups.push(lookup);
        }
        is_new
    }
}
