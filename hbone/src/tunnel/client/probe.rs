//! Checks whether a peer accepts our tunnels, without opening a stream.
//!
//! In TLS 1.3 the client's handshake ends before the server has verified the client's certificate.
//! The answer to a PING proves that the server accepted it.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use h2::{Ping, PingPong};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;
use underpass_config::SpiffeId;

use super::{Connector, within};
use crate::error::HboneError;
use crate::tls::PeerIdentity;
use crate::tunnel::inspect::{Inspector, PeerRole};
use crate::tunnel::io::{Io, transport};
use crate::tunnel::tunnel_state::{Monitored, TunnelState};

impl Connector {
    /// Performs the handshakes of TLS and HTTP/2 with the server at `address`, which must have one
    /// of the `expected` identities, and one PING. Then closes the connection.
    ///
    /// # Errors
    /// As [`open`](Self::open), and [`HboneError::CertificateRefused`] if the server refuses our
    /// certificate.
    pub async fn probe<T>(
        &self,
        io: T,
        address: SocketAddr,
        expected: &[SpiffeId],
        deadline: Duration,
    ) -> Result<PeerIdentity, HboneError>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + Sync + 'static,
    {
        within(deadline, self.exchange_ping(transport(io), address, expected)).await
    }

    async fn exchange_ping(
        &self,
        io: Io,
        address: SocketAddr,
        expected: &[SpiffeId],
    ) -> Result<PeerIdentity, HboneError> {
        let credentials = self.credentials.borrow().clone();
        let began = Instant::now();
        let (stream, peer) = self.tls(&credentials, io, address, expected).await?;
        let tunnel_state = TunnelState::new(peer.identity.clone(), began, peer.expires);
        let failed = |error| tunnel_state.stream_error(error);
        let inspector = Inspector::new(PeerRole::Server, self.settings.http2.max_header_list);
        let stream = Monitored::new(stream, tunnel_state.clone(), inspector);
        let (requests, mut connection) = h2::client::Builder::new()
            .enable_push(false)
            .handshake::<_, Bytes>(stream)
            .await
            .map_err(failed)?;
        let mut pings = connection.ping_pong();
        tokio::select! {
            biased;
            ended = &mut connection => {
                ended.map_err(failed)?;
                return Err(HboneError::Lost { source: None });
            }
            pong = pong(pings.as_mut()) => pong.map_err(failed)?,
        }
        // Without a request, the connection sends GOAWAY and ends.
        drop(requests);
        connection.await.ok();
        Ok(peer.identity)
    }
}

/// Sends a PING and waits for its answer.
async fn pong(pings: Option<&mut PingPong>) -> Result<(), h2::Error> {
    match pings {
        Some(pings) => pings.ping(Ping::opaque()).await.map(drop),
        // h2 returns the handle at its first request.
        None => Ok(()),
    }
}
