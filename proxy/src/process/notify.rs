//! Notifies the supervisor of state changes by systemd's protocol (`sd_notify(3)`).
//!
//! Each notification is a datagram to `$NOTIFY_SOCKET`. Without the variable nothing is sent.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

pub(crate) fn ready() {
    notify("READY=1");
}

pub(crate) fn stopping() {
    notify("STOPPING=1");
}

/// Reports the process that has taken over as the service's new main process.
pub(crate) fn succeeded_by(pid: Option<i32>) {
    if let Some(pid) = pid {
        notify(&format!("MAINPID={pid}"));
    }
}

fn notify(state: &str) {
    if let Err(error) = send(state) {
        tracing::warn!(%error, state, "cannot notify the supervisor ($NOTIFY_SOCKET)");
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the protocol is an environment variable, not a setting"
)]
fn send(state: &str) -> io::Result<()> {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return Ok(());
    };
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(&path)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.send_to_addr(state.as_bytes(), &address).map(|_| ())
}
