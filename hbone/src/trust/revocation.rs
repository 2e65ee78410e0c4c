//! Verifies the peer of an open tunnel again when the trust changes, so that a revocation
//! terminates the tunnel. `trust::authorities` verifies.

use std::fmt;
use std::future::pending;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::sync::watch;

use crate::error::HboneError;
use crate::identity::credentials::Credentials;
use crate::tls::Peer;
use crate::trust::Authorities;
use crate::tunnel::tunnel_state::OpenStream;

/// Completes when the peer of one tunnel is no longer trusted.
pub(crate) struct RevocationMonitor(Pin<Box<dyn Future<Output = HboneError> + Send + Sync>>);

impl RevocationMonitor {
    /// Creates a monitor for a tunnel whose `peer` was verified by `authorities`, with the last
    /// value that was read from `credentials`. `carrier` is the outer tunnel, if any: its
    /// revocation applies to the inner tunnel too.
    pub(crate) fn new(
        credentials: watch::Receiver<Credentials>,
        authorities: Arc<Authorities>,
        peer: Peer,
        carrier: Option<Arc<OpenStream>>,
    ) -> Self {
        let own = until_distrusted(credentials, authorities, peer);
        match carrier {
            None => Self(Box::pin(own)),
            Some(carrier) => Self(Box::pin(async move {
                tokio::select! {
                    reason = own => reason,
                    reason = carrier.tunnel_state().revocation() => reason,
                }
            })),
        }
    }

    /// Creates a monitor that completes with `reason`.
    #[cfg(test)]
    pub(crate) fn testing(
        reason: impl Future<Output = HboneError> + Send + Sync + 'static,
    ) -> Self {
        Self(Box::pin(reason))
    }

    /// Returns `Ready` once, when the peer is no longer trusted.
    pub(crate) fn poll_distrusted(&mut self, cx: &mut Context<'_>) -> Poll<HboneError> {
        self.0.as_mut().poll(cx)
    }
}

impl fmt::Debug for RevocationMonitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RevocationMonitor")
    }
}

async fn until_distrusted(
    mut credentials: watch::Receiver<Credentials>,
    mut authorities: Arc<Authorities>,
    peer: Peer,
) -> HboneError {
    loop {
        if credentials.changed().await.is_err() {
            // The publisher of credentials is dropped: the trust does not change any more.
            return pending().await;
        }
        let current = credentials.borrow_and_update().authorities().clone();
        // A renewal of our certificate does not change the trust in peers: do not verify again.
        if !current.trust_as(&authorities)
            && let Some(reason) = peer.distrusted(&current)
        {
            return reason;
        }
        authorities = current;
    }
}

#[cfg(test)]
mod tests;
