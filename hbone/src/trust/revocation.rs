//! Verifies the peer of an open tunnel again when the trust changes, so that a revocation ends the
//! tunnel. The verification itself is in `trust/authorities.rs`.

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

/// Monitors one tunnel.
pub(crate) struct RevocationMonitor(Pin<Box<dyn Future<Output = HboneError> + Send + Sync>>);

impl RevocationMonitor {
    /// `credentials` were last read for the handshake with `peer`, which `authorities` verified. A
    /// tunnel inside `carrier`, a stream of another tunnel, is trusted only as long as that one.
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

    /// A monitor that completes with `reason`.
    #[cfg(test)]
    pub(crate) fn testing(
        reason: impl Future<Output = HboneError> + Send + Sync + 'static,
    ) -> Self {
        Self(Box::pin(reason))
    }

    /// Ready, once, when the peer is no longer trusted.
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
            // Without a publisher the trust does not change.
            return pending().await;
        }
        let current = credentials.borrow_and_update().authorities().clone();
        // Our own new certificate changes no peer's trust: skip the signatures.
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
