//! A stream through a gateway to a peer behind it: a tunnel of its own inside of a pooled tunnel's
//! stream ("double HBONE").
//!
//! ```text
//! we ═════════════ pooled tunnel ═════════════ gateway ── TCP ── peer
//!    ───────── its stream: bytes of TLS ─────────     ──────────
//!    ┄┄┄┄┄┄┄┄┄┄┄ inner tunnel with one stream ┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄
//! ```
//!
//! Not here: which gateway, and who may be behind it.

use std::sync::Arc;

use underpass_config::SpiffeId;

use super::{Dial, Pool, TunnelKey};
use crate::error::HboneError;
use crate::tunnel::client::{ConnectRequest, Connector};
use crate::tunnel::stream::TunnelStream;

impl<D: Dial> Pool<D> {
    /// Opens a stream as `inner` asks at one of `peers`, whom `gateway` chooses as `outer` asks.
    /// The gateway sees neither the request nor the bytes; the stream's peer is the one behind it.
    ///
    /// Only the tunnel to the gateway is shared. The inner one has one stream and ends with it, for
    /// the gateway chooses anew only for a new one; it ends at once when the gateway is not to be
    /// trusted any longer.
    ///
    /// A session with any of the same `peers` behind the same gateway is resumed if the gateway
    /// leads to where it began: another one cannot read the ticket, and proves itself anew. A
    /// resumed peer's certificate is judged again, like any.
    ///
    /// The inner handshake and answer have the pool's deadlines, each once more.
    ///
    /// # Errors
    /// As [`Pool::connect`] for the gateway; [`HboneError::BehindGateway`] for everything behind
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
