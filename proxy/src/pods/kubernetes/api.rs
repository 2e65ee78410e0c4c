//! Requests to the API server, and their errors.

use std::borrow::Cow;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use http::StatusCode;
use serde_json::Value;
use thiserror::Error;
use tokio::time::{Instant, timeout, timeout_at};
use underpass_config::{ClusterAccess, ClusterCredential, ClusterDocument, Hint, Quoted};
use underpass_hbone::{Dial, HttpsError, HttpsRequest, HttpsResponse, HttpsServer, Pem};

use super::reflector::ReflectorError;

/// Timeout for the connect, TLS and the head of the response.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout for a page of a list.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// The maximum size of a page of a list in bytes, far above that of 500 usual pods: a larger page
/// comes from a faulty server.
const MAX_PAGE: usize = 64 << 20;
/// The maximum size of an event in bytes. The API server accepts objects of 3 MiB.
const MAX_EVENT: usize = 8 << 20;
/// The maximum size of the message of an error in bytes.
const MAX_STATUS: usize = 64 << 10;

/// The API server.
#[derive(Debug)]
pub(crate) struct Api<D> {
    access: ClusterAccess,
    dial: D,
}

/// The error of a request to the API server.
#[derive(Debug, Error)]
pub(super) enum KubernetesError {
    #[error("cannot read {path}", path = path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("the token in {path} is not text", path = path.display())]
    Token { path: PathBuf },
    #[error("the request to the API server {server} failed")]
    Request { server: String, source: HttpsError },
    #[error("the API server {server} did not answer within {} s", limit.as_secs())]
    Timeout { server: String, limit: Duration },
    #[error("the API server does not accept the credential: {0}")]
    Unauthorized(Quoted),
    #[error("the API server denies the request: {0}")]
    Forbidden(Quoted),
    #[error("the API server answered with status {status}: {message}")]
    Status { status: u16, message: Quoted },
    #[error("the API server sent a message that is not JSON")]
    Json(#[from] serde_json::Error),
    #[error("the API server sent a message of more than {0} bytes")]
    TooLong(usize),
    #[error(transparent)]
    Content(#[from] ReflectorError),
}

impl KubernetesError {
    /// Whether the server no longer knows the version or the page of the request.
    pub(super) fn is_gone(&self) -> bool {
        matches!(self, Self::Status { status: 410, .. })
    }
}

impl Hint for KubernetesError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        let fixed = match self {
            Self::Forbidden(_) => {
                "allow the daemon's service account to list and watch pods and namespaces (docs/operations.md)"
            }
            Self::Unauthorized(_) => {
                "the token or the certificate has expired, or is of another cluster: renew it in node.kubeconfig (a tokenFile is read again), or create the daemon's pod again"
            }
            Self::File { .. } | Self::Token { .. } => {
                "check the service account of the daemon's pod, or the files that node.kubeconfig names"
            }
            Self::Request { source: HttpsError::Tls(_), .. } => {
                "check that certificate-authority in node.kubeconfig has the CA of the API server, and tls-server-name or server a name in its certificate"
            }
            Self::Request { source: HttpsError::Credential(_), .. } => {
                "correct the certificate, the key or the roots in node.kubeconfig, or those of the daemon's service account"
            }
            Self::Request {
                source: HttpsError::Address(_) | HttpsError::ServerName(_), ..
            } => "correct server and tls-server-name in node.kubeconfig",
            Self::Request { .. } | Self::Timeout { .. } => {
                "check that the API server runs and is reachable from the node; known facts stay in use"
            }
            Self::Status { .. } | Self::Json(_) | Self::TooLong(_) | Self::Content(_) => {
                "read the log of the API server; known facts stay in use"
            }
        };
        Some(fixed.into())
    }
}

impl<D: Dial> Api<D> {
    pub(crate) fn new(access: ClusterAccess, dial: D) -> Self {
        Self { access, dial }
    }

    /// The address of the server.
    pub(crate) fn server(&self) -> &str {
        &self.access.server
    }

