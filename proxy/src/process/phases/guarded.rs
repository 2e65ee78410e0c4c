//! The process with its rules installed.

use underpass_interception::{ProxyUser, confine_thread};

use super::Core;
use super::serving::Serving;
use crate::node::certificates;
use crate::node::phases::{GuardedPod, OpenPod};
use crate::process::command_error::CommandError;
use crate::process::proxy_part::{PreparedProxy, ProxyPart};
use crate::process::reload::Reload;
use crate::process::stop_signal::StopSignal;
use crate::process::take_over::{TakeoverClient, TakeoverServer};

/// The process with its rules installed; it accepts no connection yet. The rules stay if it is
/// dropped.
pub(crate) struct Guarded {
    pub(super) core: Core,
    pub(super) pod: GuardedPod,
    pub(super) proxy: PreparedProxy,
    pub(super) reload: Reload,
    pub(super) takeovers: TakeoverServer,
    /// The connection to the process that is being taken over.
    pub(super) client: Option<TakeoverClient>,
}

/// The process with its workers.
struct Started {
    core: Core,
    proxy: ProxyPart,
    reload: Reload,
    takeovers: TakeoverServer,
    client: Option<TakeoverClient>,
}

impl Guarded {
    /// Drops privileges, waits for the certificate and for the mesh of a control plane, starts the
    /// workers and tests the rules. Returns `None` if stopped while it waits.
    ///
    /// # Errors
    ///
    /// The rules are kept or removed according to `interception.on_exit`.
    pub(crate) async fn serve(
        self,
        stop: &mut StopSignal,
    ) -> Result<Option<Serving>, CommandError> {
        let Self { core, pod, proxy, reload, takeovers, client } = self;
        match prepare(&core, &pod, proxy, client.as_ref(), stop).await {
            Ok(Some(proxy)) => {
                let started = Started { core, proxy, reload, takeovers, client };
                started.open(pod).await.map(Some)
            }
            Ok(None) => {
                pod.leave().await?;
                Ok(None)
            }
            Err(error) => Err(pod.abandon(error).await),
        }
    }
}

/// Performs every step before the workers accept. Returns `None` if stopped.
async fn prepare(
    core: &Core,
    pod: &GuardedPod,
    proxy: PreparedProxy,
    client: Option<&TakeoverClient>,
    stop: &mut StopSignal,
) -> Result<Option<ProxyPart>, CommandError> {
    pod.capture().warn_of_bypassing().await;
    confine(core, pod, &proxy).await?;
    if proxy.is_separate() {
        let files = certificates::issuer_files(&core.settings);
        certificates::warn_if_unreadable(&core.settings, &files);
    }
    let proxy = tokio::select! {
        proxy = proxy.running(&core.supervisor) => proxy?,
        why = stop.wait() => {
            tracing::info!(why, "stopped while waiting for the certificate or the control plane");
            return Ok(None);
        }
    };
    if let Some(client) = client {
        client.accept().await?;
        proxy.accepting().resume();
    }
    Ok(Some(proxy))
}

/// Drops all capabilities of the calling thread, and so of the threads that it starts, except those
/// for ending a proxy process. One process changes to the user by which the rules identify the
/// proxy, if the profile has one; a broker only opens sockets as this user. The namespaces thread
/// keeps the capabilities that it needs.
async fn confine(core: &Core, pod: &GuardedPod, proxy: &PreparedProxy) -> Result<(), CommandError> {
    let (thread, capture) = (&core.thread, pod.capture());
    let kept = capture.needed_capabilities();
    match capture.user() {
        Some(user) if proxy.is_separate() => {
            thread.open_files_as(user).await?;
            confine_thread(proxy.control_thread()).map_err(CommandError::Start)?;
        }
        Some(user) => {
            thread.prepare_change_of_user(kept).await?;
            user.switch()?;
            let ProxyUser { uid, gid } = user;
            tracing::info!(uid, gid, ?kept, "changed to the proxy's user");
        }
        None => confine_thread(proxy.control_thread()).map_err(CommandError::Start)?,
    }
    Ok(thread.confine(kept).await?)
}

impl Started {
    /// Accepts connections, tests the rules, and completes a take-over.
    async fn open(self, pod: GuardedPod) -> Result<Serving, CommandError> {
        let Self { core, mut proxy, reload, mut takeovers, client } = self;
        let repairs = pod.capture().repairs();
        let data_plane = proxy.data_plane();
        let mut open = tokio::select! {
            open = pod.open(&*data_plane) => open?,
            error = proxy.failed() => return Err(error),
        };
        let completed = tokio::select! {
            completed = complete(&open, client.as_ref()) => completed,
            error = proxy.failed() => return Err(error),
        };
        if let Err(error) = completed {
            // Stop accepting before the other process resumes, then drain the accepted connections.
            proxy.accepting().pause().await;
            drop(client);
            return Err(open.abandon(core.settings.timeouts.drain, error).await);
        }
        // No step fails from here on, so the other process does not resume.
        open.own_rules();
        takeovers.own();
        let pod = open.watch(core.rules_gate.clone());
        let reloading = reload.start(repairs, proxy.log_changes());
        Ok(Serving::new(core, pod, proxy, takeovers, reloading).await)
    }
}

/// Tests the rules, then completes the take-over.
async fn complete(open: &OpenPod, client: Option<&TakeoverClient>) -> Result<(), CommandError> {
    open.test().await?;
    if let Some(client) = client {
        client.ready().await?;
    }
    Ok(())
}
