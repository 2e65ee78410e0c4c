//! The way in: what a tunnel that ends at this workload may ask for, and where that leads. It never leads to another address.
//!
//! Not here: which ports are the proxy's own, and who may connect (`policy.rs`).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use underpass_config::{
    Destination, Gateway, GatewayDestination, Mesh, Service, TunnelHeader, Workload,
};

use super::{RouteError, Target};

/// Where a connection out of a tunnel goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct InboundTarget {
    /// The application: the address at which the tunnel ends, and one of its ports.
    pub(crate) address: SocketAddr,
    /// What a PROXY header in front of the bytes calls the destination; `None`: there is no header.
    pub(crate) header: Option<SocketAddr>,
    /// The service that was asked for, if the tunnel asks for one.
    pub(crate) service: Option<Arc<Service>>,
}

/// Where a tunnel leads that ends at `here` and asks for `authority`. The workload here is of `namespace`, and is `local` if the
/// mesh knows it; addresses mean those of `network`.
///
/// # Errors
/// Why the workload here does not stand for what is asked for.
pub(crate) fn inbound(
    authority: &Target,
    here: SocketAddr,
    mesh: &Mesh,
    local: Option<&Workload>,
    network: &str,
    namespace: &str,
) -> Result<InboundTarget, RouteError> {
    let here = SocketAddr::new(here.ip().to_canonical(), here.port());
    let question = Question { here, mesh, local, network, namespace };
    match authority {
        Target::Address(asked) => {
            question.address(SocketAddr::new(asked.ip().to_canonical(), asked.port()))
        }
        Target::Hostname(hostname, port) => {
            let unknown = || RouteError::UnknownService { hostname: hostname.clone() };
            question.service(question.named(hostname).ok_or_else(unknown)?, *port)
        }
    }
}

struct Question<'a> {
    here: SocketAddr,
    mesh: &'a Mesh,
    local: Option<&'a Workload>,
    network: &'a str,
    namespace: &'a str,
}

impl<'a> Question<'a> {
    fn address(&self, asked: SocketAddr) -> Result<InboundTarget, RouteError> {
        let own = asked.ip() == self.here.ip();
        let tunnel = self.local.and_then(|local| local.application_tunnel);
        // A workload's own address does not say which of its services is meant.
        let owner = if own { None } else { self.owner(asked.ip()) };
        let in_front_of = if own { None } else { self.in_front_of(asked.ip()) };
        if !own && tunnel.is_none() && in_front_of.is_none() {
            return Err(RouteError::NotHere { asked: Target::Address(asked), here: self.here });
        }
        let port = tunnel.and_then(|tunnel| tunnel.port).unwrap_or_else(|| asked.port());
        let header = tunnel.filter(|tunnel| tunnel.header == TunnelHeader::Proxy);
        let service = match in_front_of.or(owner) {
            Some(Destination::Service(service)) => Some(service.clone()),
            Some(Destination::Workload(_)) | None => None,
        };
        let address = SocketAddr::new(self.here.ip(), port);
        Ok(InboundTarget { address, header: header.map(|_| asked), service })
    }

