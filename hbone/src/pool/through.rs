//! A stream through a gateway to a peer behind it: an inner tunnel in a stream of a pooled tunnel
//! ("double HBONE").
//!
//! ```text
//! we ═════════════ pooled tunnel ═════════════ gateway ── TCP ── peer
//!    ───────── its stream: bytes of TLS ─────────     ──────────
//!    ┄┄┄┄┄┄┄┄┄┄┄ inner tunnel with one stream ┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄
//! ```
//!
//! Not here: selecting the gateway and the expected peers.

use std::sync::Arc;

use underpass_config::SpiffeId;

use super::{Dial, Pool, TunnelKey};
use crate::error::HboneError;
use crate::tunnel::client::{ConnectRequest, Connector};
use crate::tunnel::stream::TunnelStream;

impl<D: Dial> Pool<D> {
    /// Opens a stream with the request `inner` at one of `peers`, which `gateway` selects by the
    /// request `outer`. The gateway sees neither the inner request nor the data; the stream's peer
    /// is the one behind the gateway.
    ///
    /// Only the tunnel to the gateway is shared. The inner tunnel has one stream and ends with it,
    /// because the gateway selects a peer per stream. It ends at once when the gateway is no longer
    /// trusted.
    ///
    /// A session with any of the same `peers` behind the same gateway is resumed if the gateway
    /// selects the same peer. Another peer cannot decrypt the ticket and makes a full handshake.
    /// The certificate of a resumed peer is verified again.
    ///
    /// The inner handshake and answer have the pool's timeouts again.
    ///
    /// # Errors
    /// Like [`Pool::connect`] for the gateway; [`HboneError::BehindGateway`] for failures behind
    /// it.
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
