//! Starts the proxy process, and notices its end.

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::time::timeout;
use underpass_config::{FileWatcher, Settings, SpiffeId};
use underpass_hbone::HboneError;
use underpass_interception::{ProxyUser, SeqPacket};

use crate::broker::heartbeat;
use crate::broker::identities::{IdentityFeed, IdentityFeeds};
use crate::broker::link::{self, Receiver, Sender};
use crate::broker::message::{ADMIN_SOCKET, ToProxy};
use crate::broker::recorder;
use crate::broker::remote::RemoteDataPlane;
use crate::broker::requests::{Progress, RequestServer};
use crate::process::command_error::CommandError;
use crate::process::supervise::{Supervisor, Task};
use crate::rules::health::RulesHealth;
use crate::traffic::listeners::BoundEndpoints;

/// The hidden command of the proxy process.
pub(crate) const COMMAND: &str = "proxy-process";
/// Timeout for the end of the proxy process after its connection is closed, or after the last
/// message.
const END_TIMEOUT: Duration = Duration::from_secs(3);
/// Timeout for the end of the proxy process after SIGKILL. A process in uninterruptible sleep may
/// never end.
const KILL_TIMEOUT: Duration = Duration::from_secs(3);

/// The running proxy process. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct ProxyProcess {
    child: Child,
    pub(crate) data_plane: RemoteDataPlane,
    receiver: Option<Receiver>,
    /// How far its start is.
    progress: watch::Receiver<Progress>,
    /// The certificates of `underpass run`, until the process ends.
    identity: Option<Arc<IdentityFeed>>,
    /// Set when the connection fails, or the process hangs.
    broken: watch::Sender<bool>,
    tasks: Vec<Task>,
}

impl ProxyProcess {
    /// Starts the proxy process as `user`, which serves these endpoints. This process must still
    /// have its capabilities.
    ///
    /// # Errors
    ///
    /// The kernel cannot start it, or the settings are too long.
    pub(crate) async fn start(
        user: ProxyUser,
        settings: &Settings,
        endpoints: BoundEndpoints,
        watcher: &FileWatcher,
        supervisor: &Supervisor,
    ) -> Result<Self, CommandError> {
        let (ours, theirs) = SeqPacket::pair().map_err(CommandError::Start)?;
        let child = spawn(user, theirs).map_err(CommandError::Start)?;
        let (sender, receiver, writer) = link::open(ours).map_err(CommandError::Start)?;
        let broken = watch::Sender::default();
        let breaks = broken.clone();
        let writing = supervisor.essential("messages to the proxy process", async move {
            writer.run().await;
            breaks.send_replace(true);
            std::future::pending::<()>().await;
        });
        let BoundEndpoints { listeners, admin_socket, paused } = endpoints;
        let (mut endpoints, mut sockets) =
            listeners.into_descriptors().map_err(CommandError::Start)?;
        if let Some(socket) = admin_socket {
            endpoints.push(ADMIN_SOCKET.to_owned());
            sockets.push(socket);
        }
        let start = ToProxy::Start { settings: settings.to_string(), endpoints, paused };
        let sent = sender.send(&start, sockets).await;
        sent.map_err(|error| CommandError::Start(io::Error::other(error)))?;
        tracing::info!(pid = child.id(), user = user.uid, "started the proxy process");
        let installed = recorder::install(sender.clone());
        installed.map_err(|error| CommandError::Start(io::Error::other(error.to_string())))?;
        let identities = IdentityFeeds::new(settings, &sender, watcher, supervisor);
        let data_plane = RemoteDataPlane::new(sender, identities);
        let progress = watch::Sender::default().subscribe();
        let (receiver, identity, tasks) = (Some(receiver), None, vec![writing]);
        Ok(Self { child, data_plane, receiver, progress, identity, broken, tasks })
    }

    /// Sends the certificates of the workload of `underpass run` from now on, if this process gets
    /// them.
    ///
    /// # Errors
    ///
    /// The first attempt to get a certificate failed.
    pub(crate) async fn require_identity(&mut self, id: &SpiffeId) -> Result<(), HboneError> {
        if let Some(feeds) = self.data_plane.identities() {
            self.identity = Some(feeds.require(id).await?);
        }
        Ok(())
    }

    /// Sends the state of the rules of the pod of `underpass run` from now on.
    pub(crate) fn follow_rules(&mut self, health: RulesHealth, supervisor: &Supervisor) {
        let (sender, mut changes) = (self.sender().clone(), health.changes());
        let following =
            supervisor.essential("state of the rules for the proxy process", async move {
                // The sender of changes is a part of `health`.
                while changes.changed().await.is_ok() {
                    // Fails if the proxy process has ended.
                    sender.post(&ToProxy::Rules(health.state())).ok();
                }
            });
        self.tasks.push(following);
    }

