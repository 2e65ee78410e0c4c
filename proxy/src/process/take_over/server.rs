//! The running process's side of a take-over.

use std::borrow::Cow;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::time::Duration;

use tokio::time::{Instant, timeout, timeout_at};
use underpass_config::Settings;
use underpass_interception::{Handover, Peer};

use super::control_socket::{ControlSocket, TAKE_OVER};
use super::role::Role;
use super::subject::Subject;
use super::{
    ACCEPT, ADMIN_SOCKET, ALIVE, ANSWER_TIMEOUT, CONTROL_SOCKET, INSTANCE_SOCKET, LISTENERS,
    LONGEST_MESSAGE, OK, READY, REFUSED, SWITCH_TIMEOUT, TakeOverError, encode,
};
use crate::process::instance::Instance;
use crate::process::notify;
use crate::traffic::listeners::NamedListeners;

/// The first message, as errors name it.
const HELLO: &str = "hello";
/// The delay after a failed accept, for example without file descriptors.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_secs(1);

/// Timeout for finishing the work that would disturb the new process, below `ANSWER_TIMEOUT`.
const COMPLETION_TIMEOUT: Duration = Duration::from_secs(4);

/// Accepts requests of new processes to take over from this one.
#[derive(Debug)]
pub(crate) struct TakeoverServer {
    /// `None` if take-over is off or the socket cannot be created.
    control_socket: Option<ControlSocket>,
    /// The socket of administration, which another task accepts on.
    admin_socket: Option<ControlSocket>,
    listeners: NamedListeners,
    instance: Option<Instance>,
    role: Role,
    /// Closes when this process ends, which tells the new process of the end.
    _alive: StdUnixStream,
    /// The other end, which is passed to the new process.
    alive: OwnedFd,
}

/// The outcome of an attempt to take over.
#[derive(Debug)]
pub(crate) enum TakeoverOutcome {
    /// The other process has taken over.
    Completed { pid: Option<i32> },
    /// The attempt failed. The other process may have changed the rules.
    Abandoned,
}

