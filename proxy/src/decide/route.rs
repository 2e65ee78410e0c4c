//! Where a caught connection goes: pure functions of its original destination and a snapshot of the mesh.
//!
//! Not here: whether it may go there (`policy.rs`), looking hostnames up (`resolve.rs`), and going there (`outbound.rs`).

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

pub(crate) use error::{RouteError, Unfit};
pub(crate) use inbound::{InboundTarget, inbound};
#[cfg(test)]
pub(crate) use load_balancing::Choose;
pub(crate) use load_balancing::EndpointSelector;
pub(crate) use outbound::{Alternatives, outbound};

/// Who opened a connection that goes out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Caller<'a> {
    /// The network in which the destination's address means something.
    pub(crate) network: &'a str,
    /// The namespace that decides which services it can see.
    pub(crate) namespace: &'a str,
    /// What the mesh knows of it.
    pub(crate) workload: Option<&'a Workload>,
    /// The client's address.
    pub(crate) address: IpAddr,
    /// Who it proves to be.
    pub(crate) identity: Option<&'a SpiffeId>,
    /// The port at which workloads take tunnels.
    pub(crate) hbone_port: u16,
}

/// The way to a destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Route {
    /// What is dialled, and what goes through the connection.
    pub(crate) via: ForwardVia,
    /// Who is dialled, if the mesh knows: the destination, a waypoint or the gateway of another network.
    pub(crate) workload: Option<Arc<Workload>>,
    /// The service that was addressed.
    pub(crate) service: Option<Arc<Service>>,
    /// The endpoint of a service, or of its waypoint, that was chosen among several.
    pub(crate) endpoint: Option<EndpointKey>,
    /// The endpoint of the other network's gateway that was chosen among several.
    pub(crate) gateway: Option<EndpointKey>,
}

impl Route {
    /// Which of several endpoints it is that cannot be reached if dialling fails; `None`: there is no other to try.
    pub(crate) fn dialled(&self) -> Option<&EndpointKey> {
        self.gateway.as_ref().or(self.endpoint.as_ref())
    }

    /// All that the connection is a load for.
    pub(crate) fn endpoints(&self) -> impl Iterator<Item = &EndpointKey> {
        self.endpoint.iter().chain(&self.gateway)
    }
}

/// How a destination is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ForwardVia {
    /// By plain TCP.
    Plain { to: NextHop },
    /// Through a tunnel; never otherwise, whatever fails.
    Tunnel {
        /// Where the tunnel ends.
        to: NextHop,
        /// Any of these is who must be there.
        peers: Arc<[SpiffeId]>,
        /// What the CONNECT request asks for.
        authority: Authority,
    },
    /// Through a tunnel that goes to the gateway of another network through a tunnel.
    DoubleTunnel {
        /// Where the outer tunnel ends.
        gateway: NextHop,
        /// Any of these is who must be there.
        gateway_peers: Arc<[SpiffeId]>,
        /// Any of these is who must be at the end of the inner tunnel.
        peers: Arc<[SpiffeId]>,
        /// What the CONNECT requests of both tunnels ask for.
        authority: Target,
    },
}

impl ForwardVia {
    /// What is dialled.
    pub(crate) fn next_hop(&self) -> &NextHop {
        match self {
            Self::Plain { to }
            | Self::Tunnel { to, .. }
            | Self::DoubleTunnel { gateway: to, .. } => to,
        }
    }

    /// The identities of which the next hop must prove one; `None` in plain.
    pub(crate) fn peers(&self) -> Option<&Arc<[SpiffeId]>> {
        match self {
            Self::Plain { .. } => None,
            Self::Tunnel { peers, .. } | Self::DoubleTunnel { gateway_peers: peers, .. } => {
                Some(peers)
            }
        }
    }

    /// The address that the tunnel by the next hop at `hop` leads to, if it is known here.
    pub(crate) fn target(&self, hop: SocketAddr) -> Option<SocketAddr> {
        let target = match self {
            Self::Plain { .. } => return None,
            Self::Tunnel { authority, .. } => authority.at(hop.ip()),
            Self::DoubleTunnel { authority, .. } => authority.clone(),
        };
        match target {
            Target::Address(address) => Some(address),
            Target::Hostname(..) => None,
        }
    }
}

/// What is dialled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NextHop {
    /// An address.
    Address(SocketAddr),
    /// Whatever address of `families` DNS has for `hostname`.
    Hostname {
        /// The name that is looked up.
        hostname: Name,
        /// The port at the address that is found.
        port: u16,
        /// The families of which the address may be.
        families: IpFamilies,
        /// Which family is taken if both are there: the client's.
        prefer_v6: bool,
    },
}

/// What a tunnel's CONNECT request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Authority {
    /// This.
    Known(Target),
    /// This port at the address that was dialled: a peer whose address DNS tells takes no other name.
    AtNextHop(u16),
}

impl Authority {
    /// What is asked for once it is known which address is dialled.
    pub(crate) fn at(&self, dialled: IpAddr) -> Target {
        match self {
            Self::Known(target) => target.clone(),
            Self::AtNextHop(port) => Target::Address(SocketAddr::new(dialled, *port)),
        }
    }
}

/// The end of a tunnel as its CONNECT request names it (RFC 9113 section 8.5).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    /// An address and port.
    Address(SocketAddr),
    /// The hostname and port of a service.
    Hostname(Name, u16),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Hostname(hostname, port) => write!(f, "{hostname}:{port}"),
        }
    }
}
