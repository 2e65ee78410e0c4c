//! Starts a process in the background: for the reload command of a supervisor, which must end once
//! the new process serves.
//!
//! The new process has one end of a socket pair as its standard input, and writes a byte to it once
//! it serves. If it ends before, the other end is closed.

use std::env;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use underpass_interception::confine_auxiliary_thread;

use crate::process::command_error::CommandError;

/// The option that starts a process in the background.
pub(crate) const BACKGROUND: &str = "background";
/// The hidden option of that process.
pub(crate) const REPORT_READY: &str = "report-ready";

/// Starts this program again, with the same arguments, and returns once it serves.
///
/// # Errors
///
/// It cannot be started, or ended before it served. It has reported why.
pub(crate) fn start() -> Result<(), CommandError> {
    let (mut ours, theirs) = UnixStream::pair().map_err(CommandError::Start)?;
    let background = format!("--{BACKGROUND}");
    let arguments = env::args_os().skip(1).map(|argument| {
        if argument == *background { format!("--{REPORT_READY}").into() } else { argument }
    });
    let mut command = Command::new(env::current_exe().map_err(CommandError::Start)?);
    command.arg0("underpass").args(arguments).stdin(Stdio::from(OwnedFd::from(theirs)));
    // The watchdog's period is for the main process of the service, which the new process becomes.
    command.env_remove("WATCHDOG_PID");
    let mut child = command.spawn().map_err(CommandError::Start)?;
    // Closes this process' descriptor of the other end.
    drop(command);
    // This process only waits, so the new one need not report it as one that can bypass the rules.
    confine_auxiliary_thread().map_err(CommandError::Start)?;
    if let Ok(1) = ours.read(&mut [0]) {
        return Ok(());
    }
    let status = child.wait().map_err(CommandError::Start)?;
    Err(CommandError::NotServing { status })
}

/// Reports to the process that started this one in the background that this one serves.
pub(crate) fn report_ready() {
    let report = || -> io::Result<()> {
        UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?).write_all(b"\n")
    };
    if let Err(error) = report() {
        tracing::warn!(%error, "cannot report to the process that started this one");
    }
}
