//! Why there is no way to a destination, or none from a tunnel to the workload.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use thiserror::Error;
use underpass_config::{GatewayDestination, Name, Service, Workload};

use super::Target;

/// Why a connection cannot be routed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum RouteError {
    #[error(
        "service {service} has no port {port}: does the client mean another one, or is it missing in `ports` of the service?"
    )]
    NoPort { service: Arc<Service>, port: u16 },
    #[error("none of the {} healthy endpoints of service {service} can take port {port}", service.endpoints.len())]
    NoEndpoint {
        service: Arc<Service>,
        port: u16,
        #[source]
        nearest: Unfit,
    },
    #[error(
        "the waypoint {waypoint} is unknown in the mesh, hidden from this namespace or an address that several workloads share: \
         name it by the hostname of its service"
    )]
    UnknownWaypoint { waypoint: GatewayDestination },
    #[error(
        "the network gateway {gateway} is unknown in the mesh, hidden from this namespace or an address that several workloads \
         share: name it by the hostname of its service"
    )]
    UnknownGateway { gateway: GatewayDestination },
    #[error("workload {workload} cannot be reached")]
    Unfit {
        workload: Arc<Workload>,
        #[source]
        reason: Unfit,
    },
    #[error(
        "several workloads share {address} and one of them speaks HBONE, so that nobody can tell whether plain TCP is right: \
         connect to a service of theirs"
    )]
    SharedAddress { address: IpAddr },
    #[error("the tunnel asks for {asked}, but it ends at {here}")]
    NotHere { asked: Target, here: SocketAddr },
    #[error(
        "the tunnel asks for service {hostname}, which is unknown in the mesh or hidden from this namespace"
    )]
    UnknownService { hostname: Name },
    #[error(
        "the tunnel asks for service {service}, of which the workload here is neither an endpoint nor the waypoint"
    )]
    NotEndpoint { service: Arc<Service> },
    #[error(
        "service {service} has no address that a PROXY header could carry: give it one in `vips`"
    )]
    NoVip { service: Arc<Service> },
}

impl RouteError {
    /// Whether no endpoint of the service takes the port, other than those that were tried already.
    pub(super) fn is_nobody(&self) -> bool {
        match self {
            Self::NoPort { .. } => true,
            Self::NoEndpoint { nearest, .. } => *nearest != Unfit::Tried,
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
            Self::Unfit { .. } => "no_valid_destination",
            Self::SharedAddress { .. } => "shared_address",
            Self::NotHere { .. } => "not_here",
            Self::UnknownService { .. } => "unknown_service",
            Self::NotEndpoint { .. } => "not_endpoint",
            Self::NoVip { .. } => "no_vip",
        }
    }
}

/// Why a workload cannot take a connection, in the order in which it is found out: of several endpoints the reason of the one
/// that came nearest is reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Error)]
pub(crate) enum Unfit {
    #[error("there is no workload behind it that is healthy")]
    Nobody,
    #[error(
        "the port has a name, and no endpoint says what it is: give it in `services` of the workload"
    )]
    NoPort,
    #[error("it takes no connections: its `capacity` is 0")]
    NoCapacity,
    #[error("it has neither an address nor a hostname: give one in `workloadIps` or `hostname`")]
    NoAddress,
    #[error("it has no address of the family that the service is served in (`ipFamilies`)")]
    NoAddressOfFamily,
    #[error(
        "it is in another network, where only services are reached: connect to a service of it"
    )]
    OtherNetwork,
    #[error("it is in another network and has no gateway: set `networkGateway` of the workload")]
    NoGateway,
    #[error(
        "it is in another network and the service has no `subjectAltNames`, by which alone a peer behind a gateway is known"
    )]
    NoSubjectAltNames,
    #[error("it is not near enough for a service that is balanced in Strict mode")]
    NotNear,
    #[error("it was tried already and could not be connected to")]
    Tried,
}
