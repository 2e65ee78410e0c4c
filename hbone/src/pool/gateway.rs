//! Opens a stream to a peer behind a gateway: an inner tunnel in a stream of a pooled tunnel to the
//! gateway ("double HBONE").
//!
//! ```text
//! client ═════════ pooled tunnel ═════════ gateway ── TCP ── peer
//!        ─────── its stream: TLS bytes ───────     ──────────
//!        ┄┄┄┄┄┄┄┄┄ inner tunnel with one stream ┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄
//! ```
//!
//! The caller selects the gateway and the expected peers.

use std::sync::Arc;

use underpass_config::SpiffeId;

use super::{Dial, Pool, TunnelKey};
use crate::error::HboneError;
use crate::tunnel::client::{ConnectRequest, Connector};
use crate::tunnel::stream::TunnelStream;

impl<D: Dial> Pool<D> {
    /// Opens a stream to one of `peers` through `gateway`, which selects the peer by the request
    /// `outer`. The peer receives the request `inner`; the gateway sees neither that request nor
    /// the data.
    ///
    /// Connections share only the tunnel to the gateway. The inner tunnel has one stream and ends
    /// with it, because the gateway selects a peer for each stream. It ends at once when the
    /// gateway is no longer trusted.
    ///
    /// TLS resumes an inner session if the gateway selects the same peer again. Another peer cannot
    /// decrypt the ticket, and makes a full handshake. A resumed peer's certificate is verified
    /// again.
    ///
    /// The pool's timeouts apply twice: to the handshake and answer of the outer tunnel, and to
    /// those of the inner tunnel.
    ///
    /// # Errors
    /// Errors of the gateway as from [`Pool::connect`]. [`HboneError::BehindGateway`] for errors of
    /// the inner tunnel.
    pub async fn connect_through(
        &self,
        gateway: &TunnelKey,
        connector: &Connector,
        outer: impl Fn() -> ConnectRequest,
        peers: &[SpiffeId],
        inner: impl FnOnce() -> ConnectRequest,
    ) -> Result<TunnelStream, HboneError> {
        let carrier = self.connect(gateway, connector, outer).await?;
        let stream = self.connect_inside(carrier, gateway, connector, peers, inner);
        stream.await.map_err(|source| HboneError::BehindGateway {
            gateway: gateway.address,
            source: Arc::new(source),
        })
    }

    async fn connect_inside(
        &self,
        carrier: TunnelStream,
        gateway: &TunnelKey,
        connector: &Connector,
        peers: &[SpiffeId],
        request: impl FnOnce() -> ConnectRequest,
    ) -> Result<TunnelStream, HboneError> {
        let settings = &self.0.settings;
        let opening = connector.open_inside(carrier, gateway.address, peers, settings.handshake);
        opening.await?.connect(request(), settings.reply).await
    }
}

#[cfg(test)]
mod tests;