    /// The service that a tunnel means by a hostname, which several may have: one that the workload here serves, or else one that
    /// it is the waypoint of, or else the usual one. The first two need not be visible to it: visibility is about clients.
    fn named(&self, hostname: &str) -> Option<&'a Arc<Service>> {
        let best = self.mesh.service_by_hostname(hostname, self.namespace);
        let all = || best.into_iter().chain(self.mesh.services_named(hostname));
        all()
            .find(|service| self.serves(service))
            .or_else(|| all().find(|service| self.is_waypoint_of(Destination::Service(service))))
            .or(best)
    }

    fn service(&self, service: &'a Arc<Service>, port: u16) -> Result<InboundTarget, RouteError> {
        let tunnel = self.local.and_then(|local| local.application_tunnel);
        let in_front = || self.is_waypoint_of(Destination::Service(service));
        if !self.serves(service) && tunnel.is_none() && !in_front() {
            return Err(RouteError::NotEndpoint { service: service.clone() });
        }
        let unknown = || RouteError::NoPort { service: service.clone(), port };
        let of_service = service.ports.get(port).ok_or_else(unknown)?;
        let target = match tunnel.and_then(|tunnel| tunnel.port) {
            Some(port) => port,
            None => {
                let endpoint = self.local.and_then(|local| service.endpoint(local));
                let of_endpoint = endpoint.and_then(|endpoint| endpoint.ports.get(port));
                of_endpoint
                    .into_iter()
                    .chain([of_service])
                    .find(|port| *port != 0)
                    .ok_or_else(unknown)?
            }
        };
        let header = tunnel.filter(|tunnel| tunnel.header == TunnelHeader::Proxy);
        Ok(InboundTarget {
            address: SocketAddr::new(self.here.ip(), target),
            header: header.map(|_| self.vip(service, port)).transpose()?,
            service: Some(service.clone()),
        })
    }

    /// A workload that is not healthy is no endpoint, but a peer that chose it before may still come.
    fn serves(&self, service: &Service) -> bool {
        self.local.is_some_and(|local| {
            service.endpoint(local).is_some() || local.services.contains(&service.key())
        })
    }

    /// The owner of this address: a workload before a service, whose range may contain it.
    fn owner(&self, address: IpAddr) -> Option<Destination<'a>> {
        let workload = self.mesh.workload(self.network, address).map(Destination::Workload);
        let service = || self.mesh.service(self.network, address, self.namespace);
        workload.or_else(|| service().map(Destination::Service))
    }

    /// Who at this address names the workload here as waypoint, whether visible to it or not: of several services each client
    /// means another one.
    fn in_front_of(&self, address: IpAddr) -> Option<Destination<'a>> {
        let services = self.mesh.services_at(self.network, address).map(Destination::Service);
        let mut all = self.owner(address).into_iter().chain(services);
        all.find(|destination| self.is_waypoint_of(*destination))
    }

    /// Whether its connections are to go through the workload here.
    fn is_waypoint_of(&self, destination: Destination<'_>) -> bool {
        waypoints_of(destination).any(|waypoint| self.is_here(waypoint))
    }

    fn is_here(&self, waypoint: &Gateway) -> bool {
        let is_here = |destination| match destination {
            Destination::Service(service) => self.serves(service),
            Destination::Workload(workload) => {
                *workload.network == *self.network && workload.addresses.contains(&self.here.ip())
            }
        };
        match &waypoint.destination {
            GatewayDestination::Hostname(name) => self.mesh.named(name).is_some_and(is_here),
            GatewayDestination::Address(at) => {
                let workload = self.mesh.workload(&at.network, at.address);
                let services = self.mesh.services_at(&at.network, at.address);
                workload.is_some_and(|workload| is_here(Destination::Workload(workload)))
                    || services.map(Destination::Service).any(is_here)
            }
        }
    }

    /// The address of a service that a PROXY header carries, which knows no hostnames: one of this network, rather of IPv4.
    fn vip(&self, service: &Arc<Service>, port: u16) -> Result<SocketAddr, RouteError> {
        let best = service.vips.iter().min_by_key(|vip| {
            let elsewhere = *vip.network != *self.network;
            (elsewhere, vip.address.is_ipv6() && !elsewhere)
        });
        let none = || RouteError::NoVip { service: service.clone() };
        best.map(|vip| SocketAddr::new(vip.address, port)).ok_or_else(none)
    }
}

fn waypoints_of(destination: Destination<'_>) -> impl Iterator<Item = &Gateway> {
    let (one, several) = match destination {
        Destination::Workload(workload) => (workload.waypoint.as_deref(), None),
        Destination::Service(service) => {
            (service.waypoint.as_ref(), Some(&service.weighted_waypoints))
        }
    };
    let several = several.into_iter().flatten().map(|weighted| &weighted.gateway);
    one.into_iter().chain(several)
}
