//! One HTTP/2 connection over TLS to a control plane. The server proves its name by its
//! certificate; the client authenticates by a token in each request, or by a certificate.
//!
//! [`Dial`] opens the socket; the caller sets deadlines.

use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::uri::{Scheme, Uri};
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::TlsConnector;
use tonic::body::Body;
use tower_service::Service;
use underpass_config::Cipher;

use crate::crypto::provider;
use crate::error::{CredentialProblem, HboneError, IssuerProblem};
use crate::https::without_brackets;
use crate::identity::{certified_key, pem};
use crate::pool::{Dial, dial_host};
use crate::task::log_panic;
use crate::tls;
use crate::trust::bundle::Bundle;
use crate::tunnel::io::Io;

const HTTPS_PORT: u16 = 443;
/// The idle time after which a PING is sent. Without an answer, the connection is closed.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Flow-control windows of a connection: the first state of a large mesh has tens of MiB.
const WINDOW: u32 = 4 << 20;

/// The PEM files of a client's certificate chain and key, which authenticate it besides a token.
pub(crate) type ClientCertificate<'a> = (&'a Path, &'a Path);

/// The address of a control plane, and the name in its certificate.
#[derive(Debug)]
pub(crate) struct Endpoint {
    origin: Uri,
    host: String,
    port: u16,
    server_name: ServerName<'static>,
}

impl Endpoint {
    pub(crate) fn new(address: &str, server_name: Option<&str>) -> Result<Self, IssuerProblem> {
        let origin: Uri = address.parse().map_err(|_| IssuerProblem::Address)?;
        let is_root = matches!(origin.path(), "" | "/") && origin.query().is_none();
        let host = origin.host().filter(|_| origin.scheme() == Some(&Scheme::HTTPS) && is_root);
        let host = host.ok_or(IssuerProblem::Address)?;
        let host = without_brackets(host).to_owned();
        let port = origin.port_u16().unwrap_or(HTTPS_PORT);
        let name = server_name.unwrap_or(&host).to_owned();
        let server_name = ServerName::try_from(name.clone());
        let server_name = server_name.map_err(|_| IssuerProblem::ServerName(name))?;
        Ok(Self { origin, host, port, server_name })
    }

    pub(crate) fn origin(&self) -> &Uri {
        &self.origin
    }

    /// Connects to the first of the host's addresses that accepts.
    pub(crate) async fn connect(
        &self,
        dial: &impl Dial,
        roots: Arc<RootCertStore>,
        client: Option<ClientCertificate<'_>>,
    ) -> Result<Connection, HboneError> {
        let client = client.map(read_client).transpose()?;
        let io = dial_host(dial, &self.host, self.port).await;
        let io = io.map_err(|error| self.problem(IssuerProblem::Connect, error))?;
        self.handshake(Box::new(io), roots, client)
            .await
            .map_err(|error| self.problem(handshake_problem(&error), error))
    }

    async fn handshake(
        &self,
        io: Io,
        roots: Arc<RootCertStore>,
        client: Option<ClientKey>,
    ) -> io::Result<Connection> {
        let config = ClientConfig::builder_with_provider(provider(&Cipher::ALL))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(io::Error::other)?
            .with_root_certificates(roots);
        let mut config = match client {
            Some((chain, key)) => {
                config.with_client_auth_cert(chain, key).map_err(io::Error::other)?
            }
            None => config.with_no_client_auth(),
        };
        config.alpn_protocols = vec![tls::ALPN.to_vec()];
        let connector = TlsConnector::from(Arc::new(config));
        let stream = connector.connect(self.server_name.clone(), io).await?;
        if stream.get_ref().1.alpn_protocol() != Some(tls::ALPN) {
            return Err(io::Error::other(rustls::Error::NoApplicationProtocol));
        }
        let (requests, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        // The request reports the connection's error, so the task ignores it.
        tokio::spawn(log_panic("connection to the control plane", connection));
        Ok(Connection(requests))
    }

    fn problem(&self, what: IssuerProblem, error: io::Error) -> HboneError {
        let issuer = self.origin.to_string();
        HboneError::Issuer { issuer, what, source: Some(Arc::new(error)) }
    }
}

/// The transport of tonic's requests.
#[derive(Debug)]
pub(crate) struct Connection(SendRequest<Body>);

impl Service<http::Request<Body>> for Connection {
    type Response = http::Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

pub(super) type ClientKey = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

pub(super) fn read_client(
    (certificate, key): ClientCertificate<'_>,
) -> Result<ClientKey, HboneError> {
    let problem =
        |file: &Path, what: String| HboneError::credential(file, CredentialProblem::Pem(what));
    let chain = CertificateDer::pem_slice_iter(&pem::read(certificate)?)
        .collect::<Result<_, _>>()
        .map_err(|error| problem(certificate, error.to_string()))?;
    let private = PrivateKeyDer::from_pem_slice(&pem::read(key)?);
    Ok((chain, private.map_err(|error| problem(key, error.to_string()))?))
}

/// Reads the roots that verify the server's certificate.
pub(crate) fn read_roots(file: &Path) -> Result<Arc<RootCertStore>, HboneError> {
    Ok(Bundle::from_pem(file, &pem::read(file)?)?.roots())
}

/// Checks that both files are usable, and that the key belongs to the certificate.
pub(crate) fn check_client(files: ClientCertificate<'_>) -> Result<(), HboneError> {
    let (chain, key) = read_client(files)?;
    let (_, key_file) = files;
    let matched = certified_key(chain, key);
    matched.map(drop).map_err(|what| HboneError::credential(key_file, what))
}

/// Explains a failed handshake. A proxy in front of the control plane may accept a connection
/// before its policy refuses it.
fn handshake_problem(error: &io::Error) -> IssuerProblem {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    match error.kind() {
        BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof => {
            IssuerProblem::HandshakeReset
        }
        _ => IssuerProblem::Tls,
    }
}
