//! The new process's side of a take-over.

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use tokio::time::timeout;
use underpass_config::Settings;
use underpass_interception::{BoundListener, Handover};

use super::control_socket::{self, ControlSocket};
use super::{
    ACCEPT, ANSWER_TIMEOUT, CONTROL_SOCKET, INSTANCE_SOCKET, LISTENERS, OK, READY, REFUSED, RULES,
    Role, TakeOverError,
};

/// The connection to the running process. Dropping it before [`ready`](Self::ready) succeeds
/// cancels the take-over.
#[derive(Debug)]
pub(crate) struct TakeoverClient {
    conversation: Handover,
    socket: PathBuf,
}

/// The sockets received from the running process.
#[derive(Debug, Default)]
pub(crate) struct ReceivedSockets {
    pub(crate) listeners: Vec<(String, BoundListener)>,
    /// The socket on which the running process accepts take-overs.
    pub(crate) control_socket: Option<ControlSocket>,
    /// The socket that identifies the proxy of the network namespace (`instance.rs`).
    pub(crate) instance: Option<OwnedFd>,
}

impl TakeoverClient {
    /// Connects to the running process and receives its sockets; `None` if none is running.
    pub(crate) async fn connect(
        settings: &Settings,
    ) -> Result<Option<(Self, ReceivedSockets)>, TakeOverError> {
        let Some(socket) =
            control_socket::path(&settings.take_over).map_err(TakeOverError::Namespace)?
        else {
            return Ok(None);
        };
        let failed = |source| TakeOverError::Io { socket: socket.clone(), source };
        let Some(stream) = control_socket::connect(&socket).await.map_err(failed)? else {
            return Ok(None);
        };
        let conversation = Handover::new(stream);
        let peer = conversation.peer().map_err(failed)?;
        if !peer.is_trusted() {
            return Err(TakeOverError::UntrustedUser { socket, uid: peer.uid });
        }
        let role = Role::new(settings).map_err(TakeOverError::Namespace)?;
        let client = Self::new(conversation, socket.clone());
        let (names, sockets) = client.ask("hello", &role.to_string()).await?;
        let mut handed = ReceivedSockets::default();
        for (name, socket) in names.split(' ').zip(sockets) {
            handed.add(name, socket, &client.socket).map_err(failed)?;
        }
        Ok(Some((client, handed)))
    }

    pub(super) fn new(conversation: Handover, socket: PathBuf) -> Self {
        Self { conversation, socket }
    }

    /// Requests that the running process stop repairing the rules.
    pub(crate) async fn rules(&self) -> Result<(), TakeOverError> {
        self.ask(RULES, RULES).await.map(|_| ())
    }

    /// Requests that the running process stop accepting.
    pub(crate) async fn accept(&self) -> Result<(), TakeOverError> {
        self.ask(ACCEPT, ACCEPT).await.map(|_| ())
    }

    /// Completes the take-over: the running process starts its drain. An exit of that process is a
    /// success too.
    pub(crate) async fn ready(&self) -> Result<(), TakeOverError> {
        match self.ask(READY, READY).await {
            Err(TakeOverError::Closed { .. }) if self.is_gone().await => Ok(()),
            outcome => outcome.map(|_| ()),
        }
    }

    async fn is_gone(&self) -> bool {
        matches!(control_socket::connect(&self.socket).await, Ok(None))
    }

    /// Sends `line` and returns the payload of a positive answer. Errors contain `request`.
    async fn ask(
        &self,
        request: &'static str,
        line: &str,
    ) -> Result<(String, Vec<OwnedFd>), TakeOverError> {
        let failed = |source: io::Error| TakeOverError::Io { socket: self.socket.clone(), source };
        let answer = async {
            self.conversation.send(line, &[]).await?;
            self.conversation.receive().await
        };
        let answer = timeout(ANSWER_TIMEOUT, answer).await;
        let received = match answer.map_err(|_| TakeOverError::NoAnswer { request })? {
            Err(error) if is_end(&error) => None,
            received => received.map_err(failed)?,
        };
        let (answer, sockets) = received.ok_or(TakeOverError::Closed { request })?;
        match answer.split_once(' ') {
            None if answer == OK => Ok((String::new(), sockets)),
            Some((LISTENERS, names)) => Ok((names.to_owned(), sockets)),
            Some((REFUSED, why)) => Err(TakeOverError::Refused(why.to_owned())),
            _ => Err(TakeOverError::UnexpectedAnswer { request, answer }),
        }
    }
}

/// Whether the error means that the peer has closed the connection.
fn is_end(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset)
}

impl ReceivedSockets {
    fn add(&mut self, name: &str, socket: OwnedFd, path: &Path) -> io::Result<()> {
        if name == CONTROL_SOCKET {
            self.control_socket = Some(ControlSocket::share(path, socket)?);
        } else if name == INSTANCE_SOCKET {
            self.instance = Some(socket);
        } else {
            self.listeners.push((name.to_owned(), BoundListener::try_from(socket)?));
        }
        Ok(())
    }
}
