//! Notifies the supervisor of state changes by systemd's protocol (`sd_notify(3)`).

use std::os::fd::{AsFd as _, BorrowedFd};

use underpass_interception::{BoundListener, notify_supervisor};

pub(crate) fn ready() {
    notify("READY=1");
}

pub(crate) fn stopping() {
    notify("STOPPING=1");
}

/// Reports the process that takes over as the service's new main process.
pub(crate) fn succeeded_by(pid: Option<i32>) {
    if let Some(pid) = pid {
        notify(&format!("MAINPID={pid}"));
    }
}

/// Reports this process as the main process again: the process that took over has failed.
pub(crate) fn resumed() {
    notify(&format!("MAINPID={}", std::process::id()));
}

/// Restarts the supervisor's watchdog timer.
pub(crate) fn alive() {
    notify("WATCHDOG=1");
}

/// Lets the supervisor keep `listener` under this name, which contains neither a colon nor a line
/// break.
pub(crate) fn store(name: &str, listener: &BoundListener) {
    // FDPOLL: an error of a socket for datagrams must not remove it from the store.
    send(&format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0"), &[listener.as_fd()]);
}

/// Lets the supervisor close the listeners with this name.
pub(crate) fn forget(name: &str) {
    notify(&format!("FDSTOREREMOVE=1\nFDNAME={name}"));
}

fn notify(state: &str) {
    send(state, &[]);
}

fn send(state: &str, attached: &[BorrowedFd<'_>]) {
    if let Err(error) = notify_supervisor(state, attached) {
        tracing::warn!(%error, state, "cannot notify the supervisor ($NOTIFY_SOCKET)");
    }
}
