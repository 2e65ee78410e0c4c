//! The settings of administration, and the path of a Unix socket for local processes.

use std::net::SocketAddr;
use std::path::PathBuf;

/// A Unix socket on which the proxy serves trusted local processes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LocalSocket {
    /// A socket with a name derived from the network namespace.
    Auto,
    /// A Unix socket at this path.
    At(PathBuf),
    /// No socket.
    Off,
}

/// Where the proxy serves administration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdminSettings {
    /// The socket that reads and changes the state of the proxy.
    pub socket: LocalSocket,
    /// The address that only reads it; `None` for no address.
    pub address: Option<SocketAddr>,
}
