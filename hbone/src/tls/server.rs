//! The server side of one generation: one configuration for all clients.
//!
//! Not here: listening, and what a client may do.

use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::server::NoServerSessionStorage;
use rustls::sign::SingleCertAndKey;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::sessions::Tickets;
use super::verify::{Peer, Verifier};
use super::{ALPN, SEND_BUFFER, handshake_error, require_h2, tls_error};
use crate::clock::WallClock;
use crate::io::Io;
use crate::trust::Authorities;
use crate::{HboneError, Identity};

/// A client grows its pool by one tunnel or two at a time, and uses each ticket once.
const TICKETS: usize = 2;

/// How long a refused client has to read why.
const FAREWELL: Duration = Duration::from_secs(1);
/// How much of what a refused client still sends is read away: more than a preface and a first request.
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
        config.send_tls13_tickets = TICKETS;
        config.ticketer = Arc::new(Tickets::new(identity.expires())?);
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Self { config: Arc::new(config), verifier })
    }

    /// Handshakes with a client that must be of a trust domain whose roots we have.
    pub(crate) async fn accept(&self, io: Io) -> Result<(TlsStream<Io>, Peer), HboneError> {
        let accept = TlsAcceptor::from(self.config.clone()).accept(io);
        let mut stream = match accept.into_fallible().await {
            Ok(stream) => stream,
            Err((error, io)) => {
                say_farewell(io).await;
                return Err(handshake_error(error));
            }
        };
        let (_, connection) = stream.get_mut();
        connection.set_buffer_limit(Some(SEND_BUFFER));
        require_h2(connection)?;
        match Peer::of(connection, &self.verifier) {
            Ok(peer) => Ok((stream, peer)),
            Err(error) => {
                say_farewell(stream).await;
                Err(error)
            }
        }
    }
}

/// Lets the alert that tells the client what is wrong arrive: a client in TLS 1.3 has begun to send by now, and closing
/// with its bytes unread would reset the connection and discard the alert before the client reads it.
async fn say_farewell(mut io: impl AsyncRead + AsyncWrite + Unpin) {
    let farewell = async {
        io.shutdown().await?;
        let mut unread = io.take(FAREWELL_BYTES);
        tokio::io::copy(&mut unread, &mut tokio::io::sink()).await
    };
    // Whatever comes of it, the connection is refused.
    let _refused = tokio::time::timeout(FAREWELL, farewell).await;
}
