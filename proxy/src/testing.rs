//! A door to what is private, for the end-to-end tests alone: a node with several pods, in the
//! process of the test. Nothing here is stable.

use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use underpass_config::{FileWatcher, MeshSource, Settings};
use underpass_interception::{Inotify, Namespace, NamespaceThread, run_in_background};

use crate::admin::endpoints::Readiness;
use crate::decide::connection_registry::Registries;
use crate::mesh::publish::Publisher;
use crate::node::Node;
use crate::node::certificates::Certificates;
use crate::node::pod::{Pod, pod_sockets};
use crate::node::workers::Workers;
use crate::observe::metrics;
use crate::observe::metrics::Exporter;
use crate::process::pause_gate::PauseGate;
use crate::rules::capture::Capture;
use crate::traffic::listeners::Listeners;

/// Why a step failed.
pub type Failure = Box<dyn Error + Send + Sync>;

/// A running node.
#[derive(Debug)]
pub struct TestNode {
    node: Arc<Node>,
    workers: Workers,
    thread: NamespaceThread,
    watcher: FileWatcher,
}

/// A pod that a node serves.
#[derive(Debug)]
pub struct TestPod {
    pod: Arc<Pod>,
    capture: Capture,
    settings: Settings,
}

impl TestNode {
    /// Starts a node of so many workers, with the mesh and the limits of `settings`.
    ///
    /// # Errors
    ///
    /// Those of a start.
    pub fn start(settings: &Settings, workers: usize) -> Result<Self, Failure> {
        let watcher = FileWatcher::new(Inotify::open);
        let (source, mesh) =
            MeshSource::open(settings.mesh_file.as_deref(), &watcher, run_in_background)?;
        let publisher = Publisher::new(source, mesh, &settings.workload);
        let (mesh, series) = (publisher.subscribe(), exporter(settings)?.series);
        let node = Arc::new(Node::new(settings, workers, mesh, PauseGate::default(), series));
        let (workers, reports) = Workers::start(&node, workers)?;
        tokio::spawn(publisher.follow(reports));
        Ok(Self { node, workers, thread: NamespaceThread::start()?, watcher })
    }

    /// Installs the rules of a pod in `namespace`, serves its connections, and tests that they are
    /// caught.
    ///
    /// # Errors
    ///
    /// Those of a start.
    pub async fn add_pod(
        &self,
        settings: Settings,
        namespace: Namespace,
    ) -> Result<TestPod, Failure> {
        let capture = Capture::prepare(&settings, namespace, self.thread.clone()).await?;
        let (access, sockets) = (capture.access(), pod_sockets(&settings));
        let listeners = Listeners::bind(access, &sockets, &settings, Vec::new()).await?;
        let readiness = Readiness::default();
        let identities =
            Certificates::identities(&settings, access, &sockets, &readiness, &self.watcher)?;
        let interception = watch::Sender::new(settings.interception.clone()).subscribe();
        let mut pod = Pod::open(&self.node, &settings, access, sockets, interception).await?;
        capture.install().await?;
        let probes = capture.probes(&settings.interception).await?;
        if let Some(identities) = &identities {
            pod.credentials = Some(identities.lease(&settings.workload.spiffe_id).await?);
        }
        let pod = Arc::new(pod);
        self.workers.add_listeners(&pod, listeners.split().traffic).await;
        capture.test_at_start(&pod.self_test, &probes, &settings.interception).await?;
        Ok(TestPod { pod, capture, settings })
    }

    /// Drains a pod for up to `deadline` and removes it, with its rules. Returns how many of its
    /// connections were terminated.
    ///
    /// # Errors
    ///
    /// The rules cannot be removed.
    pub async fn remove_pod(&self, pod: TestPod, deadline: Duration) -> Result<usize, Failure> {
        let TestPod { pod, capture, settings } = pod;
        let terminated = self.workers.remove_pod(&pod, deadline).await;
        capture.leave(&settings.interception).await?;
        Ok(terminated)
    }

    /// Ends the workers, whose pods must be removed.
    pub async fn stop(self) {
        self.node.drain.drain(&Registries::<()>::new(1), Duration::ZERO).await;
        self.workers.join().await;
    }
}

/// The metrics of the process, of which there can be one set.
fn exporter(settings: &Settings) -> Result<Exporter, Failure> {
    static EXPORTER: Mutex<Option<Exporter>> = Mutex::new(None);
    let mut exporter = EXPORTER.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(exporter) = &*exporter {
        return Ok(exporter.clone());
    }
    let installed = metrics::install(settings.series)?;
    *exporter = Some(installed.clone());
    Ok(installed)
}
