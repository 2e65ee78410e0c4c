//! Outbound routing: to an endpoint or a workload, through waypoints and network gateways, or to an
//! address outside of the mesh.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use underpass_config::{
    Destination, Gateway, GatewayDestination, IpFamilies, LoadBalancingMode, Mesh, Protocol,
    Service, SpiffeId, Workload,
};
use underpass_interception::OriginalDestination;

use super::load_balancing::{self, EndpointRole, SelectionInputs};
use super::{Authority, Caller, ForwardVia, NextHop, Route, RouteError, Target, Unusable};
use crate::decide::endpoint_health::EndpointKey;

/// The routes to a destination, best first.
#[derive(Debug)]
pub(crate) struct Alternatives<'a, C> {
    pub(crate) best: Route,
    pub(crate) others: FurtherRoutes<'a, C>,
}

/// The routes after the best one. Each is computed on demand, and avoids the endpoints of earlier
/// ones.
#[derive(Debug)]
pub(crate) struct FurtherRoutes<'a, C> {
    destination: OriginalDestination,
    mesh: &'a Mesh,
    caller: &'a Caller<'a>,
    inputs: C,
    /// The endpoint of the previous route; `None` if there is no alternative.
    last: Option<EndpointKey>,
}

impl<C: SelectionInputs> Iterator for FurtherRoutes<'_, C> {
    type Item = Route;

    fn next(&mut self) -> Option<Route> {
        self.inputs.exclude(self.last.take()?);
        let next = route(self.destination, self.mesh, self.caller, &mut self.inputs).ok()?;
        self.last = next.dialled().cloned();
        Some(next)
    }
}

/// Computes the routes to `destination`, an address of the caller's network, best first.
///
/// # Errors
/// There is no route; the caller then closes the connection. An HBONE workload is never
/// reached by plain TCP.
pub(crate) fn outbound<'a, C: SelectionInputs>(
    destination: OriginalDestination,
    mesh: &'a Mesh,
    caller: &'a Caller<'a>,
    mut inputs: C,
) -> Result<Alternatives<'a, C>, RouteError> {
    let best = route(destination, mesh, caller, &mut inputs)?;
    let last = best.dialled().cloned();
    Ok(Alternatives { best, others: FurtherRoutes { destination, mesh, caller, inputs, last } })
}

/// The best route to `destination`.
pub(super) fn route(
    destination: OriginalDestination,
    mesh: &Mesh,
    caller: &Caller<'_>,
    inputs: &mut impl SelectionInputs,
) -> Result<Route, RouteError> {
    let destination = destination.address();
    let address = destination.ip();
    let workload = mesh.workload(caller.network, address);
    let service = mesh.service(caller.network, address, caller.namespace);
    let mut router = Router { destination, mesh, caller, inputs };
    // A workload's own address within the range of a service does not use that service's waypoint.
    if let (Some(service), None) = (service, workload)
        && let Some(waypoint) = waypoint_of(service, router.inputs)
    {
        return router.through_waypoint(waypoint, EndpointRole::ServiceWaypoint, Some(service));
    }
    let balanced =
        |service: &&Arc<Service>| service.load_balancing.mode != LoadBalancingMode::Passthrough;
    match (service.filter(balanced), workload) {
        (Some(service), workload) => router.by_service(service, workload),
        // ztunnel forwards passthrough services as plain TCP; here an HBONE workload is reached by
        // HBONE.
        (None, Some(workload)) => {
            let upstream = Upstream::workload(workload, destination);
            router.by_workload(&upstream, service, true)
        }
        (None, None) => router.pass_through(service),
    }
}

/// The waypoint of a service: drawn by weight if there are several.
fn waypoint_of<'m>(service: &'m Service, inputs: &mut impl SelectionInputs) -> Option<&'m Gateway> {
    let weighted = &service.weighted_waypoints;
    let all: u64 = weighted.iter().map(|waypoint| u64::from(waypoint.weight)).sum();
    if all == 0 {
        return service.waypoint.as_ref();
    }
    let mut at = inputs.below(all);
    let drawn = weighted.iter().find(|waypoint| {
        let found = at < u64::from(waypoint.weight);
        at = at.saturating_sub(u64::from(waypoint.weight));
        found
    });
    drawn.map(|waypoint| &waypoint.gateway)
}

/// The next workload on the route, with its port: the destination, or a proxy in front of it.
struct Upstream<'m> {
    workload: &'m Arc<Workload>,
    port: u16,
    /// The service whose endpoint this is.
    service: Option<&'m Arc<Service>>,
    /// Set if the service has other endpoints.
    endpoint: Option<EndpointKey>,
    /// The requested address. It is used if the workload has it; otherwise an address of the same
    /// family is preferred.
    requested: IpAddr,
}

impl<'m> Upstream<'m> {
    fn workload(workload: &'m Arc<Workload>, requested: SocketAddr) -> Self {
        Self {
            workload,
            port: requested.port(),
            service: None,
            endpoint: None,
            requested: requested.ip(),
        }
    }

