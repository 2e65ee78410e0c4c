//! TLS peers without code of underpass, so that they can misbehave: no certificate, an expired one,
//! no ALPN.
//!
//! After the handshake they exchange raw bytes, not HTTP/2.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, ServerConfig, SignatureScheme,
};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};
use underpass_config::IdentityFiles;

use crate::or_fail::OrFail;
use crate::peers::within;
use crate::pods::Pod;

/// A client that trusts every server.
#[derive(Debug, Clone)]
pub struct TlsClient {
    config: ClientConfig,
}

impl TlsClient {
    /// Creates a client that offers `h2`, with or without a certificate.
    #[must_use]
    pub fn new(files: Option<&IdentityFiles>) -> Self {
        let builder = ClientConfig::builder_with_provider(provider());
        let builder =
            builder.with_protocol_versions(&[&rustls::version::TLS13]).or_fail("set up TLS");
        let builder = builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AcceptAnyCertificate(provider())));
        let mut config = match files {
            None => builder.with_no_client_auth(),
            Some(files) => builder
                .with_client_auth_cert(chain(&files.certificate), key(&files.key))
                .or_fail("use a certificate"),
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        Self { config }
    }

    /// Disables ALPN.
    #[must_use]
    pub fn without_alpn(mut self) -> Self {
        self.config.alpn_protocols.clear();
        self
    }

    /// Connects from a pod and reads. Returns the number of bytes. In TLS 1.3, a client learns only
    /// after its handshake that the server rejected it.
    ///
    /// # Errors
    /// The server's alert, or the end of the connection.
    pub async fn read(&self, pod: &Pod, to: SocketAddr) -> io::Result<usize> {
        let mut stream = self.connect(pod.dial(to).await?).await?;
        within("the server's first bytes", stream.read(&mut [0; 1024])).await
    }

    /// Sends a ClientHello and nothing else.
    ///
    /// # Errors
    /// The end of the connection.
    pub async fn begin(&self, mut stream: TcpStream) -> io::Result<TcpStream> {
        let name = ServerName::from(stream.peer_addr()?.ip());
        let connection = ClientConnection::new(Arc::new(self.config.clone()), name);
        let mut hello = Vec::new();
        connection.or_fail("set up TLS").write_tls(&mut hello)?;
        stream.write_all(&hello).await?;
        Ok(stream)
    }

    /// Performs the handshake.
    ///
    /// # Errors
    /// The end of the connection.
    pub async fn connect(&self, stream: TcpStream) -> io::Result<client::TlsStream<TcpStream>> {
        let name = ServerName::from(stream.peer_addr()?.ip());
        let connector = TlsConnector::from(Arc::new(self.config.clone()));
        within("a TLS handshake", connector.connect(name, stream)).await
    }
}

/// A server that requests no client certificate.
#[derive(Debug, Clone)]
pub struct TlsServer {
    config: ServerConfig,
}

impl TlsServer {
    /// Creates a server that supports `h2`, with this certificate.
    #[must_use]
    pub fn new(files: &IdentityFiles) -> Self {
        let builder = ServerConfig::builder_with_provider(provider());
        let builder =
            builder.with_protocol_versions(&[&rustls::version::TLS13]).or_fail("set up TLS");
        let config = builder
            .with_no_client_auth()
            .with_single_cert(chain(&files.certificate), key(&files.key));
        let mut config = config.or_fail("use a certificate");
        config.alpn_protocols = vec![b"h2".to_vec()];
        Self { config }
    }

    /// Disables ALPN.
    #[must_use]
    pub fn without_alpn(mut self) -> Self {
        self.config.alpn_protocols.clear();
        self
    }

    /// Performs the handshake, and receives until the client ends. Returns the bytes.
    ///
    /// # Errors
    /// The client's alert, or the end of the connection.
    pub async fn receive(&self, stream: TcpStream) -> io::Result<Vec<u8>> {
        let mut stream = self.accept(stream).await?;
        let mut received = Vec::new();
        within("the client's end", stream.read_to_end(&mut received)).await.map(|_| received)
    }

    /// Performs the handshake.
    ///
    /// # Errors
    /// The client's alert, or the end of the connection.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<server::TlsStream<TcpStream>> {
        let acceptor = TlsAcceptor::from(Arc::new(self.config.clone()));
        within("a TLS handshake", acceptor.accept(stream)).await
    }
}

pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

pub(crate) fn chain(file: &Path) -> Vec<CertificateDer<'static>> {
    let certificates = CertificateDer::pem_file_iter(file).or_fail("read a certificate");
    certificates.collect::<Result<_, _>>().or_fail("read a certificate")
}

pub(crate) fn key(file: &Path) -> PrivateKeyDer<'static> {
    PrivateKeyDer::from_pem_file(file).or_fail("read a key")
}

/// Accepts any certificate whose key the server holds.
#[derive(Debug)]
struct AcceptAnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AcceptAnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            certificate,
            signed,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signed,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
