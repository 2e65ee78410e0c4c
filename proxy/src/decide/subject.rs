//! The facts that decide whether a connection is allowed, and the decision on it.

use std::net::SocketAddr;
use std::sync::Arc;

use underpass_config::{SpiffeId, TrustDomain};
use underpass_hbone::PeerIdentity;

use crate::decide::connection_registry::index::{Indexed, IndexedBy};

/// The facts of a connection that decide whether it is allowed.
#[derive(Debug)]
pub(crate) enum Subject {
    Outbound(Outbound),
    Inbound(Inbound),
}

/// An outbound connection.
#[derive(Debug)]
pub(crate) struct Outbound {
    /// The original destination.
    pub(crate) asked: SocketAddr,
    /// The address to dial: the application, or the other end of the tunnel.
    pub(crate) hop: SocketAddr,
    /// The identities that the other end of the tunnel may have; `None` for plaintext.
    pub(crate) peers: Option<Arc<[SpiffeId]>>,
    /// Whether the address identifies the workload: it is in our network, and no service has
    /// selected among several workloads at the address.
    pub(crate) by_address: bool,
}

/// An inbound connection.
#[derive(Debug)]
pub(crate) struct Inbound {
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
    /// The client of a tunnel; `None` for plaintext.
    pub(super) principal: Option<Principal>,
}

/// A proven identity, and the aliases of its trust domain that policies may use for it.
#[derive(Debug, Clone)]
pub(crate) struct Principal {
    pub(super) id: SpiffeId,
    pub(super) aliases: Arc<[TrustDomain]>,
}

impl From<&PeerIdentity> for Principal {
    fn from(peer: &PeerIdentity) -> Self {
        Self { id: peer.spiffe_id().clone(), aliases: peer.aliases().clone() }
    }
}

impl Subject {
    /// A connection from `source` to the application at `destination`. The tunnel that carries it
    /// has proven `principal`.
    pub(crate) fn inbound(
        source: SocketAddr,
        destination: SocketAddr,
        principal: Option<Principal>,
    ) -> Self {
        let source = SocketAddr::new(source.ip().to_canonical(), source.port());
        Self::Inbound(Inbound { source, destination, principal })
    }

    /// The address that the proxy connects to.
    pub(crate) fn destination(&self) -> SocketAddr {
        match self {
            Self::Outbound(outbound) => outbound.hop,
            Self::Inbound(inbound) => inbound.destination,
        }
    }
}

/// The permit of a registered connection or stream; empty for tunnels, and before the first permit.
/// Dialling another endpoint replaces it.
#[derive(Debug, Default)]
pub(crate) struct Decision(pub(super) Option<Permitted>);

impl Indexed for Decision {
    fn indexed_by(&self) -> IndexedBy {
        match self.0.as_ref().map(|permitted| &permitted.subject) {
            None => IndexedBy::Nothing,
            Some(Subject::Inbound(inbound)) => {
                IndexedBy::Inbound(inbound.destination.ip().to_canonical())
            }
            Some(Subject::Outbound(Outbound { asked, hop, .. })) => {
                IndexedBy::Outbound([asked, hop].map(|address| address.ip().to_canonical()))
            }
        }
    }
}

/// A permitted connection, which is checked again when the mesh changes.
#[derive(Debug)]
pub(super) struct Permitted {
    pub(super) subject: Subject,
    /// The generation of the mesh that permitted it.
    pub(super) generation: u64,
}
