//! One connection to a node agent: performs its requests in the registry, and sends the responses.

use std::borrow::Cow;
use std::convert::Infallible;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use thiserror::Error;
use tokio::time::timeout;
use underpass_config::{Hint, PodUid, Quoted};
use underpass_interception::{InterceptionError, Message, Namespace, SeqPacket};

use crate::pods::enrolment::EnrolError;
use crate::pods::facts::PodFacts;
use crate::pods::registry::PodRegistry;
use crate::pods::source::{PauseRequests, SourceState};
use crate::pods::zds::session::{self, Command, RequestError, Session};

/// How long a response waits for the enrolment. istio-cni waits 5 s for the response, and its
/// plugin 5 s for the whole addition of a pod. Enrolment continues afterwards.
const ENROL_TIMEOUT: Duration = Duration::from_secs(3);

/// A connection, and the registry that its requests change.
#[derive(Debug)]
pub(super) struct Connection {
    socket: SeqPacket,
    registry: PodRegistry,
    session: Session,
    /// Whether the agent still awaits the first message.
    must_greet: bool,
}

/// The reason why a connection ended.
#[derive(Debug, Error)]
pub(super) enum ConnectionError {
    #[error("the node agent closed the connection")]
    Closed,
    #[error("cannot exchange messages with the node agent")]
    Io(#[source] io::Error),
    #[error("the node agent's message is malformed")]
    Protocol(#[source] RequestFailure),
}

impl Hint for ConnectionError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        let fixed = match self {
            Self::Closed | Self::Io(_) => "read the log of the node agent; pods stay enrolled",
            Self::Protocol(_) => "check that node.pods.zds is the socket of ZDS, version 1",
        };
        Some(fixed.into())
    }
}

/// The error that a response reports to the agent.
#[derive(Debug, Error)]
pub(super) enum RequestFailure {
    #[error("cannot receive the message")]
    Message(#[source] io::Error),
    #[error("invalid request")]
    Invalid(#[from] RequestError),
    #[error("cannot use the descriptor of pod {uid}")]
    Namespace { uid: PodUid, source: InterceptionError },
    #[error("cannot enrol pod {uid}")]
    Enrol { uid: PodUid, source: EnrolError },
    #[error(
        "pod {uid} is not enrolled after {} s: underpass continues to try",
        ENROL_TIMEOUT.as_secs()
    )]
    Slow { uid: PodUid },
}

impl RequestFailure {
    fn ends_connection(&self) -> bool {
        match self {
            Self::Message(_) => true,
            Self::Invalid(error) => error.ends_connection(),
            Self::Namespace { .. } | Self::Enrol { .. } | Self::Slow { .. } => false,
        }
    }
}

impl Connection {
    pub(super) fn new(socket: SeqPacket, registry: PodRegistry) -> Self {
        Self { socket, registry, session: Session::new(), must_greet: true }
    }

    /// Continues the connection of the process that was taken over; `None` if it had none.
    pub(super) fn resume(state: SourceState, registry: &PodRegistry) -> Option<Self> {
        let socket = SeqPacket::new(state.descriptors.into_iter().next()?).ok()?;
        let session = Session::resume(&state.text)?;
        Some(Self { socket, registry: registry.clone(), session, must_greet: false })
    }

    /// Whether the agent has sent all pods.
    pub(super) fn has_snapshot(&self) -> bool {
        self.session.has_snapshot()
    }

    /// The state from which another process continues the connection.
    fn state(&self) -> io::Result<SourceState> {
        let descriptors = vec![self.socket.as_fd().try_clone_to_owned()?];
        Ok(SourceState { text: self.session.state(), descriptors })
    }

    /// Performs requests until the connection ends. Calls `on_snapshot` at the end of a snapshot.
    /// Pauses between two requests.
    pub(super) async fn serve(
        mut self,
        on_snapshot: impl FnMut(),
        pauses: &mut PauseRequests,
    ) -> ConnectionError {
        match self.exchange(on_snapshot, pauses).await {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    async fn exchange(
        &mut self,
        mut on_snapshot: impl FnMut(),
        pauses: &mut PauseRequests,
    ) -> Result<Infallible, ConnectionError> {
        if self.must_greet {
            self.send(&session::hello()).await?;
        }
        loop {
            let received = tokio::select! {
                // The other process answers a request that arrives now.
                biased;
                request = pauses.next() => {
                    request.pause(self.state().map_err(ConnectionError::Io)?).await;
                    continue;
                }
                received = self.socket.receive() => received,
            };
            let outcome = match received {
                Ok(Some(message)) => self.perform(message, &mut on_snapshot).await,
                Ok(None) => return Err(ConnectionError::Closed),
                Err(error) if error.kind() == ErrorKind::InvalidData => {
                    Err(RequestFailure::Message(error))
                }
                Err(error) => return Err(ConnectionError::Io(error)),
            };
            let Err(failure) = outcome else {
                self.send(&session::response(None)).await?;
                continue;
            };
            let error = Quoted::chain(&failure);
            self.send(&session::response(Some(error.as_str()))).await?;
            if failure.ends_connection() {
                return Err(ConnectionError::Protocol(failure));
            }
            // The registry logs failed enrolments.
            if !matches!(failure, RequestFailure::Enrol { .. }) {
                tracing::warn!(%error, "rejected a request of the node agent");
            }
        }
    }

    async fn send(&self, message: &[u8]) -> Result<(), ConnectionError> {
        self.socket.send(message, &[]).await.map_err(ConnectionError::Io)
    }

    async fn perform(
        &mut self,
        message: Message,
        on_snapshot: &mut impl FnMut(),
    ) -> Result<(), RequestFailure> {
        match self.session.receive(&message.bytes, message.descriptors)? {
            Command::Add { facts, namespace } => self.add(*facts, namespace).await?,
            Command::Keep(uid) => {
                if !self.registry.is_known(&uid) {
                    tracing::warn!(%uid, "pod not enrolled: the node agent has no network namespace for it");
                }
            }
            // The agent must not wait for the drain.
            Command::Remove(uid) => drop(self.registry.remove(&uid)),
            Command::Retain(named) => {
                self.registry.retain(&named);
                tracing::info!(pods = named.len(), "the node agent has sent all pods");
                on_snapshot();
            }
        }
        Ok(())
    }

    async fn add(&self, facts: PodFacts, descriptor: OwnedFd) -> Result<(), RequestFailure> {
        let uid = facts.uid.clone();
        let namespace = match Namespace::from_descriptor(descriptor) {
            Ok(namespace) => namespace,
            Err(source) => return Err(RequestFailure::Namespace { uid, source }),
        };
        let enrolment = self.registry.add(facts, namespace);
        match timeout(ENROL_TIMEOUT, enrolment.first_outcome()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(source)) => Err(RequestFailure::Enrol { uid, source }),
            Err(_) => Err(RequestFailure::Slow { uid }),
        }
    }
}
