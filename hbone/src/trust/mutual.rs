//! Trust between two identities of one process, whose connections need no tunnel. The checks are
//! those of a handshake.
//!
//! `trust::authorities` verifies the chains; this is not authorization.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use underpass_config::SpiffeId;

use crate::error::{ExpectedPeer, HboneError};
use crate::identity::credentials::Credentials;
use crate::task::log_panic;
use crate::tls::{Peer, PeerIdentity, RejectedPeer};
use crate::trust::revocation::RevocationMonitor;
use crate::tunnel::tunnel_state::{RevocationSignal, TunnelState};

/// Two identities that trust each other, like the ends of a tunnel, until either no longer trusts
/// the other.
#[derive(Debug)]
pub struct MutualTrust {
    generations: [Credentials; 2],
    /// The server's identity and revocation, as verified by the client.
    server: Arc<TunnelState>,
    /// The client's identity and revocation, as verified by the server.
    client: Arc<TunnelState>,
    monitoring: AbortHandle,
}

/// The reason why two identities do not trust each other. Each side has its own error, as in a
/// handshake.
#[derive(Debug, Clone)]
pub struct MutualTrustError {
    /// The error that the client would report.
    pub client: HboneError,
    /// The error that the server would report.
    pub server: HboneError,
}

impl MutualTrust {
    /// Verifies that the server has an `expected` identity, then that the client's trust domain has
    /// known roots. Spawns a task on the current runtime that follows changes of trust.
    ///
    /// # Errors
    /// The errors of both sides.
    pub fn establish(
        client: &watch::Receiver<Credentials>,
        server: &watch::Receiver<Credentials>,
        expected: &Arc<[SpiffeId]>,
    ) -> Result<Self, Box<MutualTrustError>> {
        // Subscribe before verifying, so that the monitors observe all later changes.
        let (mut client, mut server) = (client.clone(), server.clone());
        let [own, other] =
            [&mut client, &mut server].map(|credentials| credentials.borrow_and_update().clone());
        let expected = ExpectedPeer::OneOf(expected.clone());
        let server_peer = verify(&own, &other, expected).map_err(|rejected| {
            let RejectedPeer { reason: client, seen_by_peer: server } = *rejected;
            Box::new(MutualTrustError { client, server })
        })?;
        let any_member = other.authorities().any_member();
        let client_peer = verify(&other, &own, any_member).map_err(|rejected| {
            let RejectedPeer { reason: server, seen_by_peer: client } = *rejected;
            Box::new(MutualTrustError { client, server })
        })?;
        let usable_until = server_peer.expires.min(client_peer.expires);
        let now = Instant::now();
        let state = |peer: &Peer| TunnelState::new(peer.identity.clone(), now, usable_until);
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

    /// Returns true if a new connection may start: both identities and their trust are unchanged
    /// since they were verified, are still monitored, and have not expired.
    pub fn is_current(&self, client: &Credentials, server: &Credentials) -> bool {
        let [own, other] = &self.generations;
        let is_same = own.is_same(client) && other.is_same(server);
        is_same && !self.monitoring.is_finished() && !self.server.is_expired()
    }

    /// The server's identity, verified by the client.
    pub fn server(&self) -> &PeerIdentity {
        self.server.peer()
    }

    /// The client's identity, verified by the server.
    pub fn client(&self) -> &PeerIdentity {
        self.client.peer()
    }

    /// A signal that completes when the client no longer trusts the server.
    pub fn server_revocation(&self) -> RevocationSignal {
        self.server.revocation()
    }

    /// A signal that completes when the server no longer trusts the client.
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

/// Revokes each side that the other no longer trusts. Revokes both after a panic of a monitor.
async fn follow(ends: [(RevocationMonitor, Arc<TunnelState>); 2]) {
    let peers = ends.each_ref().map(|(_, peer)| peer.clone());
    let [client, server] = ends.map(|(mut monitor, peer)| async move {
        let reason = std::future::poll_fn(|cx| monitor.poll_distrusted(cx)).await;
        peer.revoke(reason);
    });
    log_panic("monitor of revocations", async { tokio::join!(client, server) }).await;
    // If no monitor panicked, both are revoked already, and the first reason stays.
    for peer in peers {
        peer.revoke(HboneError::Lost { source: None });
    }
}

#[cfg(test)]
mod tests;
