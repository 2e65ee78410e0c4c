//! Requests to a running proxy over its Unix socket of administration.

use std::borrow::Cow;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, header};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::time::timeout;
use underpass_config::Hint;

use crate::process::take_over::control_socket::{self, ADMIN};

/// Timeout for an answer to begin.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection to a running proxy.
#[derive(Debug)]
pub(crate) struct AdminClient {
    sender: http1::SendRequest<Empty<Bytes>>,
}

/// Why a running proxy did not answer.
#[derive(Debug, Error)]
pub(crate) enum AdminClientError {
    #[error("admin.socket is off")]
    Off,
    #[error("cannot read the network namespace of this process from /proc")]
    Namespace(#[source] io::Error),
    #[error("no proxy listens at {}", socket.display())]
    NoProxy { socket: PathBuf },
    #[error("no permission to connect to {}", socket.display())]
    Permission { socket: PathBuf },
    #[error("cannot connect to {}", socket.display())]
    Connect { socket: PathBuf, source: io::Error },
    #[error("the proxy did not answer {path} within {} s", ANSWER_TIMEOUT.as_secs())]
    Silent { path: String },
    #[error("the proxy refused {path}: {reason}")]
    Refused { path: String, reason: String },
    #[error("the connection to the proxy failed")]
    Http(#[from] hyper::Error),
    #[error("{0:?} is not a path, such as /version")]
    Path(String),
    #[error("this version cannot read the answer of the proxy")]
    Unknown(#[from] serde_json::Error),
}

impl Hint for AdminClientError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        let fixed = match self {
            Self::Off => "name the socket of the running proxy with `--socket`",
            Self::NoProxy { socket } => return Some(hint_of_missing(socket).into()),
            Self::Permission { .. } => {
                "run the command as root, or as the user that started the proxy"
            }
            Self::Silent { .. } => "check whether the proxy is stopped or overloaded",
            Self::Unknown(_) => "use the command of the same version as the proxy",
            Self::Path(_) => "`underpass admin get /` lists the paths",
            Self::Namespace(_) | Self::Connect { .. } | Self::Refused { .. } | Self::Http(_) => {
                return None;
            }
        };
        Some(fixed.into())
    }
}

/// Names the sockets of other proxies, if there are any.
fn hint_of_missing(socket: &Path) -> String {
    let start = "start the proxy, or run the command in its network namespace and container";
    match control_socket::others(socket, ADMIN).as_slice() {
        [] => start.to_owned(),
        others => {
            let others: Vec<_> = others.iter().map(|path| path.display().to_string()).collect();
            format!(
                "{start}, or name the socket of another proxy: --socket {}",
                others.join(" or ")
            )
        }
    }
}

impl AdminClient {
    /// Connects to the proxy that listens at `socket`.
    ///
    /// # Errors
    ///
    /// No proxy listens, or the user of this process may not connect.
    pub(crate) async fn connect(socket: PathBuf) -> Result<Self, AdminClientError> {
        let stream = match UnixStream::connect(&socket).await {
            Ok(stream) => stream,
            Err(source) => {
                return Err(match source.kind() {
                    ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
                        AdminClientError::NoProxy { socket }
                    }
                    ErrorKind::PermissionDenied => AdminClientError::Permission { socket },
                    _ => AdminClientError::Connect { socket, source },
                });
            }
        };
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // An error of the connection is one of the request too.
        tokio::spawn(async move { connection.await.ok() });
        Ok(Self { sender })
    }

    /// Sends a request, and waits for the head of the answer.
    ///
    /// # Errors
    ///
    /// The proxy refuses the request, or does not answer.
    pub(crate) async fn request(
        &mut self,
        method: Method,
        path: &str,
    ) -> Result<Response<Incoming>, AdminClientError> {
        let request = Request::builder().method(method).uri(path);
        let request = request.header(header::HOST, "localhost").body(Empty::new());
        let request = request.ok().filter(|_| path.starts_with('/'));
        let request = request.ok_or_else(|| AdminClientError::Path(path.to_owned()))?;
        let answered = timeout(ANSWER_TIMEOUT, self.sender.send_request(request)).await;
        let answer = answered.map_err(|_| AdminClientError::Silent { path: path.to_owned() })??;
        if answer.status().is_success() {
            return Ok(answer);
        }
        let reason = answer.into_body().collect().await?.to_bytes();
        let reason = String::from_utf8_lossy(&reason).trim_end().to_owned();
        Err(AdminClientError::Refused { path: path.to_owned(), reason })
    }

    /// Sends a request whose answer is one JSON value.
    ///
    /// # Errors
    ///
    /// As [`request`](Self::request); or this version cannot read the value.
    pub(crate) async fn json<T: DeserializeOwned>(
        &mut self,
        method: Method,
        path: &str,
    ) -> Result<T, AdminClientError> {
        let answer = self.request(method, path).await?.into_body().collect().await?;
        Ok(serde_json::from_slice(&answer.to_bytes())?)
    }
}
