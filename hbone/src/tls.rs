//! TLS 1.3 as HBONE wants it: both sides prove a SPIFFE identity, the client without SNI, over ALPN `h2`.
//!
//! Not here: which identity is right for a destination; the caller says so per connection.

mod verify;

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite, kx_group};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::SingleCertAndKey;
use rustls::{AlertDescription, CertificateError, ClientConfig, CommonState, ServerConfig};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};
use underpass_config::{SpiffeId, TrustDomain};

use self::verify::{ClientVerifier, ServerVerifier};
use crate::{HboneError, Identity};

pub use self::verify::PeerIdentity;
pub(crate) use self::verify::uri_names;

const ALPN: &[u8] = b"h2";

/// How long a refused client has to read why.
const FAREWELL: Duration = Duration::from_secs(1);
/// How much of what a refused client still sends is read away: more than a preface and a first request.
const FAREWELL_BYTES: u64 = 64 << 10;

/// The client side of one [`Identity`], shared by all its connections.
#[derive(Debug, Clone)]
pub(crate) struct ClientTls {
    /// Complete but for the verifier, which knows the expected peers of one connection. Everything
    /// costly is behind an `Arc`, so a clone of it per connection is cheap, and needs no cache.
    config: ClientConfig,
    verifier: ServerVerifier,
}

/// The server side of one [`Identity`], shared by all its connections.
#[derive(Debug, Clone)]
pub(crate) struct ServerTls {
    config: Arc<ServerConfig>,
    trust_domain: TrustDomain,
}

impl ClientTls {
    pub(crate) fn new(identity: &Identity) -> Result<Self, HboneError> {
        let mut tls = Self::anonymous(identity)?;
        tls.config.client_auth_cert_resolver =
            Arc::new(SingleCertAndKey::from(identity.certified_key()));
        Ok(tls)
    }

    /// Trusts as `identity` does, and presents nothing.
    pub(crate) fn anonymous(identity: &Identity) -> Result<Self, HboneError> {
        let provider = provider();
        let verifier = ServerVerifier::new(identity.roots(), &provider);
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls_error)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier.clone()))
            .with_no_client_auth();
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.enable_sni = false;
        // A resumed session is not verified again, and every peer has the same (absent) name.
        config.resumption = Resumption::disabled();
        Ok(Self { config, verifier })
    }

    /// Handshakes with a server that must be one of `expected`; our certificate is not sent to another.
    pub(crate) async fn connect<T>(
        &self,
        io: T,
        expected: &[SpiffeId],
    ) -> Result<(client::TlsStream<T>, PeerIdentity), HboneError>
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        let expected: Arc<[SpiffeId]> = expected.into();
        let mut config = self.config.clone();
        let verifier = self.verifier.expecting(expected.clone());
        config.dangerous().set_certificate_verifier(Arc::new(verifier));
        // rustls wants a name; an address is never sent as SNI (RFC 6066 section 3), nor looked at by us.
        let no_name = ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into());
        let stream = TlsConnector::from(Arc::new(config))
            .connect(no_name, io)
            .await
            .map_err(handshake_error)?;
        let (_, connection) = stream.get_ref();
        require_h2(connection)?;
        let peer = verify::server_identity(connection.peer_certificates(), &expected)?;
        Ok((stream, peer))
    }
}

impl ServerTls {
    pub(crate) fn new(identity: &Identity) -> Result<Self, HboneError> {
        let provider = provider();
        let trust_domain = identity.spiffe_id().trust_domain().clone();
        let chain = WebPkiClientVerifier::builder_with_provider(identity.roots(), provider.clone())
            .build()
            .map_err(|error| tls_error(rustls::Error::General(error.to_string())))?;
        let verifier = ClientVerifier::new(chain, trust_domain.clone());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls_error)?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified_key())));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Self { config: Arc::new(config), trust_domain })
    }

    /// Handshakes with a client that must be of our trust domain.
    pub(crate) async fn accept<T>(
        &self,
        io: T,
    ) -> Result<(server::TlsStream<T>, PeerIdentity), HboneError>
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        let accept = TlsAcceptor::from(self.config.clone()).accept(io);
        let stream = match accept.into_fallible().await {
            Ok(stream) => stream,
            Err((error, io)) => {
                say_farewell(io).await;
                return Err(handshake_error(error));
            }
        };
        let (_, connection) = stream.get_ref();
        require_h2(connection)?;
        let peer = verify::client_identity(connection.peer_certificates(), &self.trust_domain)?;
        Ok((stream, peer))
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

/// AES-GCM as ztunnel has it, and a key exchange that a recording does not help to break later.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_AES_128_GCM_SHA256,
        ],
        kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1],
        ..aws_lc_rs::default_provider()
    })
}

/// The error of a TLS connection; `None` when it is not TLS that failed.
pub(crate) fn alert_error(error: &io::Error) -> Option<HboneError> {
    match inner(error)? {
        rustls::Error::AlertReceived(alert) => Some(received(*alert, error)),
        _ => None,
    }
}

fn handshake_error(error: io::Error) -> HboneError {
    let specific = match inner(&error) {
        Some(rustls::Error::InvalidCertificate(CertificateError::Other(other))) => {
            other.0.downcast_ref::<HboneError>().cloned()
        }
        Some(rustls::Error::InvalidCertificate(CertificateError::ExpiredContext {
            not_after,
            ..
        })) => Some(HboneError::PeerCertificateExpired {
            expired: SystemTime::UNIX_EPOCH + Duration::from_secs(not_after.as_secs()),
        }),
        Some(rustls::Error::NoCertificatesPresented) => Some(HboneError::NoPeerCertificate),
        Some(rustls::Error::AlertReceived(alert)) => Some(received(*alert, &error)),
        _ => None,
    };
    specific.unwrap_or_else(|| HboneError::Tls { source: Arc::new(error) })
}

fn inner(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

fn received(alert: AlertDescription, error: &io::Error) -> HboneError {
    use AlertDescription as Alert;
    match alert {
        Alert::BadCertificate
        | Alert::UnsupportedCertificate
        | Alert::CertificateRevoked
        | Alert::CertificateExpired
        | Alert::CertificateUnknown
        | Alert::CertificateRequired
        | Alert::UnknownCA
        // A root of the same name but with another key: two meshes both called cluster.local.
        | Alert::DecryptError
        | Alert::AccessDenied => HboneError::CertificateRefused {
            alert: format!("{alert:?}"),
        },
        other => {
            let source = io::Error::new(error.kind(), rustls::Error::AlertReceived(other));
            HboneError::Tls {
                source: Arc::new(source),
            }
        }
    }
}

/// RFC 7301 lets a side go on without ALPN; HTTP/1 would be read as garbage then.
fn require_h2(connection: &CommonState) -> Result<(), HboneError> {
    match connection.alpn_protocol() {
        Some(ALPN) => Ok(()),
        _ => Err(tls_error(rustls::Error::NoApplicationProtocol)),
    }
}

fn tls_error(error: rustls::Error) -> HboneError {
    HboneError::Tls { source: Arc::new(io::Error::new(io::ErrorKind::InvalidData, error)) }
}

#[cfg(test)]
mod tests;
