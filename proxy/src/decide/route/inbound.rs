//! Inbound routing: which destinations a tunnel that ends at this workload may request, and their
//! target. The target always has the address at which the tunnel ends.
//!
//! The proxy's own ports and authorization are checked in `policy.rs`.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use underpass_config::{
    Destination, Gateway, GatewayDestination, Mesh, Service, TunnelHeader, Workload,
};

use super::{RouteError, Target};

/// The target of a CONNECT request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct InboundTarget {
    /// The application: the address at which the tunnel ends, and a port.
    pub(crate) address: SocketAddr,
    /// The destination in the PROXY header; `None` if no header is sent.
    pub(crate) header: Option<SocketAddr>,
    /// The requested service, if the request names one.
    pub(crate) service: Option<Arc<Service>>,
}

/// Determines the target of a CONNECT request for `authority` in a tunnel that ends at `here`. The
/// local workload is in `namespace` and `network`; `local` is its entry in the mesh.
///
/// # Errors
/// The local workload does not serve the requested destination.
pub(crate) fn inbound(
    authority: &Target,
    here: SocketAddr,
    mesh: &Mesh,
    local: Option<&Workload>,
    network: &str,
    namespace: &str,
) -> Result<InboundTarget, RouteError> {
    let here = SocketAddr::new(here.ip().to_canonical(), here.port());
    let router = InboundRouter { here, mesh, local, network, namespace };
    match authority {
        Target::Address(requested) => {
            router.address(SocketAddr::new(requested.ip().to_canonical(), requested.port()))
        }
        Target::Hostname(hostname, port) => {
            let unknown = || RouteError::UnknownService { hostname: hostname.clone() };
            router.service(router.named(hostname).ok_or_else(unknown)?, *port)
        }
    }
}

struct InboundRouter<'a> {
    here: SocketAddr,
    mesh: &'a Mesh,
    local: Option<&'a Workload>,
    network: &'a str,
    namespace: &'a str,
}

impl<'a> InboundRouter<'a> {
    fn address(&self, requested: SocketAddr) -> Result<InboundTarget, RouteError> {
        let own = requested.ip() == self.here.ip();
        let tunnel = self.local.and_then(|local| local.application_tunnel);
        // The workload's own address does not identify one of its services.
        let owner = if own { None } else { self.owner(requested.ip()) };
        let destination_behind = if own { None } else { self.destination_behind(requested.ip()) };
        if !own && tunnel.is_none() && destination_behind.is_none() {
            return Err(RouteError::NotHere {
                requested: Target::Address(requested),
                here: self.here,
            });
        }
        let port = tunnel.and_then(|tunnel| tunnel.port).unwrap_or_else(|| requested.port());
        let header = tunnel.filter(|tunnel| tunnel.header == TunnelHeader::Proxy);
        let service = match destination_behind.or(owner) {
            Some(Destination::Service(service)) => Some(service.clone()),
            Some(Destination::Workload(_)) | None => None,
        };
        let address = SocketAddr::new(self.here.ip(), port);
        Ok(InboundTarget { address, header: header.map(|_| requested), service })
    }

    /// The service with this hostname, which several services may share. Prefers services with this
    /// workload as an endpoint, then those with it as the waypoint, then the best match. Visibility
    /// limits only clients.
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
        let is_waypoint = || self.is_waypoint_of(Destination::Service(service));
        if !self.serves(service) && tunnel.is_none() && !is_waypoint() {
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
            header: header.map(|_| self.service_address(service, port)).transpose()?,
            service: Some(service.clone()),
        })
    }

    /// Whether the workload is an endpoint of the service. Health does not matter: a peer may have
    /// selected it while it was healthy.
    fn serves(&self, service: &Service) -> bool {
        self.local.is_some_and(|local| {
            service.endpoint(local).is_some() || local.services.contains(&service.key())
        })
    }

    /// The owner of this address: preferably a workload, else the service whose range contains it.
    fn owner(&self, address: IpAddr) -> Option<Destination<'a>> {
        let workload = self.mesh.workload(self.network, address).map(Destination::Workload);
        let service = || self.mesh.service(self.network, address, self.namespace);
        workload.or_else(|| service().map(Destination::Service))
    }

    /// The destination at this address whose waypoint is the local workload, visible or not. For
    /// different clients an address may belong to different services.
    fn destination_behind(&self, address: IpAddr) -> Option<Destination<'a>> {
        let services = self.mesh.services_at(self.network, address).map(Destination::Service);
        let mut all = self.owner(address).into_iter().chain(services);
        all.find(|destination| self.is_waypoint_of(*destination))
    }

    /// Whether the local workload is a waypoint of this destination.
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

    /// The service address in a PROXY header: preferably of this network, then IPv4.
    fn service_address(&self, service: &Arc<Service>, port: u16) -> Result<SocketAddr, RouteError> {
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
