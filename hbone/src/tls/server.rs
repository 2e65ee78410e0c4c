//! The server side of one generation: one configuration for all clients.
//!
//! Not here: listening, and what a client may do.

use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::server::{NoServerSessionStorage, UnbufferedServerConnection};
use rustls::sign::SingleCertAndKey;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::record::{Finished, TlsStream, Unfinished, handshake};
use super::sessions::Tickets;
use super::verify::{Peer, Verifier};
use super::{ALPN, handshake_error, require_h2, tls_error};
use crate::clock::WallClock;
use crate::error::HboneError;
use crate::identity::Identity;
use crate::trust::Authorities;
use crate::tunnel::io::Io;

/// A client grows its pool by one tunnel or two at a time, and uses each ticket once.
const TICKETS: usize = 2;

/// How long a refused client has to read why.
const FAREWELL: Duration = Duration::from_secs(1);
/// How much of what a refused client still sends is read away: more than a preface and a first
/// request.
const FAREWELL_BYTES: u64 = 64 << 10;

/// The server side of one [`Credentials`](crate::Credentials), shared by all its connections.
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
        // For the record layer.
        config.enable_secret_extraction = true;
        config.send_tls13_tickets = TICKETS;
        config.ticketer = Arc::new(Tickets::new(identity.expires())?);
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Self { config: Arc::new(config), verifier })
    }

    /// Accepts a client that must be of a trust domain whose roots we have.
    pub(crate) async fn accept(&self, io: Io) -> Result<(TlsStream<Io>, Peer), HboneError> {
        let finished = self.handshake(io).await?;
        require_h2(finished.facts())?;
        let peer = Peer::of(finished.facts(), &self.verifier);
        let stream = finished.into_stream().map_err(tls_error)?;
        match peer {
            Ok(peer) => Ok((stream, peer)),
            Err(error) => {
                say_farewell(stream).await;
                Err(error)
            }
        }
    }

    pub(super) async fn handshake(
        &self,
        io: Io,
    ) -> Result<Finished<UnbufferedServerConnection, Io>, HboneError> {
        let connection = UnbufferedServerConnection::new(self.config.clone()).map_err(tls_error)?;
        match handshake(connection, io).await {
            Ok(finished) => Ok(finished),
            Err(Unfinished { error, io }) => {
                say_farewell(io).await;
                Err(handshake_error(error))
            }
        }
    }
}

/// Lets the alert that tells the client what is wrong arrive: a client in TLS 1.3 has begun to send
/// by now, and closing with its bytes unread would reset the connection and discard the alert
/// before the client reads it.
async fn say_farewell(mut io: impl AsyncRead + AsyncWrite + Unpin) {
    let farewell = async {
        io.shutdown().await?;
        let mut unread = io.take(FAREWELL_BYTES);
        tokio::io::copy(&mut unread, &mut tokio::io::sink()).await
    };
    // Whatever comes of it, the connection is refused.
    let _refused = tokio::time::timeout(FAREWELL, farewell).await;
}