    /// The accepted identities: the workload's own, and the service's `subjectAltNames`.
    fn peers(&self) -> Arc<[SpiffeId]> {
        let itself = &self.workload.identity;
        let others = self.service.map(|service| &*service.subject_alt_names).unwrap_or_default();
        let others = others.iter().filter(|name| *name != itself);
        std::iter::once(itself).chain(others).cloned().collect()
    }

    /// The next hop for `port` of this workload.
    fn hop(&self, port: u16) -> Result<NextHop, RouteError> {
        let families = self.service.map(|service| service.ip_families).unwrap_or_default();
        if let Some(address) = self.address(families) {
            return Ok(NextHop::Address(SocketAddr::new(address, port)));
        }
        if self.workload.hostname.is_empty() {
            let workload = self.workload.clone();
            let none = workload.addresses.is_empty();
            let reason = if none { Unusable::NoAddress } else { Unusable::NoAddressOfFamily };
            return Err(RouteError::UnusableWorkload { workload, reason });
        }
        let hostname = self.workload.hostname.clone();
        Ok(NextHop::Hostname { hostname, port, families, prefer_v6: self.requested.is_ipv6() })
    }

    fn address(&self, families: IpFamilies) -> Option<IpAddr> {
        let addresses = &self.workload.addresses;
        if addresses.contains(&self.requested) {
            return Some(self.requested);
        }
        let accepted = || addresses.iter().copied().filter(|address| families.accept(*address));
        accepted()
            .find(|address| address.is_ipv6() == self.requested.is_ipv6())
            .or_else(|| accepted().next())
    }
}

/// The parameters of one routing decision.
struct Router<'m, 'a, C> {
    destination: SocketAddr,
    mesh: &'m Mesh,
    caller: &'a Caller<'a>,
    inputs: &'a mut C,
}

