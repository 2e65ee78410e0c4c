//! The TLS server for one generation of credentials. All clients have the same configuration.

use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::server::{NoServerSessionStorage, UnbufferedServerConnection};
use rustls::sign::SingleCertAndKey;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::record::{FinishedHandshake, TlsStream, UnfinishedHandshake, handshake};
use super::sessions::Tickets;
use super::verify::{Peer, Verifier};
use super::{ALPN, handshake_error, require_h2, tls_error};
use crate::clock::WallClock;
use crate::error::HboneError;
use crate::identity::Identity;
use crate::trust::Authorities;
use crate::tunnel::io::Io;

/// The number of session tickets per handshake. A client opens one or two tunnels at a time, and
/// uses each ticket once.
const TICKETS_PER_HANDSHAKE: usize = 2;

/// The time that a refused client has to read the alert.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// The maximum number of bytes read from a refused client: more than an HTTP/2 preface and a first
/// request.
const MAX_DISCARDED: u64 = 64 << 10;

/// The TLS server for one [`Credentials`](crate::Credentials), shared by all its connections.
#[derive(Debug)]
pub(crate) struct ServerTls {
    config: Arc<ServerConfig>,
    verifier: Arc<Verifier>,
}

impl ServerTls {
    pub(crate) fn new(
        identity: &Identity,
        authorities: Arc<Authorities>,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, HboneError> {
        let expected = authorities.any_member();
        let verifier = Arc::new(Verifier { authorities, expected });
        let mut config = ServerConfig::builder_with_details(provider, Arc::new(WallClock))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls_error)?
            .with_client_cert_verifier(verifier.clone())
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified_key())));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.ignore_client_order = true;
        // The record layer needs the traffic secrets.
        config.enable_secret_extraction = true;
        config.send_tls13_tickets = TICKETS_PER_HANDSHAKE;
        config.ticketer = Arc::new(Tickets::new(identity.expires())?);
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Self { config: Arc::new(config), verifier })
    }

    /// Performs a handshake. The client's trust domain must have known roots.
    pub(crate) async fn accept(&self, io: Io) -> Result<(TlsStream<Io>, Peer), HboneError> {
        let finished = self.handshake(io).await?;
        require_h2(finished.negotiated())?;
        let peer = Peer::of(finished.negotiated(), &self.verifier);
        let stream = finished.into_stream().map_err(tls_error)?;
        match peer {
            Ok(peer) => Ok((stream, peer)),
            Err(error) => {
                close_gracefully(stream).await;
                Err(error)
            }
        }
    }

    pub(super) async fn handshake(
        &self,
        io: Io,
    ) -> Result<FinishedHandshake<UnbufferedServerConnection, Io>, HboneError> {
        let connection = UnbufferedServerConnection::new(self.config.clone()).map_err(tls_error)?;
        match handshake(connection, io).await {
            Ok(finished) => Ok(finished),
            Err(UnfinishedHandshake { error, io }) => {
                close_gracefully(io).await;
                Err(handshake_error(error))
            }
        }
    }
}

/// Waits until the client has read the alert. A TLS 1.3 client may have sent data already: closing
/// the socket with unread bytes would send RST, which discards the alert.
async fn close_gracefully(mut io: impl AsyncRead + AsyncWrite + Unpin) {
    let close = async {
        io.shutdown().await?;
        let mut unread = io.take(MAX_DISCARDED);
        tokio::io::copy(&mut unread, &mut tokio::io::sink()).await
    };
    // The connection is refused in any case.
    let _refused = tokio::time::timeout(CLOSE_TIMEOUT, close).await;
}
