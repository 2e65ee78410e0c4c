//! Hot restart: a process takes over from the one that runs, without a connection that fails.
//!
//! ```text
//! new                          running
//! hello: who I shall be   ──>  is it like me, and may it?
//!                         <──  listeners, with their sockets: both could accept now, and only the running one does
//! rules                   ──>  looks after the rules no longer
//! accept                  ──>  accepts no longer: what arrives waits in the queue that both have
//! (workers, self-test)
//! ready                   ──>  unready, GOAWAY, serves what is open, until `timeouts.handover_drain`
//! ```
//!
//! Whatever goes wrong before `ready`: the new one ends, the conversation with it, and the running one goes on as before.

mod claim;
mod offer;
mod place;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;
use underpass_config::{InboundMode, Settings};
use underpass_interception::{InterceptionError, Namespace};

pub(crate) use claim::{Claim, Handed};
pub(crate) use offer::{Gates, Offer, Offered};

/// The version of the conversation.
const VERSION: u32 = 1;
/// For an answer of the running process, which does next to nothing for any of them; and for the new one to say who it is.
const ANSWER: Duration = Duration::from_secs(5);
/// For the new process to get its certificate, from the other side of the network if need be. Meanwhile the running one serves.
const PREPARE: Duration = Duration::from_secs(60);
/// For the new process from the last accept of the running one until it is ready. Meanwhile connections wait: longer than a test of
/// the rules may take, shorter than clients do.
const TURN: Duration = Duration::from_secs(8);

/// The three things that a new process asks for, in this order.
const RULES: &str = "rules";
const ACCEPT: &str = "accept";
const READY: &str = "ready";
const OK: &str = "ok";
const LISTENERS: &str = "listeners";
const REFUSED: &str = "refused";
/// What the socket is called at which a process is asked.
const PLACE: &str = "take-over";
/// The same of the socket that makes a process the only one of its network namespace.
const INSTANCE: &str = "instance";

/// Why a process does not take over.
#[derive(Debug, Error)]
pub(crate) enum TakeOverError {
    #[error("cannot talk to the process that runs at {} (take_over.socket)", socket.display())]
    Talk { socket: PathBuf, source: io::Error },
    #[error(
        "whoever listens at {} (take_over.socket) is user {uid}, who must not give us listeners: remove the file",
        socket.display()
    )]
    Stranger { socket: PathBuf, uid: u32 },
    #[error("/proc does not tell in which network namespace this is")]
    Namespace(#[source] io::Error),
    #[error("the process that runs does not let us take over: {0}")]
    Refused(String),
    #[error(
        "the process that runs did not answer \"{asked}\" within {} s: it goes on as before, if it runs at all",
        ANSWER.as_secs()
    )]
    NoAnswer { asked: &'static str },
    #[error(
        "the process that runs ended the conversation instead of answering \"{asked}\": it waited in vain, or it ended"
    )]
    Left { asked: &'static str },
    #[error(
        "the process that runs said \"{said}\" instead of answering \"{asked}\": is it of another version?"
    )]
    Misunderstood { asked: &'static str, said: String },
    #[error("cannot offer to be taken over at {} (take_over.socket)", socket.display())]
    Offer { socket: PathBuf, source: io::Error },
}

/// What two processes must have in common, one of which takes over from the other: what is caught by the same rules, with the
/// same listeners.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Role {
    version: u32,
    namespace: u64,
    profile: String,
    tproxy: bool,
    ports: [u16; 3],
}

impl Role {
    fn of(settings: &Settings) -> io::Result<Self> {
        let proxy = &settings.proxy;
        Ok(Self {
            version: VERSION,
            namespace: namespace().map_err(io::Error::other)?,
            profile: settings.interception.profile.to_string(),
            tproxy: settings.interception.inbound.mode == InboundMode::Tproxy,
            ports: [proxy.outbound_port, proxy.inbound_port, proxy.hbone_port],
        })
    }

    /// Why the process of this role does not give way to one that says this of itself.
    fn refusal(&self, said: &str) -> Option<String> {
        (said != self.to_string()).then(|| {
            format!("it is another kind of proxy; it is \"{self}\", and this one \"{said}\"")
        })
    }
}

/// The number of the network namespace of this process.
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
