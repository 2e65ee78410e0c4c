//! The new process's side of a take-over.

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::time::timeout;
use underpass_config::Settings;
use underpass_interception::{BoundListener, Handover};

use super::control_socket::{self, ControlSocket, TAKE_OVER};
use super::role::Role;
use super::{
    ACCEPT, ADMIN_SOCKET, ALIVE, ANSWER_TIMEOUT, BUSY, CONTROL_SOCKET, INSTANCE_SOCKET, LISTENERS,
    LONGEST_MESSAGE, OK, READY, REFUSED, RULES, TakeOverError, decode,
};

/// How long the sockets of a process that has ended may stay open: the kernel closes them one
/// after the other.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// The connection to the running process. Dropping it before [`ready`](Self::ready) succeeds
/// cancels the take-over.
#[derive(Debug)]
pub(crate) struct TakeoverClient {
    /// `None` after a failure: later answers could be those of earlier requests.
    conversation: Mutex<Option<Handover>>,
    socket: PathBuf,
    /// Ends with the running process; `None` before it was received.
    alive: Mutex<Option<UnixStream>>,
}

/// The sockets received from the running process.
#[derive(Debug, Default)]
pub(crate) struct ReceivedSockets {
    pub(crate) listeners: Vec<(String, BoundListener)>,
    /// The socket on which the running process accepts take-overs.
    pub(crate) control_socket: Option<ControlSocket>,
    /// The socket on which the running process serves administration.
    pub(crate) admin_socket: Option<ControlSocket>,
    /// The socket that identifies the proxy of the network namespace (`instance.rs`).
    pub(crate) instance: Option<OwnedFd>,
    alive: Option<UnixStream>,
}

/// An answer of the running process.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The first word.
    pub(crate) word: String,
    pub(crate) rest: String,
    pub(crate) descriptors: Vec<OwnedFd>,
}

impl TakeoverClient {
    /// Connects to the running process and receives its sockets; `None` if none is running.
    async fn connect(
        settings: &Settings,
    ) -> Result<Option<(Self, ReceivedSockets)>, TakeOverError> {
        let Some(socket) = control_socket::path(&settings.take_over, TAKE_OVER)
            .map_err(TakeOverError::Namespace)?
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
        let answer = client.ask("hello", &role.to_string(), ANSWER_TIMEOUT).await?;
        if answer.word != LISTENERS {
            return Err(answer.unexpected("hello"));
        }
        let mut handed = ReceivedSockets::default();
        for (name, socket) in answer.rest.split(' ').zip(answer.descriptors) {
            handed.add(name, socket, &client.socket).map_err(failed)?;
        }
        *client.alive.lock().await = handed.alive.take();
        Ok(Some((client, handed)))
    }

    /// Connects if `take_over` is set; `None` without it, or without a running process.
    pub(crate) async fn connect_if(
        take_over: bool,
        settings: &Settings,
    ) -> Result<Option<(Self, ReceivedSockets)>, TakeOverError> {
        if !take_over {
            return Ok(None);
        }
        let client = Self::connect(settings).await?;
        if client.is_none() {
            tracing::info!("no running process to take over from: starting without one");
        }
        Ok(client)
    }

    pub(super) fn new(conversation: Handover, socket: PathBuf) -> Self {
        let conversation = conversation.with_longest_line(LONGEST_MESSAGE);
        Self { conversation: Mutex::new(Some(conversation)), socket, alive: Mutex::default() }
    }

    /// Takes over the rules of the fixed pod: the running process stops repairing them.
    pub(crate) async fn rules(&self) -> Result<(), TakeOverError> {
        self.request(RULES, RULES).await
    }

    /// Requests that the running process stop accepting.
    pub(crate) async fn accept(&self) -> Result<(), TakeOverError> {
        self.request(ACCEPT, ACCEPT).await
    }

    /// Like [`accept`](Self::accept), but also succeeds if the running process has ended.
    pub(crate) async fn accept_unless_ended(&self) -> Result<(), TakeOverError> {
        self.unless_ended(self.accept().await).await
    }

