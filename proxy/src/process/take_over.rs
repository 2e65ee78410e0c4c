//! Hot restart: a new process takes over from the running one, and no connection fails.
//!
//! ```text
//! new process              running process
//! hello: its role     ──>  checks the user and the role
//!                     <──  listening sockets; only the running process accepts
//! rules               ──>  stops repairing the rules
//! accept              ──>  stops accepting; connections wait in the shared accept queue
//! (workers, self-test)
//! ready               ──>  unready, GOAWAY, drains for up to `timeouts.handover_drain`
//! ```
//!
//! If a step fails before `ready`, the new process exits, which closes the connection.
//! The running process then resumes accepting and repairing.

mod client;
pub(crate) mod control_socket;
mod server;

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;
use underpass_config::{Hint, InboundMode, Settings};
use underpass_interception::{InterceptionError, Namespace};

pub(crate) use client::{ReceivedSockets, TakeoverClient};
pub(crate) use server::{TakeoverOutcome, TakeoverServer};

/// The version of this protocol.
const VERSION: u32 = 1;
/// Timeout for each answer of the running process, and for the first message of the new one.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Timeout for the new process to obtain its certificate, possibly from a remote CA. The running
/// process serves meanwhile.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(60);
/// Timeout from the last accept of the running process until the new one is ready. New connections
/// wait meanwhile. It exceeds the self-test's deadline and is below usual timeouts of clients.
const SWITCH_TIMEOUT: Duration = Duration::from_secs(8);

/// The requests of the new process, in this order.
const RULES: &str = "rules";
const ACCEPT: &str = "accept";
const READY: &str = "ready";
const OK: &str = "ok";
const LISTENERS: &str = "listeners";
const REFUSED: &str = "refused";
/// The name of the control socket among the sockets that are handed over.
const CONTROL_SOCKET: &str = "take-over";
/// The name of the instance socket (`instance.rs`) among the sockets that are handed over.
const INSTANCE_SOCKET: &str = "instance";

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
    #[error("the running process refused the take-over: {0}")]
    Refused(String),
    #[error(
        "the running process did not answer \"{request}\" within {} s",
        ANSWER_TIMEOUT.as_secs()
    )]
    NoAnswer { request: &'static str },
    #[error("the running process closed the connection instead of answering \"{request}\"")]
    Closed { request: &'static str },
    #[error("the running process answered \"{answer}\" to \"{request}\"")]
    UnexpectedAnswer { request: &'static str, answer: String },
    #[error("cannot listen for a take-over at {} (take_over.socket)", socket.display())]
    Listen { socket: PathBuf, source: io::Error },
}

impl Hint for TakeOverError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        let fixed = match self {
            Self::UntrustedUser { .. } => "remove the file",
            Self::Refused(_) => {
                "start with the profile, ports and user of the running process, or stop it first"
            }
            Self::NoAnswer { .. } | Self::Closed { .. } => {
                "check whether the running process is stopped or overloaded, and read its log"
            }
            Self::UnexpectedAnswer { .. } => {
                "stop the running process first if it has another version"
            }
            Self::Listen { .. } => "correct take_over.socket",
            Self::Io { .. } | Self::Namespace(_) => return None,
        };
        Some(fixed.into())
    }
}

/// The properties that both processes must share for the rules and listeners of one to serve the
/// other.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Role {
    version: u32,
    namespace: u64,
    profile: String,
    tproxy: bool,
    ports: [u16; 3],
}

impl Role {
    fn new(settings: &Settings) -> io::Result<Self> {
        let proxy = &settings.proxy;
        Ok(Self {
            version: VERSION,
            namespace: namespace().map_err(io::Error::other)?,
            profile: settings.interception.profile.to_string(),
            tproxy: settings.interception.inbound.mode == InboundMode::Tproxy,
            ports: [proxy.outbound_port, proxy.inbound_port, proxy.hbone_port],
        })
    }

    /// Returns the reason to refuse a take-over by a process with the role `other`, if they differ.
    fn refusal(&self, other: &str) -> Option<String> {
        (other != self.to_string()).then(|| {
            format!("the role differs: the running process is \"{self}\", the new one \"{other}\"")
        })
    }
}

/// The inode number of this process's network namespace.
fn namespace() -> Result<u64, InterceptionError> {
    Ok(Namespace::current()?.id().inode())
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { version, namespace, profile, tproxy, ports: [outbound, inbound, hbone] } = self;
        write!(
            f,
            "underpass take-over {version}: network namespace {namespace}, profile {profile}, tproxy {tproxy}, \
             ports {outbound} {inbound} {hbone}"
        )
    }
}

#[cfg(test)]
mod tests;
