//! The trust between two identities of one process, checked as a handshake between them would check
//! it. Their connections need no tunnel.
//!
//! Not here: the verification itself (`trust/authorities.rs`), and authorization.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::AbortHandle;
use underpass_config::SpiffeId;

use crate::error::{ExpectedPeer, HboneError};
use crate::identity::credentials::Credentials;
use crate::task::log_panic;
use crate::tls::{Peer, PeerIdentity, RejectedPeer};
use crate::trust::revocation::RevocationMonitor;
use crate::tunnel::tunnel_state::{RevocationSignal, TunnelState};

/// Two identities that trust each other, like the ends of a tunnel. It ends when either no longer
/// trusts the other.
#[derive(Debug)]
pub struct MutualTrust {
    generations: [Credentials; 2],
    /// The server as the client has verified it.
    server: Arc<TunnelState>,
    /// The client as the server has verified it.
    client: Arc<TunnelState>,
    monitoring: AbortHandle,
}

/// Why two identities do not trust each other, with the error of each as in a handshake.
#[derive(Debug, Clone)]
pub struct Distrust {
    /// The client's error.
    pub client: HboneError,
    /// The server's error.
    pub server: HboneError,
}

impl MutualTrust {
    /// Verifies the server, which must be one of `expected`, and then the client, which must belong
    /// to a trust domain with known roots. A task on the caller's runtime follows changes of trust.
    ///
    /// # Errors
    /// The end that rejects the other, and its reason.
    pub fn establish(
        client: &watch::Receiver<Credentials>,
        server: &watch::Receiver<Credentials>,
        expected: &Arc<[SpiffeId]>,
    ) -> Result<Self, Box<Distrust>> {
        // The monitors observe all changes after this point.
        let (mut client, mut server) = (client.clone(), server.clone());
        let [own, other] =
            [&mut client, &mut server].map(|credentials| credentials.borrow_and_update().clone());
        let expected = ExpectedPeer::OneOf(expected.clone());
        let server_peer = verify(&own, &other, expected).map_err(|rejected| {
            let RejectedPeer { reason: client, seen_by_peer: server } = *rejected;
            Box::new(Distrust { client, server })
        })?;
        let any_member = other.authorities().any_member();
        let client_peer = verify(&other, &own, any_member).map_err(|rejected| {
            let RejectedPeer { reason: server, seen_by_peer: client } = *rejected;
            Box::new(Distrust { client, server })
        })?;
        let usable_until = server_peer.expires.min(client_peer.expires);
        let state = |peer: &Peer| TunnelState::new(peer.identity.clone(), usable_until);
        let (server_state, client_state) = (state(&server_peer), state(&client_peer));
        let monitor = |follows, credentials: &Credentials, peer| {
            RevocationMonitor::new(follows, credentials.authorities().clone(), peer, None)
        };
        let ends = [
            (monitor(client, &own, server_peer), server_state.clone()),
            (monitor(server, &other, client_peer), client_state.clone()),
        ];
        let monitoring = tokio::spawn(follow(ends)).abort_handle();
        Ok(Self {
            generations: [own, other],
            server: server_state,
            client: client_state,
            monitoring,
        })
    }

    /// Whether a connection may start: both ends still have the verified certificates and trust,
    /// which are still monitored, and no certificate has expired.
    pub fn is_current(&self, client: &Credentials, server: &Credentials) -> bool {
        let [own, other] = &self.generations;
        let is_same = own.is_same(client) && other.is_same(server);
        is_same && !self.monitoring.is_finished() && !self.server.is_expired()
    }

    /// The identity that the server has proven to the client.
    pub fn server(&self) -> &PeerIdentity {
        self.server.peer()
    }

    /// The identity that the client has proven to the server.
    pub fn client(&self) -> &PeerIdentity {
        self.client.peer()
    }

    /// Completes when the client no longer trusts the server.
    pub fn server_revocation(&self) -> RevocationSignal {
        self.server.revocation()
    }

    /// Completes when the server no longer trusts the client.
    pub fn client_revocation(&self) -> RevocationSignal {
        self.client.revocation()
    }
}

impl Drop for MutualTrust {
    fn drop(&mut self) {
        self.monitoring.abort();
    }
}

fn verify(
    by: &Credentials,
    peer: &Credentials,
    expected: ExpectedPeer,
) -> Result<Peer, Box<RejectedPeer>> {
    Peer::of_chain(peer.identity().chain(), by.authorities(), expected)
}

/// Signals each end that no longer trusts its peer; both ends after a panic of a monitor.
async fn follow(ends: [(RevocationMonitor, Arc<TunnelState>); 2]) {
    let peers = ends.each_ref().map(|(_, peer)| peer.clone());
    let [client, server] = ends.map(|(mut monitor, peer)| async move {
        let reason = std::future::poll_fn(|cx| monitor.poll_distrusted(cx)).await;
        peer.revoke(reason);
    });
    log_panic("monitor of revocations", async { tokio::join!(client, server) }).await;
    // Without a panic both are revoked already, and the first reason stays.
    for peer in peers {
        peer.revoke(HboneError::Lost { source: None });
    }
}

#[cfg(test)]
mod tests;
