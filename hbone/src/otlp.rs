//! Sends OTLP messages to a collector over HTTP/1.1, in plain text or over TLS 1.3.
//!
//! Each message opens a connection, so that roots and headers in files may change. Not here:
//! sockets ([`Dial`] connects), deadlines, and the content of messages.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue, USER_AGENT};
use http::uri::{Authority, Uri};
use http::{Request, StatusCode};
use http_body_util::Full;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use underpass_config::{Hint, OtlpSettings};

use crate::control_plane::endpoint::read_roots;
use crate::error::HboneError;
use crate::https::{AGENT, HttpsError, HttpsServer, Pem, without_brackets};
use crate::identity::pem;
use crate::pool::{Dial, dial_host};
use crate::task::log_panic;

const HTTP_PORT: u16 = 80;
const PROTOBUF: HeaderValue = HeaderValue::from_static("application/x-protobuf");

/// A collector of traces and log events.
#[derive(Debug)]
pub struct OtlpCollector {
    endpoint: String,
    authority: Authority,
    /// The path before that of a signal; empty or `/PATH`.
    path: String,
    headers: Option<PathBuf>,
    /// The roots of the collector's certificate; `None` for plain text.
    roots: Option<PathBuf>,
}

/// Why a message was not delivered.
#[derive(Debug, Error)]
pub enum CollectorError {
    /// The endpoint is not a URL.
    #[error("{0:?} is not http://HOST:PORT")]
    Address(String),
    /// A file cannot be read.
    #[error("cannot use a file")]
    File(#[from] HboneError),
    /// A line of the file with headers cannot be sent. It may be a secret.
    #[error("line {line} of {} is not NAME: VALUE in visible ASCII", file.display())]
    Header {
        /// The number of the line, from 1.
        line: usize,
        /// The file.
        file: PathBuf,
    },
    /// There is no response.
    #[error(transparent)]
    Connection(#[from] HttpsError),
    /// The collector does not take the message.
    #[error("the collector answered {0}")]
    Refused(StatusCode),
}

impl OtlpCollector {
    /// The collector in the settings.
    ///
    /// # Errors
    /// The endpoint is not a URL.
    pub fn new(settings: &OtlpSettings) -> Result<Self, CollectorError> {
        let OtlpSettings { endpoint, headers, roots, .. } = settings;
        let invalid = || CollectorError::Address(endpoint.clone());
        let uri: Uri = endpoint.parse().map_err(|_| invalid())?;
        let path = uri.path().trim_end_matches('/').to_owned();
        let authority = uri.into_parts().authority.ok_or_else(invalid)?;
        let (endpoint, headers, roots) = (endpoint.clone(), headers.clone(), roots.clone());
        Ok(Self { endpoint, authority, path, headers, roots })
    }

    /// The endpoint in the settings.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Sends a message to the `path` of its signal, such as `/v1/traces`.
    ///
    /// # Errors
    /// The collector did not take it.
    pub async fn send(
        &self,
        dial: &impl Dial,
        path: &str,
        message: Bytes,
    ) -> Result<(), CollectorError> {
        let request = self.request(path, message)?;
        let status = match &self.roots {
            None => {
                let port = self.authority.port_u16().unwrap_or(HTTP_PORT);
                let io = dial_host(dial, self.host(), port).await.map_err(HttpsError::Connect)?;
                exchange(io, request).await?
            }
            Some(roots) => {
                let text = pem::read(roots)?;
                let server = HttpsServer {
                    address: format!("https://{}", self.authority),
                    server_name: None,
                    roots: Pem { name: roots.clone(), text },
                    client: None,
                };
                exchange(server.connect(dial).await?, request).await?
            }
        };
        if status.is_success() { Ok(()) } else { Err(CollectorError::Refused(status)) }
    }

    fn host(&self) -> &str {
        without_brackets(self.authority.host())
    }

    fn request(&self, path: &str, message: Bytes) -> Result<Request<Full<Bytes>>, CollectorError> {
        let invalid = || CollectorError::Address(self.endpoint.clone());
        let host = HeaderValue::from_str(self.authority.as_str()).map_err(|_| invalid())?;
        let request = Request::post(format!("{}{path}", self.path)).body(Full::new(message));
        let mut request = request.map_err(|_| invalid())?;
        let headers = request.headers_mut();
        if let Some(file) = &self.headers {
            headers.extend(read_headers(file)?);
        }
        headers.insert(HOST, host);
        headers.insert(CONTENT_TYPE, PROTOBUF);
        headers.insert(USER_AGENT, AGENT);
        Ok(request)
    }
}

/// The mistakes in the files of a collector.
pub fn collector_problems(settings: &OtlpSettings) -> Vec<CollectorError> {
    let roots = settings
        .roots
        .as_deref()
        .map(|file| read_roots(file).map(drop).map_err(CollectorError::File));
    let headers = settings.headers.as_deref().map(|file| read_headers(file).map(drop));
    [roots, headers].into_iter().flatten().filter_map(Result::err).collect()
}

async fn exchange<T>(io: T, request: Request<Full<Bytes>>) -> Result<StatusCode, HttpsError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut requests, connection) = http1::handshake(TokioIo::new(io)).await?;
    // The task ends with the response. The request returns the connection's error.
    tokio::spawn(log_panic("connection to a collector", connection));
    Ok(requests.send_request(request).await?.status())
}

