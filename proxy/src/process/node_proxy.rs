//! The proxy part of a process: mesh, certificates, workers and endpoints. With a broker it is a
//! process of its own (`privileges.broker`).

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use underpass_config::{FileWatcher, Settings};
use underpass_interception::NamespaceAccess;

use crate::admin::readiness::{PendingStep, Readiness};
use crate::admin::state::Admin;
use crate::decide::snapshot::Snapshot;
use crate::mesh::feed::MeshFeed;
use crate::mesh::publish::Publisher;
use crate::node::Node;
use crate::node::certificates::{self, Certificates};
use crate::node::identities::{CredentialLease, Identities};
use crate::node::in_process::InProcess;
use crate::node::pod::pod_sockets;
use crate::node::pod_error::PodError;
use crate::node::received_identities::ReceivedIdentities;
use crate::node::workers::{WorkerThreads, Workers};
use crate::observe::conditions;
use crate::observe::metrics;
use crate::observe::otlp::Telemetry;
use crate::process::command_error::CommandError;
use crate::process::cpus::available_cpus;
use crate::process::pause_gate::PauseGate;
use crate::process::phases::endpoints::{Endpoints, Reports};
use crate::process::supervise::{Supervisor, Task, restarting};
use crate::traffic::dial::PlainDialer;
use crate::traffic::listeners::BoundEndpoints;

/// Timeout for the end of the workers: the end of the process frees the resources of one that does
/// not stop in time.
const WORKER_STOP_TIMEOUT: Duration = Duration::from_secs(1);
/// The pending step while the certificate of `underpass run` is not issued.
const CERTIFICATE: &str = "waiting for the certificate (identity)";
/// The pending step of `underpass run` from the start of the workers on.
const RULES: &str = "testing the rules";

/// The proxy with its mesh and its trust loaded, and its endpoints served. No worker runs yet.
pub(crate) struct LoadedNode {
    settings: Arc<Settings>,
    node: Arc<Node>,
    readiness: Readiness,
    identities: Option<Arc<Identities>>,
    /// Whether the broker sends certificates.
    receives: bool,
    /// The credentials of the workload of `underpass run`, if they are issued at once.
    credentials: Option<CredentialLease>,
    publisher: Publisher,
    endpoints: Endpoints,
    telemetry: Option<Telemetry>,
}

impl LoadedNode {
    /// Loads the mesh and the trust, and serves the endpoints. `access` opens the sockets of the
    /// process itself; `received` replaces the sources of certificates that a broker uses.
    ///
    /// # Errors
    ///
    /// A file cannot be read, or is invalid.
    pub(crate) async fn load(
        settings: &Arc<Settings>,
        access: &NamespaceAccess,
        received: Option<Arc<ReceivedIdentities>>,
        readiness: Readiness,
        endpoints: BoundEndpoints,
        watcher: &FileWatcher,
        supervisor: &Supervisor,
    ) -> Result<Self, CommandError> {
        let exporter = metrics::install(settings.series.clone()).map_err(CommandError::Metrics)?;
        let (sockets, receives) = (pod_sockets(settings), received.is_some());
        let expiring = is_of_one_pod(settings).then_some(&readiness);
        let identities = Certificates::identities(
            settings, access, &sockets, received, expiring, watcher, supervisor,
        )?;
        let dialer = PlainDialer { access: access.clone(), sockets };
        let (tracer, telemetry) = Telemetry::start(settings, dialer.clone())?;
        let (feed, mesh) = MeshFeed::open(settings, watcher, dialer, &readiness, supervisor)?;
        let publisher = Publisher::new(feed, mesh, &settings.workload);
        let lookups = publisher.lookups();
        let (mesh, series) = (publisher.subscribe(), exporter.series.clone());
        let gate = PauseGate::default();
        if endpoints.paused {
            gate.close().await;
        }
        let workers = workers(settings);
        let node = Node::new(settings, access, workers, mesh, lookups, gate.clone(), series);
        let (node, settings) = (Arc::new(Node { tracer, ..node }), settings.clone());
        let identities = identities.map(Arc::new);
        let admin = Arc::new(Admin::new(&settings, &node).with(&readiness, identities.as_ref()));
        let reports = Reports { readiness: readiness.clone(), exporter, admin };
        let endpoints = Endpoints::serve(endpoints, reports, &gate).map_err(CommandError::Start)?;
        let mut loaded = Self {
            settings,
            node,
            readiness,
            identities,
            receives,
            credentials: None,
            publisher,
            endpoints,
            telemetry,
        };
        if !receives && certificates::is_local(&loaded.settings) {
            loaded.credentials = loaded.lease().await?;
        }
        Ok(loaded)
    }

    pub(crate) fn readiness(&self) -> &Readiness {
        &self.readiness
    }

    pub(crate) fn admin(&self) -> &Admin {
        &self.endpoints.admin
    }