    /// Performs the requests of the proxy process from now on.
    pub(crate) fn answer(&mut self, server: RequestServer, supervisor: &Supervisor) {
        self.progress = server.progress();
        if let Some(receiver) = self.receiver.take() {
            let breaks = self.broken.clone();
            let serving = supervisor.essential("requests of the proxy process", async move {
                server.run(receiver).await;
                breaks.send_replace(true);
                std::future::pending::<()>().await;
            });
            self.tasks.push(serving);
        }
    }

    /// Waits until the start of the process has reached `progress`.
    ///
    /// # Errors
    ///
    /// It has ended.
    pub(crate) async fn reached(&mut self, progress: Progress) -> Result<(), CommandError> {
        let reached = self.progress.clone();
        tokio::select! {
            () = is_true(reached, |reached| *reached >= progress) => Ok(()),
            error = self.ended() => Err(error),
        }
    }

    /// Waits until the workers of the process run. Afterwards it ends the process if that hangs.
    ///
    /// # Errors
    ///
    /// It has ended.
    pub(crate) async fn running(&mut self, supervisor: &Supervisor) -> Result<(), CommandError> {
        self.reached(Progress::Running).await?;
        let (breaks, data_plane) = (self.broken.clone(), self.data_plane.clone());
        let checking = supervisor.essential("heartbeat of the proxy process", async move {
            heartbeat::hangs(|| data_plane.check()).await;
            breaks.send_replace(true);
            std::future::pending::<()>().await;
        });
        self.tasks.push(checking);
        Ok(())
    }

    /// Sends a message that has no answer.
    pub(crate) fn post(&self, message: &ToProxy) {
        // Fails if it has ended, which `ended` reports.
        self.sender().post(message).ok();
    }

    pub(crate) fn sender(&self) -> &Sender<ToProxy> {
        self.data_plane.sender()
    }

    /// Waits for the end of the process or of its connection, and returns the error. Cancel-safe.
    pub(crate) async fn ended(&mut self) -> CommandError {
        let broken = self.broken.subscribe();
        let status = tokio::select! {
            status = self.child.wait() => status.ok(),
            () = is_true(broken, |broken| *broken) => self.end().await,
        };
        CommandError::ProxyProcess { status }
    }

    /// Waits for the end of the process, and kills it if that takes too long.
    pub(crate) async fn end(&mut self) -> Option<ExitStatus> {
        match timeout(END_TIMEOUT, self.child.wait()).await {
            Ok(status) => status.ok(),
            Err(_) => {
                tracing::warn!(after = ?END_TIMEOUT, "the proxy process does not end: killing it");
                if let Err(error) = bounded(self.child.kill()).await {
                    let pid = self.child.id();
                    let hint = match error.kind() {
                        ErrorKind::TimedOut => {
                            "the kernel does not end the process, which keeps the listeners of pods"
                        }
                        _ => "grant KILL, and kill the process: it keeps the listeners of pods",
                    };
                    tracing::error!(%error, pid, hint, "cannot kill the proxy process");
                }
                None
            }
        }
    }
}

/// Waits for a killed process, at most for [`KILL_TIMEOUT`].
async fn bounded(killed: impl Future<Output = io::Result<()>>) -> io::Result<()> {
    timeout(KILL_TIMEOUT, killed).await.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()))
}

/// Waits until the condition is true; for ever if the sender of the value ends before. Holds no
/// lock of the value afterwards: the handler of a `select!` would hold it, and block the sender.
async fn is_true<T>(mut value: watch::Receiver<T>, condition: impl FnMut(&T) -> bool) {
    if value.wait_for(condition).await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn spawn(user: ProxyUser, socket: OwnedFd) -> io::Result<Child> {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("underpass").arg(COMMAND);
    command.arg("--user").arg(user.uid.to_string()).arg("--group").arg(user.gid.to_string());
    command.env_remove("NOTIFY_SOCKET");
    command.stdin(Stdio::from(socket)).kill_on_drop(true).spawn()
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn wait_for_killed_process_that_does_not_end_times_out() {
        let start = Instant::now();
        let error = bounded(std::future::pending()).await.unwrap_err();
        assert_eq!((error.kind(), start.elapsed()), (ErrorKind::TimedOut, KILL_TIMEOUT));
        bounded(async { Ok(()) }).await.unwrap();
    }
}
