//! Starts the proxy process, and notices its end.

use std::os::fd::OwnedFd;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::time::timeout;
use underpass_config::{Broker, Settings};
use underpass_interception::{ProxyUser, SeqPacket, may_signal_other_users};

use crate::broker::heartbeat;
use crate::broker::identities::IdentityFeeds;
use crate::broker::link::{self, Receiver, Sender};
use crate::broker::message::{ADMIN_SOCKET, ToProxy};
use crate::broker::recorder;
use crate::broker::remote::RemoteDataPlane;
use crate::broker::requests::RequestServer;
use crate::pods::kubernetes;
use crate::process::command_error::CommandError;
use crate::process::supervise::{Supervisor, Task};
use crate::traffic::listeners::BoundEndpoints;

/// The hidden command of the proxy process.
pub(crate) const COMMAND: &str = "proxy-process";
/// Timeout for the end of the proxy process after its connection is closed, or after the last
/// message.
const END_TIMEOUT: Duration = Duration::from_secs(3);

/// The running proxy process. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct ProxyProcess {
    child: Child,
    pub(crate) data_plane: RemoteDataPlane,
    receiver: Option<Receiver>,
    /// Set when the connection fails, or the process hangs.
    broken: watch::Sender<bool>,
    tasks: Vec<Task>,
}

/// The user of the proxy process; `None` for one process.
pub(crate) fn user(settings: &Settings) -> Option<ProxyUser> {
    let id = settings.privileges.user;
    let user = ProxyUser { uid: id, gid: id };
    if settings.privileges.broker == Broker::Off {
        return None;
    }
    if settings.xds.is_some() && kubernetes::facts_are_in_mesh(settings) {
        // The broker must not get the facts about pods from the proxy process, and is no client of
        // a control plane.
        let hint = "set node.kubernetes, or use mesh.file instead of mesh.xds";
        tracing::warn!(
            hint,
            "no broker with mesh.xds and node.pods.cni without Kubernetes: one process has all privileges"
        );
        return None;
    }
    match user.check_separation() {
        Ok(()) => {
            if !may_signal_other_users() {
                tracing::warn!(
                    hint = "grant KILL",
                    "a proxy process that hangs outlives this process: it keeps the listeners of pods"
                );
            }
            Some(user)
        }
        Err(error) => {
            let (error, hint) = (crate::error::chain(&error), "grant SETUID and SETGID");
            tracing::warn!(error, hint, "no broker: one process has all privileges");
            None
        }
    }
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
        sent.map_err(|error| CommandError::Start(std::io::Error::other(error)))?;
        tracing::info!(pid = child.id(), user = user.uid, "started the proxy process");
        let installed = recorder::install(sender.clone());
        installed.map_err(|error| CommandError::Start(std::io::Error::other(error.to_string())))?;
        let identities = IdentityFeeds::new(settings, &sender, supervisor);
        let data_plane = RemoteDataPlane::new(sender, identities);
        Ok(Self { child, data_plane, receiver: Some(receiver), broken, tasks: vec![writing] })
    }

    /// Performs the requests of the proxy process from now on, and waits until its workers run.
    /// Afterwards it ends the process if that hangs.
    ///
    /// # Errors
    ///
    /// It has ended.
    pub(crate) async fn serve(
        &mut self,
        server: RequestServer,
        supervisor: &Supervisor,
    ) -> Result<(), CommandError> {
        let ready = server.ready();
        if let Some(receiver) = self.receiver.take() {
            let breaks = self.broken.clone();
            let serving = supervisor.essential("requests of the proxy process", async move {
                server.run(receiver).await;
                breaks.send_replace(true);
                std::future::pending::<()>().await;
            });
            self.tasks.push(serving);
        }
        tokio::select! {
            () = is_set(ready) => {}
            error = self.ended() => return Err(error),
        }
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
            () = is_set(broken) => self.end().await,
        };
        CommandError::ProxyProcess { status }
    }

    /// Waits for the end of the process, and kills it if that takes too long.
    pub(crate) async fn end(&mut self) -> Option<ExitStatus> {
        match timeout(END_TIMEOUT, self.child.wait()).await {
            Ok(status) => status.ok(),
            Err(_) => {
                tracing::warn!(after = ?END_TIMEOUT, "the proxy process does not end: killing it");
                if let Err(error) = self.child.kill().await {
                    let pid = self.child.id();
                    let hint = "grant KILL, and kill the process: it keeps the listeners of pods";
                    tracing::error!(%error, pid, hint, "cannot kill the proxy process");
                }
                None
            }
        }
    }
}

/// Waits until the value is true; for ever if its sender ends before. Holds no lock of the value
/// afterwards: the handler of a `select!` would hold it, and block the sender.
async fn is_set(mut value: watch::Receiver<bool>) {
    if value.wait_for(|value| *value).await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn spawn(user: ProxyUser, socket: OwnedFd) -> std::io::Result<Child> {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("underpass").arg(COMMAND).arg("--user").arg(user.uid.to_string());
    command.env_remove("NOTIFY_SOCKET");
    command.stdin(Stdio::from(socket)).kill_on_drop(true).spawn()
}
