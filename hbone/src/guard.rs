//! What makes a revocation reach tunnels that are open: each judges its peer again when the trust changes.
//!
//! Not here: judging (`trust/authorities.rs`), and ending the tunnel.

use std::fmt;
use std::future::pending;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::sync::watch;

use crate::link::OpenStream;
use crate::tls::Peer;
use crate::trust::Authorities;
use crate::{Credentials, HboneError};

/// Watches over one tunnel.
pub(crate) struct Guard(Pin<Box<dyn Future<Output = HboneError> + Send + Sync>>);

impl Guard {
    /// `credentials` were last read for the handshake with `peer`, which `authorities` judged. The tunnel may run inside of
    /// `carrier`, a stream of another one: it is worth no more than that.
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
                    reason = carrier.link().distrusted() => reason,
                }
            })),
        }
    }

    /// Ready, once, when the peer is not to be trusted any longer.
    pub(crate) fn poll_distrusted(&mut self, cx: &mut Context<'_>) -> Poll<HboneError> {
        self.0.as_mut().poll(cx)
    }
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Guard")
    }
}

async fn until_distrusted(
    mut credentials: watch::Receiver<Credentials>,
    mut authorities: Arc<Authorities>,
    peer: Peer,
) -> HboneError {
    loop {
        if credentials.changed().await.is_err() {
            // Nobody is left to say otherwise.
            return pending().await;
        }
        let current = credentials.borrow_and_update().authorities().clone();
        // A new certificate of ours is no reason to verify the signatures of every peer.
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
