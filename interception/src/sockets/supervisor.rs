//! Exchanges messages and listeners with the supervisor of this process by systemd's protocols
//! (`sd_notify(3)`, `sd_listen_fds(3)`).

use std::env;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use listenfd::ListenFd;

use crate::sockets::descriptors;
use crate::sockets::listener::BoundListener;

/// Timeout for sending a message: a supervisor that does not read must not block the process.
const SEND_TIMEOUT: Duration = Duration::from_secs(1);

/// Sends a message with `descriptors` attached to `$NOTIFY_SOCKET`. Without the variable, sends
/// nothing.
///
/// # Errors
///
/// The error of the kernel.
#[expect(
    clippy::disallowed_methods,
    reason = "the protocol is an environment variable, not a setting"
)]
pub fn notify_supervisor(message: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let Some(path) = env::var_os("NOTIFY_SOCKET") else {
        return Ok(());
    };
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(&path)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_write_timeout(Some(SEND_TIMEOUT))?;
    socket.connect_addr(&address)?;
    descriptors::send(&socket, message.as_bytes(), descriptors).map(drop)
}

/// Takes the listeners that the supervisor has passed to this process, with their names. Call this
/// once, while there is one thread: it changes the environment.
///
/// Other descriptors of the supervisor stay open, and are not returned.
#[must_use]
#[expect(
    clippy::disallowed_methods,
    reason = "the protocol is an environment variable, not a setting"
)]
pub fn inherited_listeners() -> Vec<(String, BoundListener)> {
    let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut passed = ListenFd::from_env();
    let mut take = |index| -> Option<BoundListener> {
        let socket: OwnedFd = match passed.take_tcp_listener(index) {
            Ok(listener) => listener?.into(),
            Err(_) => passed.take_udp_socket(index).ok()??.into(),
        };
        socket.try_into().ok()
    };
    let named = names.split(':').enumerate();
    named.filter_map(|(index, name)| Some((name.to_owned(), take(index)?))).collect()
}
