//! The facts that decide whether a connection is allowed, and the decision on it.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::time::Instant;
use underpass_config::{SpiffeId, TrustDomain};
use underpass_hbone::PeerIdentity;

use crate::decide::connection_registry::index::{Indexed, IndexedBy};
use crate::observe::record::{ConnectionRecord, TrackedConnection};

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

impl Inbound {
    /// The address of the client.
    pub(crate) fn source(&self) -> SocketAddr {
        self.source
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

/// The decision on a registered connection, stream or tunnel, and its content in lists.
#[derive(Debug, Default)]
pub(crate) struct Decision {
    /// Whether it is a tunnel of a peer, or a connection to the pod; known before the permit.
    is_inbound: bool,
    /// The permit; empty for tunnels, and before the first permit. Dialling another endpoint
    /// replaces it.
    pub(super) permitted: Option<Permitted>,
    /// The open connection or tunnel; `None` while it is being opened.
    pub(crate) open: Option<Open>,
}

/// An open connection or tunnel.
#[derive(Debug)]
pub(crate) enum Open {
    Connection(Arc<TrackedConnection>),
    /// A tunnel of a peer.
    Tunnel(Box<PeerTunnel>),
}

/// A tunnel that a peer has opened.
#[derive(Debug, Clone)]
pub(crate) struct PeerTunnel {
    pub(crate) client: SocketAddr,
    pub(crate) identity: SpiffeId,
    pub(crate) accepted: Instant,
}

impl Decision {
    /// Before the first permit. `is_inbound`: a tunnel of a peer, or a connection to the pod.
    pub(crate) fn undecided(is_inbound: bool) -> Self {
        Self { is_inbound, permitted: None, open: None }
    }

    pub(super) fn permitted(permitted: Permitted) -> Self {
        let is_inbound = matches!(permitted.subject, Subject::Inbound(_));
        Self { is_inbound, permitted: Some(permitted), open: None }
    }

    /// Shows the open connection of `record` in lists.
    pub(crate) fn list(&mut self, record: &ConnectionRecord) {
        self.open = Some(Open::Connection(record.connection().clone()));
    }

    /// Shows an open tunnel of a peer in lists.
    pub(crate) fn list_tunnel(&mut self, client: SocketAddr, identity: &SpiffeId) {
        let (identity, accepted) = (identity.clone(), Instant::now());
        self.open = Some(Open::Tunnel(Box::new(PeerTunnel { client, identity, accepted })));
    }

    /// Whether it is a tunnel of a peer, or a connection to the pod, with or without a permit.
    pub(crate) fn is_inbound(&self) -> bool {
        self.is_inbound
    }

    /// The permitted connection that is being opened.
    pub(crate) fn connecting(&self) -> Option<&Subject> {
        let permitted = self.permitted.as_ref().filter(|_| self.open.is_none());
        permitted.map(|permitted| &permitted.subject)
    }
}

impl Indexed for Decision {
    fn indexed_by(&self) -> IndexedBy {
        match self.permitted.as_ref().map(|permitted| &permitted.subject) {
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
