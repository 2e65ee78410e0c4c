//! Hot restart: a new process takes over from the running one, and no connection fails.
//!
//! ```text
//! new process              running process
//! hello: its role     ──>  checks the user and the role
//!                     <──  listening sockets; only the running process accepts
//! rules               ──>  stops repairing the rules             ┐ `run`; for the pods of a node
//!                                                                ┘ see `pods/take_over.rs`
//! accept              ──>  stops accepting; connections wait in the shared accept queue
//! (workers, self-test)
//! ready               ──>  unready, GOAWAY, drains for up to `timeouts.handover_drain`
//! ```
//!
//! If a step fails before `ready`, the new process exits, which closes the connection.
//! The running process then resumes accepting and repairing.
//!
//! The running process also passes one end of a socket pair, whose other end closes with the
//! process. It tells the new process whether the running one ended or only closed the connection.

mod client;
pub(crate) mod control_socket;
mod role;
mod server;
mod subject;

use std::borrow::Cow;
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, percent_encode};
use thiserror::Error;
use underpass_config::Hint;
use underpass_interception::{InterceptionError, Namespace};

use self::control_socket::SocketError;

pub(crate) use client::{Answer, ReceivedSockets, TakeoverClient};
pub(crate) use server::{TakeoverOutcome, TakeoverServer};
pub(crate) use subject::{FixedPod, Reply, Subject};

/// The version of this protocol.
const VERSION: u32 = 1;
/// Timeout for each answer of the running process, and for the first message of the new one.
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Timeout for the new process to obtain its certificate, possibly from a remote CA. The running
/// process serves meanwhile.
pub(crate) const PREPARE_TIMEOUT: Duration = Duration::from_secs(60);
/// Timeout from the last accept of the running process until the new one is ready. New connections
/// wait meanwhile. It exceeds the self-test's deadline and is below usual timeouts of clients.
pub(crate) const SWITCH_TIMEOUT: Duration = Duration::from_secs(8);
/// The maximum length of a message in bytes. The file of a pod has up to 512 KiB, and JSON may
/// escape each byte.
const LONGEST_MESSAGE: usize = 4 << 20;

/// The requests of the new process, in this order.
const RULES: &str = "rules";
const ACCEPT: &str = "accept";
const READY: &str = "ready";
const OK: &str = "ok";
const LISTENERS: &str = "listeners";
/// The answers without which the take-over fails. After the second one another attempt may succeed.
const REFUSED: &str = "refused";
const BUSY: &str = "busy";
/// The name of the control socket among the sockets that are handed over.
const CONTROL_SOCKET: &str = "take-over";
/// The name of the instance socket (`instance.rs`) among the sockets that are handed over.
const INSTANCE_SOCKET: &str = "instance";
/// The text before the path of the admin socket, in the name of that socket.
const ADMIN_SOCKET: &str = "admin:";
/// The name of the socket whose other end closes with the running process.
const ALIVE: &str = "alive";

/// Why this process cannot take over.
#[derive(Debug, Error)]
pub(crate) enum TakeOverError {
    #[error("cannot communicate with the running process at {} (take_over.socket)", socket.display())]
    Io { socket: PathBuf, source: io::Error },
    #[error(
        "the listener at {} (take_over.socket) belongs to the untrusted user {uid}",
        socket.display()
    )]
    UntrustedUser { socket: PathBuf, uid: u32 },
    #[error("cannot read the network namespace of this process from /proc")]
    Namespace(#[source] io::Error),
    #[error("cannot create a socket for a take-over")]
    Socket(#[source] io::Error),
    #[error("the running process refused the take-over: {0}")]
    Refused(String),
    #[error("the running process is busy: {0}")]
    Busy(String),
    #[error(
        "the running process did not answer \"{request}\" within {} s",
        timeout.as_secs()
    )]
    NoAnswer { request: &'static str, timeout: Duration },
    #[error("the running process closed the connection instead of answering \"{request}\"")]
    Closed { request: &'static str },
    #[error("the running process answered \"{answer}\" to \"{request}\"")]
    UnexpectedAnswer { request: &'static str, answer: String },
    #[error(transparent)]
    Listen(#[from] SocketError),
    #[error("no certificate for the pod {pod} within {} s", timeout.as_secs())]
    NoCertificate { pod: String, timeout: Duration },
}

impl Hint for TakeOverError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        let fixed = match self {
            Self::UntrustedUser { .. } => "remove the file",
            Self::Refused(_) => {
                "start with the command, profile, ports, source of pods and user of the running process, or stop it first"
            }
            Self::Busy(_) => "try again: the running process continues with all pods",
            Self::NoAnswer { .. } | Self::Closed { .. } => {
                "check whether the running process is stopped or overloaded, and read its log"
            }
            Self::UnexpectedAnswer { .. } => {
                "stop the running process first if it has another version"
            }
            Self::Listen(error) => return error.hint(),
            Self::NoCertificate { .. } => {
                "check the CA (identity.*): the running process continues with its certificates"
            }
            Self::Io { .. } | Self::Namespace(_) | Self::Socket(_) => return None,
        };
        Some(fixed.into())
    }
}

/// A path as a word of a message: white space separates words.
fn encode(path: &Path) -> String {
    const SEPARATORS: &AsciiSet = &CONTROLS.add(b' ').add(b'%');
    percent_encode(path.as_os_str().as_bytes(), SEPARATORS).to_string()
}

fn decode(word: &str) -> PathBuf {
    let bytes = percent_decode_str(word).collect();
    OsString::from_vec(bytes).into()
}

/// The inode number of this process's network namespace.
fn namespace() -> Result<u64, InterceptionError> {
    Ok(Namespace::current()?.id().inode())
}

#[cfg(test)]
mod tests;
