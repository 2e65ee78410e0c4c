//! Errors of routing: no outbound route, or a tunnel's request that this workload does not serve.

use std::borrow::Cow;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use thiserror::Error;
use underpass_config::{GatewayDestination, Hint, Name, Service, Workload};

use super::Target;

/// The reason why a connection cannot be routed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum RouteError {
    #[error("service {service} has no port {port}")]
    NoPort { service: Arc<Service>, port: u16 },
    #[error("none of the {} healthy endpoints of service {service} is usable for port {port}", service.endpoints.len())]
    NoEndpoint {
        service: Arc<Service>,
        port: u16,
        #[source]
        nearest: Unusable,
    },
    #[error(
        "the waypoint {waypoint} is unknown in the mesh, hidden from this namespace or an address that several workloads share"
    )]
    UnknownWaypoint { waypoint: GatewayDestination },
    #[error(
        "the network gateway {gateway} is unknown in the mesh, hidden from this namespace or an address that several workloads \
         share"
    )]
    UnknownGateway { gateway: GatewayDestination },
    #[error("workload {workload} cannot be reached")]
    UnusableWorkload {
        workload: Arc<Workload>,
        #[source]
        reason: Unusable,
    },
    #[error("several workloads share {address}, and one of them requires HBONE")]
    SharedAddress { address: IpAddr },
    #[error("the tunnel requests {requested}, but it ends at {here}")]
    NotHere { requested: Target, here: SocketAddr },
    #[error(
        "the tunnel requests service {hostname}, which is unknown in the mesh or hidden from this namespace"
    )]
    UnknownService { hostname: Name },
    #[error(
        "the tunnel requests service {service}, but the local workload is neither its endpoint nor its waypoint"
    )]
    NotEndpoint { service: Arc<Service> },
    #[error("service {service} has no address for the PROXY header")]
    NoVip { service: Arc<Service> },
}

impl RouteError {
    /// Whether the service has no usable endpoint for the port, tried endpoints aside.
    pub(super) fn has_no_endpoint_for_port(&self) -> bool {
        match self {
            Self::NoPort { .. } => true,
            Self::NoEndpoint { nearest, .. } => *nearest != Unusable::Tried,
            _ => false,
        }
    }

    /// A stable code for the access log.
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::NoPort { .. } => "no_service_port",
            Self::NoEndpoint { .. } => "no_healthy_upstream",
            Self::UnknownWaypoint { .. } => "unknown_waypoint",
            Self::UnknownGateway { .. } => "unknown_network_gateway",
            Self::UnusableWorkload { .. } => "no_valid_destination",
            Self::SharedAddress { .. } => "shared_address",
            Self::NotHere { .. } => "not_here",
            Self::UnknownService { .. } => "unknown_service",
            Self::NotEndpoint { .. } => "not_endpoint",
            Self::NoVip { .. } => "no_vip",
        }
    }
}

impl Hint for RouteError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        let fixed = match self {
            Self::NoEndpoint { nearest, .. } => return nearest.hint(),
            Self::UnusableWorkload { reason, .. } => return reason.hint(),
            Self::NoPort { .. } => {
                "add the port to `ports` of the service, or connect to another port"
            }
            Self::UnknownWaypoint { .. } | Self::UnknownGateway { .. } => {
                "name it by the hostname of its service"
            }
            Self::SharedAddress { .. } => "connect to a service of the workload",
            Self::NoVip { .. } => "add an address to `vips` of the service",
            Self::NotHere { .. } | Self::UnknownService { .. } | Self::NotEndpoint { .. } => {
                "check that the peer has the same mesh as this proxy"
            }
        };
        Some(fixed.into())
    }
}

/// The reason why a workload cannot be used, in the order of the checks. For a service, the error
/// reports the reason of the endpoint that passed the most checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Error)]
pub(crate) enum Unusable {
    #[error("the service has no healthy workload")]
    NoHealthyWorkload,
    #[error("the port is named, and no endpoint defines its number")]
    NoPort,
    #[error("the workload accepts no connections: its `capacity` is 0")]
    NoCapacity,
    #[error("the workload has neither an address nor a hostname")]
    NoAddress,
    #[error("the workload has no address of the service's families (`ipFamilies`)")]
    NoAddressOfFamily,
    #[error("the workload is in another network, in which only services are reachable")]
    OtherNetwork,
    #[error("the workload is in another network and has no gateway")]
    NoGateway,
    #[error(
        "the workload is in another network, and the service has no `subjectAltNames`, which identify a peer behind a gateway"
    )]
    NoSubjectAltNames,
    #[error("the workload does not match all preferences of a service in Strict mode")]
    NotNear,
    #[error("an earlier attempt of this connection at the workload failed")]
    Tried,
}

impl Hint for Unusable {
    fn hint(&self) -> Option<Cow<'static, str>> {
        let fixed = match self {
            Self::NoHealthyWorkload => "check `status` of the workloads of the service",
            Self::NoPort => "define the named port in `services` of the workload",
            Self::NoCapacity => "raise `capacity` of the workload",
            Self::NoAddress => "set `workloadIps` or `hostname` of the workload",
            Self::NoAddressOfFamily => {
                "add an address of the family to `workloadIps`, or change `ipFamilies` of the service"
            }
            Self::OtherNetwork => "connect to a service of the workload",
            Self::NoGateway => "set `networkGateway` of the workload",
            Self::NoSubjectAltNames => "set `subjectAltNames` of the service",
            Self::NotNear => "add an endpoint in the same locality, or change `loadBalancing.mode`",
            Self::Tried => return None,
        };
        Some(fixed.into())
    }
}