impl<'m, C: SelectionInputs> Router<'m, '_, C> {
    /// Routes to the original destination itself: it is unknown in the mesh, or belongs to a
    /// passthrough service.
    fn pass_through(&self, service: Option<&Arc<Service>>) -> Result<Route, RouteError> {
        let address = self.destination.ip();
        if self.mesh.speaks_hbone(self.caller.network, address) {
            return Err(RouteError::SharedAddress { address });
        }
        let via = ForwardVia::Plain { to: NextHop::Address(self.destination) };
        Ok(Route { via, workload: None, service: service.cloned(), endpoint: None, gateway: None })
    }

    /// Routes to an endpoint of `service`. `owner` is the workload that has the service's address
    /// too.
    fn by_service(
        &mut self,
        service: &'m Arc<Service>,
        owner: Option<&'m Arc<Workload>>,
    ) -> Result<Route, RouteError> {
        let (requested, port) = (self.destination.ip(), self.destination.port());
        let upstream = match (self.endpoint(service, port, EndpointRole::Service, requested), owner)
        {
            (Ok(upstream), _) => upstream,
            // The service has no usable endpoint, so the address means the workload. Like ztunnel,
            // connect by plain TCP, without its waypoint or tunnel.
            (Err(error), Some(owner)) if error.has_no_endpoint_for_port() => {
                let upstream = Upstream::workload(owner, self.destination);
                return self.by_workload(&upstream, None, true);
            }
            (Err(error), _) => return Err(error),
        };
        if self.is_in_other_network(&upstream) {
            return self.through_gateway(upstream, service);
        }
        self.by_workload(&upstream, Some(service), owner.is_some())
    }

    /// Routes to a workload of this network. `by_address` means that the client used the workload's
    /// own address, so its waypoint applies.
    fn by_workload(
        &mut self,
        upstream: &Upstream<'m>,
        service: Option<&Arc<Service>>,
        by_address: bool,
    ) -> Result<Route, RouteError> {
        let waypoint = upstream.workload.waypoint.as_deref().filter(|_| by_address);
        if let Some(waypoint) = waypoint.filter(|waypoint| !self.comes_from(waypoint)) {
            return self.through_waypoint(waypoint, EndpointRole::WorkloadWaypoint, service);
        }
        let via = match upstream.workload.protocol {
            Protocol::Tcp => ForwardVia::Plain { to: upstream.hop(upstream.port)? },
            Protocol::Hbone => {
                let to = upstream.hop(self.caller.hbone_port)?;
                let authority = match &to {
                    NextHop::Address(peer) => {
                        let target = SocketAddr::new(peer.ip(), upstream.port);
                        Authority::KnownEndpoint(Target::Address(target))
                    }
                    NextHop::Hostname { .. } => Authority::AtNextHop(upstream.port),
                };
                ForwardVia::Tunnel { to, peers: upstream.peers(), authority }
            }
        };
        Ok(Route {
            via,
            workload: Some(upstream.workload.clone()),
            service: service.cloned(),
            endpoint: upstream.endpoint.clone(),
            gateway: None,
        })
    }

    /// Routes through a waypoint to the original destination.
    fn through_waypoint(
        &mut self,
        waypoint: &Gateway,
        role: EndpointRole,
        service: Option<&Arc<Service>>,
    ) -> Result<Route, RouteError> {
        let unknown = || RouteError::UnknownWaypoint { waypoint: waypoint.destination.clone() };
        let upstream = self.proxy(waypoint, role)?.ok_or_else(unknown)?;
        if self.is_in_other_network(&upstream) {
            return match service.filter(|_| role == EndpointRole::ServiceWaypoint) {
                Some(service) => self.through_gateway(upstream, service),
                None => Err(unusable(&upstream, Unusable::OtherNetwork)),
            };
        }
        let authority = Authority::KnownEndpoint(Target::Address(self.destination));
        let to = upstream.hop(upstream.port)?;
        Ok(Route {
            via: ForwardVia::Tunnel { to, peers: upstream.peers(), authority },
            workload: Some(upstream.workload.clone()),
            service: service.cloned(),
            endpoint: upstream.endpoint,
            gateway: None,
        })
    }

    /// Routes to an endpoint of `service`, or a waypoint of it, in another network.
    fn through_gateway(
        &mut self,
        upstream: Upstream<'m>,
        service: &Arc<Service>,
    ) -> Result<Route, RouteError> {
        let chosen_for = upstream.service;
        load_balancing::check_behind_gateway(upstream.workload, chosen_for)
            .map_err(|reason| unusable(&upstream, reason))?;
        let gateway = upstream.workload.network_gateway.as_deref();
        let gateway = gateway.ok_or_else(|| unusable(&upstream, Unusable::NoGateway))?;
        let unknown = || RouteError::UnknownGateway { gateway: gateway.destination.clone() };
        let next = self.proxy(gateway, EndpointRole::NetworkGateway)?.ok_or_else(unknown)?;
        let via = ForwardVia::DoubleTunnel {
            gateway: next.hop(next.port)?,
            gateway_peers: next.peers(),
            // The gateway selects the endpoint, so only the service's `subjectAltNames` identify
            // the peer behind it.
            peers: chosen_for.map(|service| &*service.subject_alt_names).unwrap_or_default().into(),
            authority: Target::Hostname(service.hostname.clone(), self.destination.port()),
        };
        Ok(Route {
            via,
            workload: Some(next.workload.clone()),
            service: Some(service.clone()),
            endpoint: upstream.endpoint,
            gateway: next.endpoint,
        })
    }

    /// The workload of a waypoint or gateway, or an endpoint of its service; `None` if the name is
    /// unknown.
    fn proxy(
        &mut self,
        gateway: &Gateway,
        role: EndpointRole,
    ) -> Result<Option<Upstream<'m>>, RouteError> {
        // A waypoint given by name is dialled at an address of the client's family.
        let requested = match &gateway.destination {
            GatewayDestination::Address(at) => at.address,
            GatewayDestination::Hostname(_) => self.destination.ip(),
        };
        let port = gateway.hbone_port;
        match self.gateway_destination(gateway) {
            Some(Destination::Service(service)) => {
                self.endpoint(service, port, role, requested).map(Some)
            }
            Some(Destination::Workload(workload)) => {
                Ok(Some(Upstream::workload(workload, SocketAddr::new(requested, port))))
            }
            None => Ok(None),
        }
    }

    fn gateway_destination(&self, gateway: &Gateway) -> Option<Destination<'m>> {
        match &gateway.destination {
            GatewayDestination::Hostname(name) => self.mesh.named(name),
            GatewayDestination::Address(at) => {
                let service = self.mesh.service(&at.network, at.address, self.caller.namespace);
                let workload = || self.mesh.workload(&at.network, at.address);
                service.map(Destination::Service).or_else(|| workload().map(Destination::Workload))
            }
        }
    }

    fn endpoint(
        &mut self,
        service: &'m Arc<Service>,
        port: u16,
        role: EndpointRole,
        requested: IpAddr,
    ) -> Result<Upstream<'m>, RouteError> {
        let chosen = load_balancing::select(service, port, role, self.caller, self.inputs)?;
        let key = EndpointKey { uid: chosen.workload.uid.clone(), port: chosen.port };
        let endpoint = (service.endpoints.len() > 1).then_some(key);
        let service = Some(service);
        Ok(Upstream { workload: chosen.workload, port: chosen.port, service, endpoint, requested })
    }

    /// Whether the caller is the waypoint itself, which has already processed the connection.
    fn comes_from(&self, waypoint: &Gateway) -> bool {
        let is_caller = |workload: &Workload| {
            self.caller.identity == Some(&workload.identity)
                && workload.addresses.contains(&self.caller.address.to_canonical())
        };
        match self.gateway_destination(waypoint) {
            Some(Destination::Workload(workload)) => is_caller(workload),
            Some(Destination::Service(service)) => {
                service.endpoints.iter().any(|endpoint| is_caller(&endpoint.workload))
            }
            None => false,
        }
    }

    fn is_in_other_network(&self, upstream: &Upstream<'_>) -> bool {
        *upstream.workload.network != *self.caller.network
    }
}

fn unusable(upstream: &Upstream<'_>, reason: Unusable) -> RouteError {
    RouteError::UnusableWorkload { workload: upstream.workload.clone(), reason }
}
