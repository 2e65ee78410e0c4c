//! The plugin's connection to the daemon.

use std::io::{self, ErrorKind};
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::time::{Instant, timeout_at};
use underpass_interception::Handover;

use super::plugin_error::PluginError;
use crate::pods::cni::protocol::{Answer, Request};

/// A connection to the daemon. Closing it before the answer to an addition undoes the addition.
#[derive(Debug)]
pub(super) struct Daemon {
    connection: Handover,
    socket: PathBuf,
    timeout: Duration,
    deadline: Instant,
}

impl Daemon {
    /// Connects to the daemon. `timeout` limits all requests together.
    pub(super) async fn connect(socket: PathBuf, timeout: Duration) -> Result<Self, PluginError> {
        let deadline = Instant::now() + timeout;
        let unreachable = |source| PluginError::Unreachable { socket: socket.clone(), source };
        let connected = timeout_at(deadline, UnixStream::connect(&socket)).await;
        let stream = connected.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()));
        let connection = Handover::new(stream.map_err(unreachable)?);
        let peer = connection.peer().map_err(unreachable)?;
        if !peer.is_trusted() {
            return Err(PluginError::Untrusted { socket, uid: peer.uid });
        }
        Ok(Self { connection, socket, timeout, deadline })
    }

    /// Sends a request, with the descriptor of a namespace if necessary, and waits for the answer.
    pub(super) async fn ask(
        &self,
        request: &Request,
        namespace: Option<BorrowedFd<'_>>,
    ) -> Result<(), PluginError> {
        let exchange = async {
            self.connection.send(&request.encode(), namespace.as_slice()).await?;
            self.connection.receive().await
        };
        let answered = timeout_at(self.deadline, exchange).await.map_err(|_| {
            PluginError::Late { socket: self.socket.clone(), seconds: self.timeout.as_secs() }
        })?;
        let line = match answered {
            Ok(Some((line, _))) => line,
            Err(error) if error.kind() == ErrorKind::InvalidInput => {
                return Err(PluginError::TooLong);
            }
            Err(error) if !is_end(&error) => {
                return Err(self.unreadable(error));
            }
            _ => return Err(PluginError::Closed { socket: self.socket.clone() }),
        };
        match Answer::decode(&line).map_err(|error| self.unreadable(error))? {
            Answer::Done => Ok(()),
            Answer::Refused(refusal) => Err(PluginError::Refused(refusal)),
        }
    }

    fn unreadable(&self, reason: impl ToString) -> PluginError {
        PluginError::Answer { socket: self.socket.clone(), reason: reason.to_string() }
    }
}

/// Whether the error means that the daemon closed the connection.
fn is_end(error: &io::Error) -> bool {
    let kinds = [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset, ErrorKind::UnexpectedEof];
    kinds.contains(&error.kind())
}