    /// Gets the JSON document at a path.
    pub(super) async fn get(&self, path: &str) -> Result<Value, KubernetesError> {
        let mut response = self.request(path).await?;
        let body = timeout(BODY_TIMEOUT, self.body(&mut response, MAX_PAGE)).await;
        Ok(serde_json::from_slice(&body.map_err(|_| self.late(BODY_TIMEOUT))??)?)
    }

    /// Opens a watch that ends after `duration`.
    pub(super) async fn watch(
        &self,
        path: &str,
        duration: Duration,
    ) -> Result<Events<'_, D>, KubernetesError> {
        let deadline = Instant::now() + duration;
        let response = self.request(path).await?;
        Ok(Events { api: self, response, lines: Lines::default(), deadline })
    }

    async fn request(&self, path: &str) -> Result<HttpsResponse, KubernetesError> {
        let (server, token) = self.server_and_token()?;
        let token = token.as_deref();
        let request = HttpsRequest { path, accept: "application/json", token };
        let response = timeout(RESPONSE_TIMEOUT, server.get(&self.dial, request)).await;
        let response = response.map_err(|_| self.late(RESPONSE_TIMEOUT))?;
        let mut response = response.map_err(|source| self.failed(source))?;
        if response.status == StatusCode::OK {
            return Ok(response);
        }
        let body = timeout(BODY_TIMEOUT, self.body(&mut response, MAX_STATUS)).await;
        let body = body.ok().and_then(Result::ok).unwrap_or_default();
        Err(refusal(response.status, &body))
    }

    async fn body(
        &self,
        response: &mut HttpsResponse,
        longest: usize,
    ) -> Result<Vec<u8>, KubernetesError> {
        let mut body = Vec::new();
        while let Some(piece) = response.piece().await.map_err(|source| self.failed(source))? {
            if body.len() + piece.len() > longest {
                return Err(KubernetesError::TooLong(longest));
            }
            body.extend_from_slice(&piece);
        }
        Ok(body)
    }

    fn server_and_token(&self) -> Result<(HttpsServer, Option<String>), KubernetesError> {
        let ClusterAccess { server, server_name, roots, credential } = &self.access;
        let (token, client) = match credential {
            ClusterCredential::Token(document) => (Some(token(document)?), None),
            ClusterCredential::Certificate(certificate, key) => {
                (None, Some((pem(certificate)?, pem(key)?)))
            }
        };
        let (address, server_name) = (server.clone(), server_name.clone());
        Ok((HttpsServer { address, server_name, roots: pem(roots)?, client }, token))
    }

    fn failed(&self, source: HttpsError) -> KubernetesError {
        KubernetesError::Request { server: self.access.server.clone(), source }
    }

    fn late(&self, limit: Duration) -> KubernetesError {
        KubernetesError::Timeout { server: self.access.server.clone(), limit }
    }
}

fn pem(document: &ClusterDocument) -> Result<Pem, KubernetesError> {
    let name = document.name().to_owned();
    match document.read() {
        Ok(text) => Ok(Pem { name, text }),
        Err(source) => Err(KubernetesError::File { path: name, source }),
    }
}

fn token(document: &ClusterDocument) -> Result<String, KubernetesError> {
    let Pem { name: path, text } = pem(document)?;
    match String::from_utf8(text) {
        Ok(token) => Ok(token.trim().to_owned()),
        Err(_) => Err(KubernetesError::Token { path }),
    }
}

/// The error of a response, whose body is a `Status` object.
fn refusal(status: StatusCode, body: &[u8]) -> KubernetesError {
    let object: Value = serde_json::from_slice(body).unwrap_or_default();
    let message = object.get("message").and_then(Value::as_str).unwrap_or("no explanation");
    let message = Quoted::new(message);
    match status {
        StatusCode::UNAUTHORIZED => KubernetesError::Unauthorized(message),
        StatusCode::FORBIDDEN => KubernetesError::Forbidden(message),
        _ => KubernetesError::Status { status: status.as_u16(), message },
    }
}

