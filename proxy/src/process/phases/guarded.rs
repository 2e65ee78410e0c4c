//! The process with its rules installed.

use underpass_config::Settings;
use underpass_interception::{KeptCapabilities, ProxyUser, confine_thread};

use super::serving::Serving;
use super::{Core, workers};
use crate::mesh::publish::{Publisher, Reports};
use crate::node::certificates;
use crate::node::identities::{CredentialLease, Identities};
use crate::node::in_process::InProcess;
use crate::node::phases::{GuardedPod, OpenPod};
use crate::node::pod_error::PodError;
use crate::node::workers::{WorkerThreads, Workers};
use crate::process::command_error::CommandError;
use crate::process::logging;
use crate::process::reload::Reload;
use crate::process::stop_signal::StopSignal;
use crate::process::supervise::restarting;
use crate::process::take_over::{TakeoverClient, TakeoverServer};

/// The process with its rules installed; no worker runs yet. The rules stay if it is dropped.
pub(crate) struct Guarded {
    pub(super) core: Core,
    pub(super) pod: GuardedPod,
    /// Keeps the first certificate until the pod has its own lease.
    pub(super) credentials: Option<CredentialLease>,
    pub(super) publisher: Publisher,
    pub(super) reload: Reload,
    pub(super) takeovers: TakeoverServer,
    /// The connection to the process that is being taken over.
    pub(super) client: Option<TakeoverClient>,
}

/// The pending step while no certificate is issued.
const CERTIFICATE: &str = "waiting for the certificate (identity)";

struct Started {
    workers: Workers,
    threads: WorkerThreads,
    reports: Reports,
}

impl Guarded {
    /// Drops privileges, waits for the certificate, starts the workers and tests the rules. Returns
    /// `None` if stopped while it waits for the certificate.
    ///
    /// # Errors
    ///
    /// The rules are kept or removed according to `interception.on_exit`.
    pub(crate) async fn serve(
        mut self,
        stop: &mut StopSignal,
    ) -> Result<Option<Serving>, CommandError> {
        match self.prepare(stop).await {
            Ok(Some(started)) => self.open(started).await.map(Some),
            Ok(None) => {
                self.pod.leave().await?;
                Ok(None)
            }
            Err(error) => Err(self.pod.abandon(error).await),
        }
    }

    /// Performs every step before the workers accept. Returns `None` if stopped.
    async fn prepare(&mut self, stop: &mut StopSignal) -> Result<Option<Started>, CommandError> {
        let Core { settings, supervisor, node, identities, .. } = &self.core;
        self.pod.capture().warn_of_bypassing().await;
        self.confine().await?;
        certificates::warn_if_unreadable(settings, true);
        if self.credentials.is_none() {
            let _pending = self.core.endpoints.readiness.pending(CERTIFICATE);
            self.credentials = tokio::select! {
                lease = lease(identities.as_deref(), settings) => lease?,
                why = stop.wait() => {
                    tracing::info!(why, "stopped while waiting for the certificate");
                    return Ok(None);
                }
            };
        }
        tokio::select! {
            () = self.publisher.first_state() => {}
            why = stop.wait() => {
                tracing::info!(why, "stopped while waiting for the control plane");
                return Ok(None);
            }
        }
        if let Some(client) = &self.client {
            client.accept().await?;
            node.gates.accept.open();
        }
        let started = Workers::start(node, workers(settings), supervisor);
        let (workers, threads, reports) = started.map_err(CommandError::start)?;
        self.core.endpoints.admin.liveness.include(&workers);
        Ok(Some(Started { workers, threads, reports }))
    }

    /// Changes to the user by which the rules identify the proxy, if the profile has one. Drops all
    /// capabilities of the calling thread, and so of the threads that it starts. The namespaces
    /// thread keeps those that it needs.
    async fn confine(&self) -> Result<(), CommandError> {
        let (thread, capture) = (&self.core.thread, self.pod.capture());
        let kept = capture.needed_capabilities();
        if let Some(user) = capture.user() {
            thread.prepare_change_of_user(kept).await?;
            user.switch()?;
            let ProxyUser { uid, gid } = user;
            tracing::info!(uid, gid, ?kept, "changed to the proxy's user");
        } else {
            confine_thread(KeptCapabilities::Nothing).map_err(CommandError::Start)?;
        }
        Ok(thread.confine(kept).await?)
    }

    /// Accepts connections, tests the rules, and completes a take-over.
    async fn open(self, started: Started) -> Result<Serving, CommandError> {
        let Self { core, pod, credentials, publisher, reload, mut takeovers, client } = self;
        let Started { workers, threads, reports } = started;
        let repairs = pod.capture().repairs();
        let publishing =
            core.supervisor.essential("publisher of the mesh", publisher.follow(reports));
        let data_plane =
            InProcess { node: core.node.clone(), workers, identities: core.identities.clone() };
        let testing = core.endpoints.readiness.pending("testing the rules");
        let mut open = pod.open(&data_plane).await?;
        drop(credentials);
        if let Err(error) = complete(&open, client.as_ref()).await {
            // Stop accepting before the other process resumes, then drain the accepted connections.
            core.node.gates.accept.close().await;
            drop(client);
            return Err(open.abandon(core.settings.timeouts.drain, error).await);
        }
        drop(testing);
        // No step fails from here on, so the other process does not resume.
        open.own_rules();
        takeovers.own();
        let pod = open.watch(core.node.gates.rules.clone());
        let (limits, readiness) = (core.node.limits.clone(), core.endpoints.readiness.clone());
        let limits = restarting("report of limits", move || {
            let (limits, readiness) = (limits.clone(), readiness.clone());
            async move { limits.report(readiness).await }
        });
        let reloading = reload.start(repairs, |settings| logging::apply(&settings.logging));
        let tasks = vec![publishing, limits, reloading];
        Ok(Serving::new(core, pod, threads, takeovers, tasks))
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

/// Leases the workload's credentials and waits for the first certificate; `None` without a source
/// of certificates.
pub(super) async fn lease(
    identities: Option<&Identities>,
    settings: &Settings,
) -> Result<Option<CredentialLease>, PodError> {
    match identities {
        Some(identities) => {
            let lease = identities.lease(&settings.workload.spiffe_id).await;
            lease.map(Some).map_err(PodError::Identity)
        }
        None => Ok(None),
    }
}
