//! GET requests over HTTP/1.1 and TLS 1.3 to one server, such as the API server of Kubernetes.
//!
//! Each request opens a connection, so that certificates and tokens in files may change. The body
//! arrives in pieces, because a watch does not end. Not here: sockets ([`Dial`] connects), and
//! deadlines.

use std::future::poll_fn;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use bytes::{Buf as _, Bytes};
use http::header::{ACCEPT, AUTHORIZATION, HOST, HeaderValue, USER_AGENT};
use http::uri::{Authority, Scheme, Uri};
use http::{Request, StatusCode};
use hyper::body::{Body as _, Incoming};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use thiserror::Error;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use underpass_config::Cipher;

use crate::crypto::provider;
use crate::error::HboneError;
use crate::identity::pem;
use crate::pool::{Dial, dial_host};
use crate::task::log_panic;
use crate::trust::bundle::Bundle;

const HTTPS_PORT: u16 = 443;
pub(crate) const AGENT: HeaderValue = HeaderValue::from_static("underpass");

/// A server, and how both sides prove their identity.
#[derive(Debug, Clone)]
pub struct HttpsServer {
    /// `https://HOST` or `https://HOST:PORT`.
    pub address: String,
    /// The name in the server's certificate, if it is not the host.
    pub server_name: Option<String>,
    /// The roots of the server's certificate, in PEM.
    pub roots: Pem,
    /// The certificate and the key of the client, if it has them.
    pub client: Option<(Pem, Pem)>,
}

/// Text in PEM, and the name of its origin for errors. `Debug` omits the text.
#[derive(Clone)]
pub struct Pem {
    /// The file or the setting.
    pub name: PathBuf,
    /// The text.
    pub text: Vec<u8>,
}

/// A request.
#[derive(Debug, Clone, Copy)]
pub struct HttpsRequest<'a> {
    /// The path with its query.
    pub path: &'a str,
    /// The accepted media types.
    pub accept: &'static str,
    /// The bearer token.
    pub token: Option<&'a str>,
}

/// A response whose body is read in pieces. Dropping it closes the connection.
#[derive(Debug)]
pub struct HttpsResponse {
    /// The status.
    pub status: StatusCode,
    body: Incoming,
}

/// Why a request failed.
#[derive(Debug, Error)]
pub enum HttpsError {
    /// The address is not that of an HTTPS server.
    #[error("{0:?} is not https://HOST or https://HOST:PORT")]
    Address(String),
    /// The name is neither a host name nor an IP address.
    #[error("{0:?} is not a host name or an IP address")]
    ServerName(String),
    /// A certificate, key or token cannot be used.
    #[error("cannot use a credential")]
    Credential(#[from] HboneError),
    /// The path cannot be sent.
    #[error("{0:?} is not a path")]
    Path(String),
    /// The token cannot be sent.
    #[error("the token is not visible ASCII")]
    Token,
    /// Connecting failed.
    #[error("cannot connect")]
    Connect(#[source] io::Error),
    /// The handshake failed, for example because the certificate of the server is not trusted.
    #[error("TLS 1.3 failed")]
    Tls(#[source] io::Error),
    /// The connection failed, or the server does not speak HTTP/1.1.
    #[error("the connection failed")]
    Http(#[from] hyper::Error),
}

impl std::fmt::Debug for Pem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Pem").field(&self.name).finish()
    }
}

/// The host of a URI without the brackets of an IPv6 address (RFC 3986 section 3.2.2).
pub fn without_brackets(host: &str) -> &str {
    host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host)
}

impl HttpsServer {
    /// Sends a request and returns the head of its response.
    ///
    /// # Errors
    /// No response.
    pub async fn get(
        &self,
        dial: &impl Dial,
        request: HttpsRequest<'_>,
    ) -> Result<HttpsResponse, HttpsError> {
        let request = build(&self.authority()?, request)?;
        let stream = self.connect(dial).await?;
        let (mut requests, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // The task ends with the response, whose body returns the connection's error.
        tokio::spawn(log_panic("connection to an HTTPS server", connection));
        let (head, body) = requests.send_request(request).await?.into_parts();
        Ok(HttpsResponse { status: head.status, body })
    }

    /// Opens a connection.
    pub(crate) async fn connect<D: Dial>(&self, dial: &D) -> Result<TlsStream<D::Io>, HttpsError> {
        let authority = self.authority()?;
        let config = self.tls()?;
        let host = without_brackets(authority.host());
        let name = self.server_name.as_deref().unwrap_or(host);
        let server_name = ServerName::try_from(name.to_owned())
            .map_err(|_| HttpsError::ServerName(name.to_owned()))?;
        let port = authority.port_u16().unwrap_or(HTTPS_PORT);
        let io = dial_host(dial, host, port).await.map_err(HttpsError::Connect)?;
        let connector = TlsConnector::from(Arc::new(config));
        connector.connect(server_name, io).await.map_err(HttpsError::Tls)
    }

    fn authority(&self) -> Result<Authority, HttpsError> {
        let invalid = || HttpsError::Address(self.address.clone());
        let uri: Uri = self.address.parse().map_err(|_| invalid())?;
        let is_root = matches!(uri.path(), "" | "/") && uri.query().is_none();
        let is_https = uri.scheme() == Some(&Scheme::HTTPS);
        uri.into_parts().authority.filter(|_| is_https && is_root).ok_or_else(invalid)
    }

    fn tls(&self) -> Result<ClientConfig, HttpsError> {
        let roots = Bundle::from_pem(&self.roots.name, &self.roots.text)?.roots();
        let config = ClientConfig::builder_with_provider(provider(&Cipher::ALL))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| HttpsError::Tls(io::Error::other(error)))?
            .with_root_certificates(roots);
        let Some((certificate, key)) = &self.client else {
            return Ok(config.with_no_client_auth());
        };
        let chain = pem::certificates(&certificate.name, &certificate.text)?;
        let key = pem::private_key(&key.name, &key.text)?;
        let config = config.with_client_auth_cert(chain, key);
        config.map_err(|error| HttpsError::Tls(io::Error::other(error)))
    }
}

impl HttpsResponse {
    /// The next piece of the body; `None` at its end.
    ///
    /// # Errors
    /// The connection failed before the end of the body.
    pub async fn piece(&mut self) -> Result<Option<Bytes>, HttpsError> {
        loop {
            let frame = poll_fn(|context| Pin::new(&mut self.body).poll_frame(context)).await;
            let Some(frame) = frame.transpose()? else { return Ok(None) };
            // Skip trailers.
            if let Ok(mut data) = frame.into_data() {
                return Ok(Some(data.copy_to_bytes(data.remaining())));
            }
        }
    }
}

fn build(server: &Authority, request: HttpsRequest<'_>) -> Result<Request<String>, HttpsError> {
    let HttpsRequest { path, accept, token } = request;
    let invalid = || HttpsError::Path(path.to_owned());
    let host = HeaderValue::from_str(server.as_str()).map_err(|_| invalid())?;
    let request = Request::get(path);
    let request = request.header(HOST, host).header(ACCEPT, accept).header(USER_AGENT, AGENT);
    let request = match token.map(bearer).transpose()? {
        Some(token) => request.header(AUTHORIZATION, token),
        None => request,
    };
    request.body(String::new()).map_err(|_| invalid())
}

fn bearer(token: &str) -> Result<HeaderValue, HttpsError> {
    let header = HeaderValue::from_str(&format!("Bearer {token}"));
    let mut header = header.map_err(|_| HttpsError::Token)?;
    header.set_sensitive(true);
    Ok(header)
}