/// The events of a watch.
#[derive(Debug)]
pub(super) struct Events<'a, D> {
    api: &'a Api<D>,
    response: HttpsResponse,
    lines: Lines,
    deadline: Instant,
}

impl<D: Dial> Events<'_, D> {
    /// Waits for the next event; `None` at the end of the watch.
    pub(super) async fn next(&mut self) -> Result<Option<Value>, KubernetesError> {
        loop {
            if let Some(line) = self.lines.next() {
                return Ok(Some(serde_json::from_slice(&line)?));
            }
            match timeout_at(self.deadline, self.response.piece()).await {
                // The connection is lost, or the server keeps the watch longer than requested.
                Err(_) => return Ok(None),
                Ok(piece) => match piece.map_err(|source| self.api.failed(source))? {
                    None => return Ok(None),
                    Some(piece) => self.lines.add(&piece)?,
                },
            }
        }
    }
}

/// Splits the body of a watch into lines.
#[derive(Debug, Default)]
struct Lines {
    buffer: Vec<u8>,
    /// The length of the buffer's start that contains no line break.
    searched: usize,
}

impl Lines {
    fn add(&mut self, piece: &[u8]) -> Result<(), KubernetesError> {
        if self.buffer.len() + piece.len() > MAX_EVENT {
            return Err(KubernetesError::TooLong(MAX_EVENT));
        }
        self.buffer.extend_from_slice(piece);
        Ok(())
    }

    /// The next complete line that is not empty.
    fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            let rest = self.buffer.get(self.searched..).unwrap_or_default();
            let Some(end) = rest.iter().position(|byte| *byte == b'\n') else {
                self.searched = self.buffer.len();
                return None;
            };
            let mut line: Vec<u8> = self.buffer.drain(..=self.searched + end).collect();
            self.searched = 0;
            line.pop();
            if !line.trim_ascii().is_empty() {
                return Some(line);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_found_in_any_pieces() {
        let text = b"{\"a\":1}\n\n{}\r\n{\"b\":2}\nrest";
        for size in 1..text.len() {
            let (mut lines, mut found) = (Lines::default(), Vec::new());
            for piece in text.chunks(size) {
                lines.add(piece).unwrap();
                found.extend(std::iter::from_fn(|| lines.next()));
            }
            assert_eq!(found, [&b"{\"a\":1}"[..], b"{}\r", b"{\"b\":2}"], "pieces of {size}");
        }
    }

    #[test]
    fn line_without_end_is_limited() {
        let mut lines = Lines::default();
        lines.add(&vec![b'a'; MAX_EVENT]).unwrap();
        assert!(matches!(lines.add(b"a"), Err(KubernetesError::TooLong(MAX_EVENT))));
    }

    #[test]
    fn hints_name_the_part_of_the_access_to_correct() {
        let hint = |source| {
            let error = KubernetesError::Request { server: "https://k".to_owned(), source };
            error.hint().unwrap().into_owned()
        };
        let unknown = io::Error::other("invalid peer certificate: UnknownIssuer");
        assert!(hint(HttpsError::Tls(unknown)).contains("certificate-authority"));
        assert!(hint(HttpsError::ServerName("?".to_owned())).contains("tls-server-name"));
        let refused = io::ErrorKind::ConnectionRefused.into();
        assert!(hint(HttpsError::Connect(refused)).contains("reachable from the node"));
        let expired = refusal(StatusCode::UNAUTHORIZED, b"").hint().unwrap();
        assert!(expired.contains("has expired"), "{expired}");
    }

    #[test]
    fn refusal_names_the_missing_permissions() {
        let body = br#"{"kind":"Status","message":"pods is forbidden","code":403}"#;
        let error = refusal(StatusCode::FORBIDDEN, body);
        assert_eq!(error.to_string(), "the API server denies the request: pods is forbidden");
        assert!(error.hint().unwrap().contains("list and watch pods and namespaces"));
        let error = refusal(StatusCode::SERVICE_UNAVAILABLE, b"<html>");
        assert_eq!(error.to_string(), "the API server answered with status 503: no explanation");
        assert!(refusal(StatusCode::GONE, b"").is_gone());
    }
}
