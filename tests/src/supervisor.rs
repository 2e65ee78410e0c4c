//! A scripted supervisor: receives the notifications of a process (`sd_notify(3)`), and passes it a
//! listener (`sd_listen_fds(3)`).

use std::fs;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::Interest;
use tokio::net::UnixDatagram;
use tokio::process::{Child, Command};

use crate::binary::binary;
use crate::or_fail::OrFail;
use crate::peers::within;
use crate::pods::Pod;
use crate::settings::Settings;

/// The environment of a process that gets one listener as its descriptor 3.
const PASS_LISTENER: &str = "export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$@\" 3<&0 </dev/null";

/// A scripted supervisor of the processes of one pod.
#[derive(Debug)]
pub struct ScriptedSupervisor {
    socket: UnixDatagram,
    path: PathBuf,
}

/// A notification with its descriptors.
#[derive(Debug)]
pub struct Notification {
    /// The lines.
    pub text: String,
    /// The attached descriptors.
    pub descriptors: Vec<OwnedFd>,
}

/// A supervised process. Dropping it kills the process.
#[derive(Debug)]
pub struct Service {
    child: Child,
}

impl ScriptedSupervisor {
    /// Creates the supervisor's socket in the pod's folder.
    #[must_use]
    pub fn new(pod: &Pod) -> Self {
        let path = pod.folder().join(format!("{}.notify", pod.name()));
        fs::remove_file(&path).ok();
        Self { socket: UnixDatagram::bind(&path).or_fail("bind the supervisor's socket"), path }
    }

    /// Starts the binary in the pod, with these settings and more arguments. The process inherits
    /// `listener`. `watchdog_usec` is for a start command, or from the line of a reload command:
    /// systemd does not set it for that.
    #[must_use]
    pub fn start(
        &self,
        pod: &Pod,
        settings: &Settings,
        more: &[&str],
        watchdog_usec: Option<u64>,
        listener: Option<(&str, &OwnedFd)>,
    ) -> Service {
        let mut command = match listener {
            Some((name, descriptor)) => {
                let mut shell = Command::new("sh");
                shell.args(["-c", PASS_LISTENER, "sh"]).arg(binary());
                let descriptor = descriptor.try_clone().or_fail("duplicate a listener");
                shell.stdin(Stdio::from(descriptor)).env("LISTEN_FDNAMES", name);
                shell
            }
            None => {
                let mut command = Command::new(binary());
                command.stdin(Stdio::null());
                command
            }
        };
        command.arg(settings.command()).args(settings.arguments(pod)).args(more);
        command.env("NOTIFY_SOCKET", &self.path).env_remove("WATCHDOG_USEC");
        if let Some(period) = watchdog_usec {
            command.env("WATCHDOG_USEC", period.to_string());
        }
        command.stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
        Service { child: pod.spawn(&mut command).or_fail("start underpass") }
    }

    /// Waits for the next notification.
    pub async fn next(&self) -> Notification {
        let receive = || Ok(receive(&self.socket)?);
        let received = self.socket.async_io(Interest::READABLE, receive);
        within("a notification", received).await.or_fail("receive a notification")
    }

    /// Waits for a notification with this text, and returns it with those before.
    pub async fn until(&self, text: &str) -> Vec<Notification> {
        let mut received = Vec::new();
        loop {
            let notification = self.next().await;
            let is_last = notification.text == text;
            received.push(notification);
            if is_last {
                return received;
            }
        }
    }
}

impl Service {
    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = self.child.id().expect("the process was not waited for");
        let pid = i32::try_from(pid).or_fail("use a process id");
        kill(Pid::from_raw(pid), signal).or_fail("send a signal");
    }

    /// Waits for the exit, and returns the exit code; `None` after a signal.
    pub async fn ended(&mut self) -> Option<i32> {
        within("the process ends", self.child.wait()).await.or_fail("wait for a process").code()
    }
}

fn receive(socket: &UnixDatagram) -> rustix::io::Result<Notification> {
    let mut buffer = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut attached = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let received = recvmsg(socket.as_fd(), &mut parts, &mut attached, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    for message in attached.drain() {
        if let RecvAncillaryMessage::ScmRights(attached) = message {
            descriptors.extend(attached);
        }
    }
    let text = buffer.get(..received.bytes).unwrap_or_default();
    Ok(Notification { text: String::from_utf8_lossy(text).into_owned(), descriptors })
}