    /// Completes the take-over: the other process drains. Succeeds too if that process has ended.
    pub(crate) async fn ready(&self) -> Result<(), TakeOverError> {
        self.unless_ended(self.request(READY, READY).await).await
    }

    /// Turns a closed connection into success if the running process has ended.
    pub(crate) async fn unless_ended(
        &self,
        outcome: Result<(), TakeOverError>,
    ) -> Result<(), TakeOverError> {
        match outcome {
            Err(TakeOverError::Closed { .. }) if self.has_ended().await => Ok(()),
            outcome => outcome,
        }
    }

    /// Closes the connection: the running process resumes.
    pub(crate) async fn cancel(&self) {
        *self.conversation.lock().await = None;
    }

    /// Whether the running process has ended, not only closed the connection.
    pub(crate) async fn has_ended(&self) -> bool {
        let mut alive = self.alive.lock().await;
        let Some(alive) = &mut *alive else { return false };
        matches!(timeout(END_TIMEOUT, alive.read(&mut [0])).await, Ok(Ok(0)))
    }

    /// Sends `line`, which errors call `request`, and waits until it is performed.
    pub(crate) async fn request(
        &self,
        request: &'static str,
        line: &str,
    ) -> Result<(), TakeOverError> {
        let answer = self.ask(request, line, ANSWER_TIMEOUT).await?;
        if answer.word == OK { Ok(()) } else { Err(answer.unexpected(request)) }
    }

    /// Sends `line`, which errors call `request`, and returns the answer. A refusal is an error.
    pub(crate) async fn ask(
        &self,
        request: &'static str,
        line: &str,
        limit: Duration,
    ) -> Result<Answer, TakeOverError> {
        let mut conversation = self.conversation.lock().await;
        let Some(open) = conversation.take() else {
            return Err(TakeOverError::Closed { request });
        };
        let exchange = async {
            open.send(line, &[]).await?;
            open.receive().await
        };
        let received = match timeout(limit, exchange).await {
            Err(_) => return Err(TakeOverError::NoAnswer { request, timeout: limit }),
            Ok(Err(error)) if is_end(&error) => return Err(TakeOverError::Closed { request }),
            Ok(Err(source)) => {
                return Err(TakeOverError::Io { socket: self.socket.clone(), source });
            }
            Ok(Ok(received)) => received.ok_or(TakeOverError::Closed { request })?,
        };
        *conversation = Some(open);
        let (line, descriptors) = received;
        let (word, rest) = line.split_once(' ').unwrap_or((&line, ""));
        match word {
            REFUSED => Err(TakeOverError::Refused(rest.to_owned())),
            BUSY => Err(TakeOverError::Busy(rest.to_owned())),
            _ => Ok(Answer { word: word.to_owned(), rest: rest.to_owned(), descriptors }),
        }
    }
}

impl Answer {
    /// The error of an answer that does not fit the request.
    pub(crate) fn unexpected(self, request: &'static str) -> TakeOverError {
        TakeOverError::UnexpectedAnswer { request, answer: self.word }
    }
}

/// Whether the error means that the peer has closed the connection.
fn is_end(error: &io::Error) -> bool {
    // UnexpectedEof: the peer ended in the middle of a line.
    matches!(
        error.kind(),
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof
    )
}

impl ReceivedSockets {
    fn add(&mut self, name: &str, socket: OwnedFd, path: &Path) -> io::Result<()> {
        match name {
            CONTROL_SOCKET => self.control_socket = Some(ControlSocket::share(path, socket)?),
            INSTANCE_SOCKET => self.instance = Some(socket),
            ALIVE => {
                let alive = StdUnixStream::from(socket);
                alive.set_nonblocking(true)?;
                self.alive = Some(UnixStream::from_std(alive)?);
            }
            name => match name.strip_prefix(ADMIN_SOCKET) {
                Some(path) => {
                    self.admin_socket = Some(ControlSocket::share(&decode(path), socket)?);
                }
                None => self.listeners.push((name.to_owned(), BoundListener::try_from(socket)?)),
            },
        }
        Ok(())
    }
}