/// Reads the headers in `file`.
fn read_headers(file: &Path) -> Result<HeaderMap, CollectorError> {
    let text = std::fs::read(file).map_err(|error| HboneError::file(file, error))?;
    further_headers(file, &text)
}

/// Parses lines of `NAME: VALUE`. Empty lines are skipped.
fn further_headers(file: &Path, text: &[u8]) -> Result<HeaderMap, CollectorError> {
    let mut headers = HeaderMap::new();
    for (index, line) in String::from_utf8_lossy(text).lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let invalid = || CollectorError::Header { line: index + 1, file: file.to_owned() };
        let (name, value) = line.split_once(':').ok_or_else(invalid)?;
        let name = HeaderName::from_bytes(name.trim().as_bytes()).map_err(|_| invalid())?;
        let mut value = HeaderValue::from_str(value.trim()).map_err(|_| invalid())?;
        value.set_sensitive(true);
        headers.insert(name, value);
    }
    Ok(headers)
}

impl CollectorError {
    /// Whether the same message may be delivered later (OTLP specification, "Failures").
    pub fn is_temporary(&self) -> bool {
        match self {
            Self::Refused(status) => matches!(
                *status,
                StatusCode::TOO_MANY_REQUESTS
                    | StatusCode::BAD_GATEWAY
                    | StatusCode::SERVICE_UNAVAILABLE
                    | StatusCode::GATEWAY_TIMEOUT
            ),
            _ => true,
        }
    }
}

impl Hint for CollectorError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        let hint = match self {
            Self::Address(_) => "correct tracing.otlp.endpoint",
            Self::File(error) => return error.hint(),
            Self::Header { .. } => "correct the file in tracing.otlp.headers",
            Self::Connection(HttpsError::Tls(_)) => {
                "check that tracing.otlp.roots contains the root of the collector's certificate"
            }
            Self::Connection(_) => {
                "check that the collector runs, accepts OTLP over HTTP, and that tracing.otlp.endpoint is right"
            }
            Self::Refused(_) => {
                "check the path in tracing.otlp.endpoint and the credentials in tracing.otlp.headers"
            }
        };
        Some(hint.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(endpoint: &str) -> OtlpSettings {
        OtlpSettings {
            endpoint: endpoint.to_owned(),
            headers: None,
            roots: None,
            sample_ratio: underpass_config::Ratio::ALL,
            logs: false,
        }
    }

    fn collector(endpoint: &str) -> OtlpCollector {
        OtlpCollector::new(&settings(endpoint)).unwrap()
    }

    #[test]
    fn reports_each_unreadable_file() {
        let missing = Some(PathBuf::from("/nonexistent/file"));
        let plain = settings("http://otel:4318");
        assert!(collector_problems(&plain).is_empty());
        let tls = OtlpSettings { headers: missing.clone(), roots: missing, ..plain };
        assert_eq!(collector_problems(&tls).len(), 2);
    }

    #[test]
    fn request_has_path_of_endpoint_and_of_signal() {
        for (endpoint, path, host) in [
            ("http://otel:4318", "/v1/traces", "otel:4318"),
            ("http://[::1]:4318", "/v1/traces", "[::1]:4318"),
            ("http://otel/otlp", "/otlp/v1/traces", "otel"),
        ] {
            let request = collector(endpoint).request("/v1/traces", Bytes::new()).unwrap();
            assert_eq!((request.uri().path(), request.uri().host()), (path, None));
            assert_eq!(request.headers()["host"], host);
            assert_eq!(request.headers()["content-type"], "application/x-protobuf");
        }
    }

    #[test]
    fn reads_headers_and_names_malformed_line_without_its_text() {
        let file = Path::new("headers");
        let headers = further_headers(file, b"Authorization: Bearer x\n\nx-team:  a b \n").unwrap();
        assert_eq!(headers["authorization"], "Bearer x");
        assert_eq!(headers["x-team"], "a b");
        assert!(headers["authorization"].is_sensitive());
        for text in ["a: b\nsecret", "a: b\n: secret", "a: b\nx y: secret", "a: b\nx: secret\u{7f}"]
        {
            let error = further_headers(file, text.as_bytes()).unwrap_err().to_string();
            assert_eq!(error, "line 2 of headers is not NAME: VALUE in visible ASCII");
        }
    }

    #[test]
    fn only_overload_and_lack_of_response_are_temporary() {
        for (status, is_temporary) in [(429, true), (503, true), (400, false), (404, false)] {
            let status = StatusCode::from_u16(status).unwrap();
            assert_eq!(CollectorError::Refused(status).is_temporary(), is_temporary);
        }
        let connect = HttpsError::Connect(std::io::ErrorKind::ConnectionRefused.into());
        assert!(CollectorError::Connection(connect).is_temporary());
    }
}
