//! The process at the other end of a Unix socket.

use std::io;

use nix::unistd::geteuid;
use tokio::net::UnixStream;

/// The process at the other end, identified by the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// The effective user id.
    pub uid: u32,
    /// The process id. `None` if the PID namespace hides it.
    pub pid: Option<i32>,
}

impl Peer {
    /// Identifies the process at the other end of `stream`, as the kernel recorded it when that
    /// process connected or started to listen (`SO_PEERCRED`, unix(7)).
    ///
    /// # Errors
    ///
    /// The error of the kernel.
    pub fn of(stream: &UnixStream) -> io::Result<Self> {
        let credentials = stream.peer_cred()?;
        Ok(Self { uid: credentials.uid(), pid: credentials.pid().filter(|pid| *pid != 0) })
    }

    /// Returns true for root and for the user of this process. Both can control this process
    /// anyway.
    #[must_use]
    pub fn is_trusted(self) -> bool {
        self.uid == 0 || self.uid == geteuid().as_raw()
    }
}