#[derive(Debug, thiserror::Error)]
enum ConversationError {
    #[error("the other process runs as user {0}, neither root nor the proxy's user")]
    UntrustedUser(u32),
    #[error("the other process has a different role")]
    Refused,
    #[error("no request within {} s after \"{after}\"", limit.as_secs())]
    Late { after: String, limit: Duration },
    #[error("the connection was closed before \"{wanted}\"")]
    Closed { wanted: &'static str },
    #[error("received \"{message}\" instead of \"{wanted}\"")]
    UnexpectedMessage { message: String, wanted: &'static str },
    #[error("work in progress is not finished within {} s", COMPLETION_TIMEOUT.as_secs())]
    Incomplete,
    #[error("the connection failed")]
    Io(#[from] io::Error),
}

impl TakeoverServer {
    /// Listens on the socket that was handed over, or else at the path from the settings. With
    /// `take_over.socket: auto` a failure to listen is only logged.
    pub(crate) async fn listen(
        settings: &Settings,
        listeners: NamedListeners,
        handed: Option<ControlSocket>,
    ) -> Result<Self, TakeOverError> {
        let role = Role::new(settings).map_err(TakeOverError::Namespace)?;
        let setting = &settings.take_over;
        let control_socket =
            ControlSocket::bind_configured(settings, setting, TAKE_OVER, handed).await?;
        let (_alive, alive) = StdUnixStream::pair().map_err(TakeOverError::Socket)?;
        let (admin_socket, instance, alive) = (None, None, alive.into());
        Ok(Self { control_socket, admin_socket, listeners, instance, role, _alive, alive })
    }

    /// Adds the instance socket to the sockets that are handed over.
    pub(crate) fn with_instance(self, instance: Option<Instance>) -> Self {
        Self { instance, ..self }
    }

    /// Adds the socket of administration to the sockets that are handed over.
    pub(crate) fn with_admin_socket(self, admin_socket: Option<ControlSocket>) -> Self {
        Self { admin_socket, ..self }
    }

    /// The listeners that are handed over.
    pub(crate) fn listeners(&self) -> &NamedListeners {
        &self.listeners
    }

    /// Makes this process the owner of the sockets' files, which it then removes at its end.
    pub(crate) fn own(&mut self) {
        self.set_owner(true);
    }

    fn set_owner(&mut self, is_owner: bool) {
        for socket in [&mut self.control_socket, &mut self.admin_socket].into_iter().flatten() {
            socket.own(is_owner);
        }
    }

    /// Waits for a process that requests a take-over. Cancel-safe.
    pub(crate) async fn accept(&self) -> Handover {
        let Some(socket) = &self.control_socket else {
            return std::future::pending().await;
        };
        loop {
            match socket.accept().await {
                Ok(connection) => return connection,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a take-over");
                    tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
                }
            }
        }
    }

    /// Performs the take-over of `subject` within its timeouts. Cancelling leaves `subject` paused.
    pub(crate) async fn answer(
        &mut self,
        conversation: Handover,
        subject: &mut impl Subject,
    ) -> TakeoverOutcome {
        let conversation = conversation.with_longest_line(LONGEST_MESSAGE);
        let peer = conversation.peer();
        let outcome = match &peer {
            Ok(peer) => self.perform(&conversation, *peer, subject).await,
            Err(error) => Err(ConversationError::Io(io::Error::from(error.kind()))),
        };
        let pid = peer.ok().and_then(|peer| peer.pid);
        match outcome {
            Ok(()) => {
                self.set_owner(false);
                TakeoverOutcome::Completed { pid }
            }
            // Another process only checked that this one listens.
            Err(ConversationError::Closed { wanted: HELLO }) => TakeoverOutcome::Abandoned,
            Err(error) => {
                subject.resume();
                let error = crate::error::chain(&error);
                tracing::warn!(
                    pid,
                    error,
                    "take-over by another process failed: this process resumes"
                );
                TakeoverOutcome::Abandoned
            }
        }
    }

    /// The sockets that are handed over, with their names.
    fn sockets(&self) -> Vec<(Cow<'static, str>, BorrowedFd<'_>)> {
        let listeners = self.listeners.iter();
        let mut all: Vec<_> =
            listeners.map(|(name, listener)| (Cow::Borrowed(*name), listener.as_fd())).collect();
        if let Some(socket) = &self.control_socket {
            all.push((CONTROL_SOCKET.into(), socket.listener.as_fd()));
        }
        if let Some(socket) = &self.admin_socket {
            let path = encode(socket.path());
            all.push((format!("{ADMIN_SOCKET}{path}").into(), socket.listener.as_fd()));
        }
        if let Some(instance) = &self.instance {
            all.push((INSTANCE_SOCKET.into(), instance.listener().as_fd()));
        }
        all.push((ALIVE.into(), self.alive.as_fd()));
        all
    }

    async fn perform(
        &self,
        conversation: &Handover,
        peer: Peer,
        subject: &mut impl Subject,
    ) -> Result<(), ConversationError> {
        let role =
            receive(conversation, HELLO, "connecting", Instant::now(), ANSWER_TIMEOUT).await?;
        if !peer.is_trusted() {
            conversation
                .send(&format!("{REFUSED} only root and the proxy's user may take over"), &[])
                .await?;
            return Err(ConversationError::UntrustedUser(peer.uid));
        }
        if let Some(why) = self.role.refusal(&role) {
            conversation.send(&format!("{REFUSED} {why}"), &[]).await?;
            return Err(ConversationError::Refused);
        }
        tracing::info!(pid = peer.pid, "another process is taking over");
        let (names, sockets): (Vec<_>, Vec<_>) = self.sockets().into_iter().unzip();
        conversation.send(&format!("{LISTENERS} {}", names.join(" ")), &sockets).await?;
        prepare(conversation, subject).await?;
        subject.pause().await;
        conversation.send(OK, &[]).await?;
        let message = receive(conversation, READY, ACCEPT, Instant::now(), SWITCH_TIMEOUT).await?;
        if message != READY {
            return Err(ConversationError::UnexpectedMessage { message, wanted: READY });
        }
        let completed = timeout(COMPLETION_TIMEOUT, subject.complete()).await;
        completed.map_err(|_| ConversationError::Incomplete)?;
        // Before the answer, because the supervisor accepts messages of the main process only.
        notify::succeeded_by(peer.pid);
        // The new process ends without this answer.
        let answered = conversation.send(OK, &[]).await;
        if answered.is_err() {
            notify::resumed();
        }
        Ok(answered?)
    }
}

/// Performs requests until the new process takes over accepting.
async fn prepare<S: Subject>(
    conversation: &Handover,
    subject: &mut S,
) -> Result<(), ConversationError> {
    let mut after = HELLO.to_owned();
    let mut progress = Instant::now();
    loop {
        let limit = subject.timeout();
        let message = receive(conversation, S::REQUESTS, &after, progress, limit).await?;
        if message == ACCEPT {
            return Ok(());
        }
        let Some(reply) = subject.perform(&message).await else {
            return Err(ConversationError::UnexpectedMessage { message, wanted: S::REQUESTS });
        };
        let attached: Vec<_> = reply.attached.iter().map(|one| one.as_fd()).collect();
        conversation.send(&reply.line, &attached).await?;
        if reply.is_progress {
            (after, progress) = (message, Instant::now());
        }
    }
}

/// Receives a message, at most `limit` after the message `after`, whose time is `since`.
async fn receive(
    conversation: &Handover,
    wanted: &'static str,
    after: &str,
    since: Instant,
    limit: Duration,
) -> Result<String, ConversationError> {
    match timeout_at(since + limit, conversation.receive()).await {
        Err(_) => Err(ConversationError::Late { after: after.to_owned(), limit }),
        Ok(Ok(Some((line, _)))) => Ok(line),
        Ok(Ok(None)) => Err(ConversationError::Closed { wanted }),
        Ok(Err(error)) if error.kind() == ErrorKind::UnexpectedEof => {
            Err(ConversationError::Closed { wanted })
        }
        Ok(Err(error)) => Err(ConversationError::Io(error)),
    }
}