    /// Leases the credentials of the workload of `underpass run`, and waits for its first
    /// certificate; `None` without a source of certificates, and for a node.
    async fn lease(&self) -> Result<Option<CredentialLease>, PodError> {
        match &self.identities {
            Some(identities) if is_of_one_pod(&self.settings) => {
                let lease = identities.lease(&self.settings.workload.spiffe_id).await;
                lease.map(Some).map_err(PodError::Identity)
            }
            _ => Ok(None),
        }
    }

    /// Starts the workers, which have the capabilities of the calling thread. Waits for the first
    /// certificate of `underpass run`, and for the first state of a control plane, however long
    /// that takes.
    ///
    /// # Errors
    ///
    /// A thread cannot be started, or the first certificate failed for a reason that only the
    /// operator can remedy.
    pub(crate) async fn serve(
        mut self,
        supervisor: &Supervisor,
    ) -> Result<RunningNode, CommandError> {
        let mut files = certificates::proxy_files(&self.settings);
        if !self.receives {
            files.extend(certificates::issuer_files(&self.settings));
        }
        certificates::warn_if_unreadable(&self.settings, &files);
        if self.credentials.is_none() {
            let _pending = self.readiness.pending(CERTIFICATE);
            self.credentials = self.lease().await?;
        }
        self.publisher.first_state().await;
        let Self { settings, node, readiness, identities, credentials, publisher, .. } = self;
        let (endpoints, telemetry) = (self.endpoints, self.telemetry);
        let (workers, threads, reports) =
            Workers::start(&node, node.workers, supervisor).map_err(CommandError::start)?;
        endpoints.admin.liveness.include(&workers);
        let (limits, reported) = (node.limits.clone(), readiness.clone());
        let limits = restarting("report of limits", move || {
            let (limits, readiness) = (limits.clone(), reported.clone());
            async move { limits.report(readiness).await }
        });
        let of_host = settings.clone();
        let conditions = restarting("report of conditions", move || {
            let settings = of_host.clone();
            async move { conditions::watch(&settings).await }
        });
        let publishing = supervisor.essential("publisher of the mesh", publisher.follow(reports));
        let data_plane = InProcess { node, workers, identities };
        let tasks = vec![publishing, limits, conditions];
        let testing = is_of_one_pod(&settings).then(|| readiness.pending(RULES));
        Ok(RunningNode {
            data_plane,
            readiness,
            threads,
            tasks,
            endpoints,
            telemetry,
            testing,
            _credentials: credentials,
        })
    }
}

/// Whether these are the settings of `underpass run`.
fn is_of_one_pod(settings: &Settings) -> bool {
    settings.node.pods.is_none()
}

/// The number of workers.
pub(crate) fn workers(settings: &Settings) -> usize {
    settings.proxy.workers.unwrap_or_else(available_cpus)
}

/// The proxy with its workers.
pub(crate) struct RunningNode {
    data_plane: InProcess,
    readiness: Readiness,
    threads: WorkerThreads,
    /// Tasks that run until the last pod is removed: among them the enforcement of policies.
    tasks: Vec<Task>,
    endpoints: Endpoints,
    telemetry: Option<Telemetry>,
    /// The pending step of `underpass run`.
    testing: Option<PendingStep>,
    /// Keeps the first certificate of `underpass run` until its pod has a lease of its own.
    _credentials: Option<CredentialLease>,
}

impl RunningNode {
    pub(crate) fn data_plane(&self) -> &InProcess {
        &self.data_plane
    }

    pub(crate) fn admin(&self) -> &Admin {
        &self.endpoints.admin
    }

    pub(crate) fn readiness(&self) -> &Readiness {
        &self.readiness
    }

    pub(crate) fn mesh(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.data_plane.node.mesh.clone()
    }

    /// Reports that the process serves its pods. The endpoints accept from now on.
    pub(crate) fn ready(&mut self) {
        self.testing = None;
        self.readiness.ready();
        self.data_plane.node.accepting.open();
    }

    /// The gate that pauses accepting: on the endpoints, and on the listeners of a fixed pod.
    pub(crate) fn accepting(&self) -> &PauseGate {
        &self.data_plane.node.accepting
    }

    /// Closes the endpoints, on which another process accepts now. Pods take no new connections.
    /// The node stays ready for requests that were accepted before.
    pub(crate) fn hand_over(&mut self) {
        self.endpoints.close();
        self.data_plane.node.drain.close();
    }

    /// Reports that the process is not ready any longer. Pods take no new connections.
    pub(crate) fn drain(&self) {
        self.readiness.draining();
        self.data_plane.node.drain.close();
    }

    /// Ends the workers.
    pub(crate) async fn end(self) {
        self.data_plane.node.drain.end();
        tokio::time::timeout(WORKER_STOP_TIMEOUT, self.threads.join()).await.ok();
        if let Some(telemetry) = &self.telemetry {
            telemetry.flush().await;
        }
        // Workers that have not ended enforce the mesh, which these tasks publish.
        drop(self.tasks);
    }
}
