//! Routes caught connections: pure functions of the original destination and a snapshot of the
//! mesh.
//!
//! Authorization is in `policy.rs`, hostname lookup in `resolve.rs`, and dialling in
//! `traffic/outbound.rs`.

mod error;
mod inbound;
mod load_balancing;
mod outbound;

#[cfg(test)]
mod invariants;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::decide::endpoint_health::EndpointKey;
use underpass_config::{IpFamilies, Name, Service, SpiffeId, Workload};
use underpass_hbone::socket_address_text;

pub(crate) use error::{RouteError, Unusable};
pub(crate) use inbound::{InboundTarget, inbound};
pub(crate) use load_balancing::EndpointSelector;
#[cfg(test)]
pub(crate) use load_balancing::SelectionInputs;
pub(crate) use outbound::{Alternatives, outbound};

/// The client of an outbound connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Caller<'a> {
    /// The network of the destination's address; networks may use the same addresses.
    pub(crate) network: &'a str,
    /// The client's namespace, which determines the visible services.
    pub(crate) namespace: &'a str,
    /// The client's workload in the mesh, if there is one.
    pub(crate) workload: Option<&'a Workload>,
    /// The client's address.
    pub(crate) address: IpAddr,
    /// The identity of the client's certificate.
    pub(crate) identity: Option<&'a SpiffeId>,
    /// The port of HBONE listeners.
    pub(crate) hbone_port: u16,
}

/// The route to a destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Route {
    /// The next hop and the protocol to it.
    pub(crate) via: ForwardVia,
    /// The workload that is dialled, if the mesh has it: the destination, a waypoint or a network
    /// gateway.
    pub(crate) workload: Option<Arc<Workload>>,
    /// The service of the original destination.
    pub(crate) service: Option<Arc<Service>>,
    /// The selected endpoint of the service or of its waypoint; `None` if there is only one
    /// endpoint.
    pub(crate) endpoint: Option<EndpointKey>,
    /// The selected endpoint of the network gateway; `None` if there is only one endpoint.
    pub(crate) gateway: Option<EndpointKey>,
}

impl Route {
    /// The endpoint to eject if dialling fails; `None` if there is no alternative endpoint.
    pub(crate) fn dialled(&self) -> Option<&EndpointKey> {
        self.gateway.as_ref().or(self.endpoint.as_ref())
    }

    /// The endpoints that count this connection as open.
    pub(crate) fn endpoints(&self) -> impl Iterator<Item = &EndpointKey> {
        self.endpoint.iter().chain(&self.gateway)
    }
}

/// The way to reach a destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ForwardVia {
    /// Plain TCP.
    Plain { to: NextHop },
    /// Through a tunnel. There is no fallback to plain TCP.
    Tunnel {
        /// The peer's HBONE listener.
        to: NextHop,
        /// The identities of which the peer must prove one.
        peers: Arc<[SpiffeId]>,
        /// The `:authority` of the CONNECT request.
        authority: Authority,
    },
    /// Through a tunnel inside a tunnel to the gateway of another network.
    DoubleTunnel {
        /// The gateway's HBONE listener.
        gateway: NextHop,
        /// The identities of which the peer must prove one.
        gateway_peers: Arc<[SpiffeId]>,
        /// The identities of which the peer behind the gateway must prove one.
        peers: Arc<[SpiffeId]>,
        /// The `:authority` of the CONNECT requests of both tunnels.
        authority: Target,
    },
}

impl ForwardVia {
    /// The address or hostname to dial.
    pub(crate) fn next_hop(&self) -> &NextHop {
        match self {
            Self::Plain { to }
            | Self::Tunnel { to, .. }
            | Self::DoubleTunnel { gateway: to, .. } => to,
        }
    }

    /// The identities of which the next hop must prove one; `None` for plain TCP.
    pub(crate) fn peers(&self) -> Option<&Arc<[SpiffeId]>> {
        match self {
            Self::Plain { .. } => None,
            Self::Tunnel { peers, .. } | Self::DoubleTunnel { gateway_peers: peers, .. } => {
                Some(peers)
            }
        }
    }

    /// The address that the CONNECT request names when `hop` is dialled; `None` without a tunnel,
    /// or if it names a hostname.
    pub(crate) fn target(&self, hop: SocketAddr) -> Option<SocketAddr> {
        let target = match self {
            Self::Plain { .. } => return None,
            Self::Tunnel { authority, .. } => authority.target(hop.ip()),
            Self::DoubleTunnel { authority, .. } => authority.clone(),
        };
        match target {
            Target::Address(address) => Some(address),
            Target::Hostname(..) => None,
        }
    }
}

/// The address or hostname to dial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NextHop {
    /// An address.
    Address(SocketAddr),
    /// An address of `families` that DNS has for `hostname`.
    Hostname {
        /// The hostname to look up.
        hostname: Name,
        /// The port to dial.
        port: u16,
        /// The accepted address families.
        families: IpFamilies,
        /// Whether IPv6 is preferred if DNS has both families: the client's family.
        prefer_v6: bool,
    },
}

/// The `:authority` of a tunnel's CONNECT request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Authority {
    /// A target that the route determines.
    KnownEndpoint(Target),
    /// This port at the dialled address: a peer that is dialled by hostname accepts only its own
    /// address.
    AtNextHop(u16),
}

impl Authority {
    /// The target of the request after the peer was dialled at `dialled`.
    pub(crate) fn target(&self, dialled: IpAddr) -> Target {
        match self {
            Self::KnownEndpoint(target) => target.clone(),
            Self::AtNextHop(port) => Target::Address(SocketAddr::new(dialled, *port)),
        }
    }
}

/// The destination of a tunnel in its CONNECT request (RFC 9113 section 8.5).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    /// An address and port.
    Address(SocketAddr),
    /// The hostname and port of a service.
    Hostname(Name, u16),
}

impl Target {
    /// The `:authority` of the CONNECT request.
    pub(crate) fn authority(&self) -> String {
        match self {
            Self::Address(address) => socket_address_text(*address),
            Self::Hostname(hostname, port) => format!("{hostname}:{port}"),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Hostname(hostname, port) => write!(f, "{hostname}:{port}"),
        }
    }
}
