//! Gives the end-to-end tests access to private code: a node with several pods in the process of
//! the test. Not stable.

use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use underpass_config::{FileWatcher, InterceptionSettings, MeshSource, Settings};
use underpass_interception::{
    Inotify, Namespace, NamespaceAccess, NamespaceThread, run_in_background,
};

use crate::admin::readiness::Readiness;
use crate::mesh::feed::MeshFeed;
use crate::mesh::publish::Publisher;
use crate::node::Node;
use crate::node::certificates::Certificates;
use crate::node::in_process::InProcess;
use crate::node::phases::{BoundPod, PodSpec, RulesOwner, ServingPod};
use crate::node::pod::pod_sockets;
use crate::node::workers::{WorkerThreads, Workers};
use crate::observe::mesh_health::MeshHealth;
use crate::observe::metrics;
use crate::observe::metrics::Exporter;
use crate::process::pause_gate::PauseGate;
use crate::process::supervise::{Failures, Supervisor, Task};
use crate::rules::health::RulesTotals;

/// An error of a step.
pub type Failure = Box<dyn Error + Send + Sync>;

/// A running node.
#[derive(Debug)]
pub struct TestNode {
    node: Arc<Node>,
    workers: Workers,
    threads: WorkerThreads,
    thread: NamespaceThread,
    watcher: FileWatcher,
    rules: RulesTotals,
    supervisor: Supervisor,
    /// Kept open, but never received: a test that loses a task fails anyway.
    _failures: Failures,
    _publishing: Task,
}

/// A pod that a node serves.
#[derive(Debug)]
pub struct TestPod {
    pod: ServingPod,
    /// Kept, so that the settings channel stays open.
    _settings: watch::Sender<InterceptionSettings>,
}

impl TestPod {
    /// Fails if the pod's rules differ from its settings.
    ///
    /// # Errors
    ///
    /// The rules differ, or cannot be read.
    pub async fn verify(&self) -> Result<(), Failure> {
        Ok(self.pod.verify().await?)
    }
}

impl TestNode {
    /// Starts a node with this many workers, and the mesh and the limits of `settings`.
    ///
    /// # Errors
    ///
    /// The node cannot be started.
    pub fn start(settings: &Settings, workers: usize) -> Result<Self, Failure> {
        let watcher = FileWatcher::new(Inotify::open);
        let (source, mesh) =
            MeshSource::open(settings.mesh_file.as_deref(), &watcher, run_in_background)?;
        let publisher = Publisher::new(
            MeshFeed::File(Box::new(source), MeshHealth::default()),
            mesh,
            &settings.workload,
        );
        let lookups = publisher.lookups();
        let (mesh, series) = (publisher.subscribe(), exporter(settings)?.series);
        let (thread, rules) = (NamespaceThread::start()?, RulesTotals::default());
        let access = NamespaceAccess::new(Namespace::current()?, thread.clone());
        let gate = PauseGate::default();
        let node = Arc::new(Node::new(settings, &access, workers, mesh, lookups, gate, series));
        let (supervisor, _failures) = Supervisor::new();
        let (workers, threads, reports) = Workers::start(&node, workers, &supervisor)?;
        let _publishing = supervisor.essential("publisher of the mesh", publisher.follow(reports));
        Ok(Self {
            node,
            workers,
            threads,
            thread,
            watcher,
            rules,
            supervisor,
            _failures,
            _publishing,
        })
    }

    /// Installs the rules of a pod in `namespace`, serves its connections, and tests the rules.
    ///
    /// # Errors
    ///
    /// The pod cannot be served.
    pub async fn add_pod(
        &self,
        settings: Settings,
        namespace: Namespace,
    ) -> Result<TestPod, Failure> {
        let settings = Arc::new(settings);
        let access = NamespaceAccess::new(namespace, self.thread.clone());
        let (readiness, sockets) = (Readiness::default(), pod_sockets(&settings));
        let identities = Certificates::identities(
            &settings,
            &access,
            &sockets,
            None,
            Some(&readiness),
            &self.watcher,
            &self.supervisor,
        )?;
        let _settings = watch::Sender::new(settings.interception.clone());
        let spec = PodSpec {
            uid: None,
            settings: settings.clone(),
            access,
            interception: _settings.subscribe(),
            health: self.rules.pod(),
        };
        let bound = BoundPod::bind(spec, &mut Vec::new()).await?;
        let guarded = bound.guard(RulesOwner::ThisProcess).await?;
        let lease = match &identities {
            Some(identities) => Some(identities.lease(&settings.workload.spiffe_id).await?),
            None => None,
        };
        let (node, workers) = (self.node.clone(), self.workers.clone());
        let data_plane = InProcess { node, workers, identities: identities.map(Arc::new) };
        let pod = guarded.serve(&data_plane, PauseGate::default()).await?;
        drop(lease);
        Ok(TestPod { pod, _settings })
    }

    /// Drains a pod for up to `deadline`, and removes it with its rules. Returns the number of
    /// terminated connections.
    ///
    /// # Errors
    ///
    /// The rules cannot be removed.
    pub async fn remove_pod(&self, pod: TestPod, deadline: Duration) -> Result<usize, Failure> {
        let TestPod { mut pod, _settings } = pod;
        pod.stop_accepting().await;
        let terminated = pod.drain(deadline).await;
        pod.leave().await?;
        Ok(terminated)
    }

    /// The metrics of the process.
    #[must_use]
    pub fn metrics(&self) -> String {
        let exporter = EXPORTER.lock().unwrap_or_else(PoisonError::into_inner);
        exporter.as_ref().map(Exporter::render).unwrap_or_default()
    }

    /// Stops the workers. All pods must be removed before.
    pub async fn stop(self) {
        self.node.drain.close();
        self.node.drain.end();
        self.threads.join().await;
    }
}

static EXPORTER: Mutex<Option<Exporter>> = Mutex::new(None);

/// The exporter of metrics, shared because a process can have only one.
fn exporter(settings: &Settings) -> Result<Exporter, Failure> {
    let mut exporter = EXPORTER.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(exporter) = &*exporter {
        return Ok(exporter.clone());
    }
    let installed = metrics::install(settings.series.clone())?;
    *exporter = Some(installed.clone());
    Ok(installed)
}
