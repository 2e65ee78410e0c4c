//! The source of pods that connects to a node agent over ZDS. istio-cni and Cilium select the pods,
//! install their rules, and pass their network namespaces, as for ztunnel.
//!
//! The agent listens; this source connects, and reconnects with back-off. Pods stay enrolled
//! without a connection. Each connection starts with a snapshot; pods that it does not name are
//! removed.
//!
//! In reading order: `messages`, `session` (the protocol without I/O), `connection`.

mod connection;
mod messages;
pub(crate) mod session;

use std::borrow::Cow;
use std::convert::Infallible;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;
use tokio::time::sleep;
use underpass_config::{Hint, Quoted};
use underpass_interception::SeqPacket;

use crate::backoff::Backoff;
use crate::pods::source::{PodSource, SourceContext, SourceRun, SourceState};
use crate::pods::zds::connection::{Connection, ConnectionError};

/// The bounds of the back-off before a new connection, as in ztunnel. istio-cni accepts five
/// connections a second.
const MIN_BACKOFF: Duration = Duration::from_millis(10);
const MAX_BACKOFF: Duration = Duration::from_secs(15);

/// Connects to the node agent at a path.
#[derive(Debug)]
pub(crate) struct ZdsSource {
    socket: PathBuf,
}

/// The reason why there is no connection to the agent.
#[derive(Debug, Error)]
enum ZdsError {
    #[error("cannot connect to {}", socket.display())]
    Connect { socket: PathBuf, source: io::Error },
    #[error("the process that listens at {} runs as user {uid}, which is not trusted", socket.display())]
    UntrustedUser { socket: PathBuf, uid: u32 },
    #[error(transparent)]
    Connection(#[from] ConnectionError),
}

impl Hint for ZdsError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        let fixed = match self {
            Self::Connect { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                "run underpass as the user that owns the socket, which is root for istio-cni"
            }
            Self::Connect { .. } => {
                "check that the node agent (istio-cni) runs, and that node.pods.zds is its socket"
            }
            Self::UntrustedUser { .. } => "remove the file: only root may pass pods to this node",
            Self::Connection(error) => return error.hint(),
        };
        Some(fixed.into())
    }
}

impl ZdsSource {
    /// Connects to the agent at `socket`.
    pub(crate) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    async fn connect_for_ever(self, context: SourceContext) -> Infallible {
        let SourceContext { registry, health, mut pauses, inherited } = context;
        let mut backoff = Backoff::new(MIN_BACKOFF, MAX_BACKOFF);
        let mut inherited = inherited.and_then(|state| Connection::resume(state, &registry));
        loop {
            let connection = match inherited.take() {
                Some(connection) => {
                    tracing::info!("continuing the connection to the node agent");
                    health.set_ready(connection.has_snapshot());
                    Ok(connection)
                }
                None => self.connect().map(|socket| Connection::new(socket, registry.clone())),
            };
            let error = match connection {
                Ok(connection) => {
                    let on_snapshot = || {
                        health.set_ready(true);
                        backoff.reset();
                    };
                    connection.serve(on_snapshot, &mut pauses).await.into()
                }
                Err(error) => error,
            };
            health.set_ready(false);
            let retry_in = backoff.next();
            let hint = error.hint();
            let error = Quoted::chain(&error);
            tracing::warn!(%error, hint = hint.as_deref(), ?retry_in, "no connection to the node agent");
            tokio::select! {
                () = sleep(retry_in) => {}
                request = pauses.next() => request.pause(SourceState::default()).await,
            }
        }
    }

    fn connect(&self) -> Result<SeqPacket, ZdsError> {
        let socket = || self.socket.clone();
        let failed = |source| ZdsError::Connect { socket: socket(), source };
        let connection = SeqPacket::connect(&self.socket).map_err(failed)?;
        let peer = connection.peer().map_err(failed)?;
        if !peer.is_trusted() {
            return Err(ZdsError::UntrustedUser { socket: socket(), uid: peer.uid });
        }
        tracing::info!(socket = %self.socket.display(), "connected to the node agent");
        Ok(connection)
    }
}

impl PodSource for ZdsSource {
    fn run(self: Box<Self>, context: SourceContext) -> SourceRun {
        Box::pin(async move { match self.connect_for_ever(context).await {} })
    }
}

#[cfg(test)]
mod tests;
