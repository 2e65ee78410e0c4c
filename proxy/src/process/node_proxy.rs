//! The proxy part of a node daemon: mesh, certificates, workers and endpoints. It is a process of
//! its own, or a part of the daemon (`privileges.broker: off`).

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use underpass_config::{FileWatcher, Settings};
use underpass_interception::NamespaceAccess;

use crate::admin::readiness::Readiness;
use crate::admin::state::Admin;
use crate::decide::snapshot::Snapshot;
use crate::mesh::feed::MeshFeed;
use crate::mesh::publish::Publisher;
use crate::node::certificates::Certificates;
use crate::node::identities::Identities;
use crate::node::in_process::InProcess;
use crate::node::pod::pod_sockets;
use crate::node::received_identities::ReceivedIdentities;
use crate::node::workers::{WorkerThreads, Workers};
use crate::node::{Node, certificates};
use crate::observe::metrics;
use crate::observe::metrics::Exporter;
use crate::observe::otlp::Telemetry;
use crate::process::command_error::CommandError;
use crate::process::cpus::available_cpus;
use crate::process::pause_gate::{Gates, PauseGate};
use crate::process::phases::endpoints::{Endpoints, Reports};
use crate::process::supervise::{Supervisor, Task, restarting};
use crate::traffic::dial::PlainDialer;
use crate::traffic::listeners::BoundEndpoints;

/// Timeout for the end of the workers: the end of the process frees the resources of one that does
/// not stop in time.
const WORKER_STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// The proxy of a node with its mesh and its trust loaded. No thread runs yet.
pub(crate) struct LoadedNode {
    settings: Arc<Settings>,
    node: Arc<Node>,
    readiness: Readiness,
    identities: Option<Arc<Identities>>,
    /// Whether this process has the key of the local CA.
    has_ca_key: bool,
    publisher: Publisher,
    exporter: Exporter,
    telemetry: Option<Telemetry>,
}

impl LoadedNode {
    /// Loads the mesh and the trust. `access` opens the node's own sockets; `received` replaces a
    /// local CA and a SPIRE agent.
    ///
    /// # Errors
    ///
    /// A file cannot be read, or is invalid.
    pub(crate) fn load(
        settings: &Arc<Settings>,
        access: &NamespaceAccess,
        received: Option<Arc<ReceivedIdentities>>,
        watcher: &FileWatcher,
        supervisor: &Supervisor,
    ) -> Result<Self, CommandError> {
        let exporter = metrics::install(settings.series.clone()).map_err(CommandError::Metrics)?;
        let (sockets, has_ca_key) = (pod_sockets(settings), received.is_none());
        let identities = Certificates::identities(
            settings, access, &sockets, received, None, watcher, supervisor,
        )?;
        let (readiness, dialer) =
            (Readiness::for_node(), PlainDialer { access: access.clone(), sockets });
        let (tracer, telemetry) = Telemetry::start(settings, dialer.clone())?;
        let (feed, mesh) = MeshFeed::open(settings, watcher, dialer, &readiness, supervisor)?;
        let publisher = Publisher::new(feed, mesh, &settings.workload);
        let lookups = publisher.lookups();
        let (mesh, series) = (publisher.subscribe(), exporter.series.clone());
        let (count, gates) = (workers(settings), Gates::default());
        let node = Node::new(settings, access, count, mesh, lookups, gates, series);
        let node = Arc::new(Node { tracer, ..node });
        let (settings, identities) = (settings.clone(), identities.map(Arc::new));
        Ok(Self {
            settings,
            node,
            readiness,
            identities,
            has_ca_key,
            publisher,
            exporter,
            telemetry,
        })
    }

    /// Serves the endpoints, and starts the workers, which have the capabilities of the calling
    /// thread. Waits for the first state of a control plane, however long that takes.
    ///
    /// # Errors
    ///
    /// A thread cannot be started.
    pub(crate) async fn serve(
        self,
        endpoints: BoundEndpoints,
        supervisor: &Supervisor,
    ) -> Result<RunningNode, CommandError> {
        let Self { settings, node, readiness, identities, has_ca_key, exporter, .. } = self;
        let (mut publisher, telemetry) = (self.publisher, self.telemetry);
        let gate = &node.gates.accept;
        if endpoints.paused {
            gate.close().await;
        }
        let admin = Arc::new(Admin::new(&settings, &node).with(&readiness, identities.as_ref()));
        let reports = Reports { readiness: readiness.clone(), exporter, admin };
        let endpoints = Endpoints::serve(endpoints, reports, gate).map_err(CommandError::Start)?;
        certificates::warn_if_unreadable(&settings, has_ca_key);
        publisher.first_state().await;
        let (workers, threads, reports) =
            Workers::start(&node, node.workers, supervisor).map_err(CommandError::start)?;
        endpoints.admin.liveness.include(&workers);
        let (limits, reported) = (node.limits.clone(), readiness.clone());
        let limits = restarting("report of limits", move || {
            let (limits, readiness) = (limits.clone(), reported.clone());
            async move { limits.report(readiness).await }
        });
        let publishing = supervisor.essential("publisher of the mesh", publisher.follow(reports));
        let (data_plane, tasks) =
            (InProcess { node, workers, identities }, vec![publishing, limits]);
        Ok(RunningNode { data_plane, readiness, threads, tasks, endpoints, telemetry })
    }
}

/// The number of workers.
pub(crate) fn workers(settings: &Settings) -> usize {
    settings.proxy.workers.unwrap_or_else(available_cpus)
}

/// The running proxy of a node.
pub(crate) struct RunningNode {
    data_plane: InProcess,
    readiness: Readiness,
    threads: WorkerThreads,
    /// Tasks that run until the last pod is removed: among them the enforcement of policies.
    tasks: Vec<Task>,
    endpoints: Endpoints,
    telemetry: Option<Telemetry>,
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
    pub(crate) fn ready(&self) {
        self.readiness.ready();
        self.data_plane.node.gates.accept.open();
    }

    /// The gate that pauses accepting on the endpoints.
    pub(crate) fn endpoints(&self) -> &PauseGate {
        &self.data_plane.node.gates.accept
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
