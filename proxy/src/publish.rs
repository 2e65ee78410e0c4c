//! The mesh as it changes: read, handed to the workers, and said once all of them go by it.
//!
//! Not here: where a mesh comes from (the config crate), and what a change means for open connections (`policy.rs`, `live.rs`).

use std::sync::Arc;

use tokio::sync::{oneshot, watch};
use tokio::time::Instant;
use underpass_config::{Mesh, MeshSource, WorkloadSettings};

use crate::metrics;
use crate::snapshot::Snapshot;

/// What a worker tells when it goes by a mesh, and no connection that it forbids is open any longer.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Applied {
    pub(crate) generation: u64,
    /// How many connections were ended.
    pub(crate) cut: usize,
}

/// Publishes every state of the mesh.
#[derive(Debug)]
pub(crate) struct Publisher {
    source: MeshSource,
    own: WorkloadSettings,
    current: watch::Sender<Arc<Snapshot>>,
    /// Resolves when the last change that was published has been reported, or its task has ended.
    reported: Option<oneshot::Receiver<()>>,
}

impl Publisher {
    pub(crate) fn new(source: MeshSource, first: Arc<Mesh>, own: &WorkloadSettings) -> Self {
        tell("mesh loaded", &first);
        let current = watch::Sender::new(Arc::new(Snapshot::new(first, own, 1)));
        Self { source, own: own.clone(), current, reported: None }
    }

    /// What workers go by.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.current.subscribe()
    }

    /// Publishes every change until the end; `workers` tell when they go by it.
    pub(crate) async fn follow(mut self, workers: Vec<watch::Receiver<Applied>>) {
        let first = self.current.borrow().clone();
        let cut = all_go_by(&first, workers.clone()).await;
        metrics::mesh_applied(&first.mesh, first.generation, cut);
        drop(first);
        loop {
            match self.source.changed().await {
                Ok(mesh) => self.publish(mesh, workers.clone()),
                Err(errors) => {
                    metrics::mesh_refused();
                    tracing::error!("the mesh cannot be read, the last good one stays: {errors}");
                }
            }
        }
    }

    /// Hands a mesh to the workers. Until it is in force, the next one may come.
    fn publish(&mut self, mesh: Arc<Mesh>, workers: Vec<watch::Receiver<Applied>>) {
        let began = Instant::now();
        let generation = self.current.borrow().generation + 1;
        let new = Arc::new(Snapshot::new(mesh, &self.own, generation));
        let old = self.current.send_replace(new.clone());
        let (report, reported) = oneshot::channel();
        let previous = self.reported.replace(reported);
        tokio::spawn(async move {
            let cut = all_go_by(&new, workers).await;
            // In the order of generations: the metrics describe the newest one in force.
            if let Some(previous) = previous {
                previous.await.ok();
            }
            metrics::mesh_applied(&new.mesh, generation, cut);
            tell("mesh changed", &new.mesh);
            tracing::info!(generation, cut, took = ?began.elapsed(), "the change is in force");
            report.send(()).ok();
            drop(new);
            let mesh = old.mesh.clone();
            drop(old);
            mesh.retire().await;
        });
    }
}

/// Waits until every worker goes by `snapshot`; returns how many connections they ended.
async fn all_go_by(snapshot: &Snapshot, workers: Vec<watch::Receiver<Applied>>) -> usize {
    let mut cut = 0;
    for mut worker in workers {
        let reached = |applied: &Applied| applied.generation >= snapshot.generation;
        // A worker that is gone has no connections.
        cut += worker.wait_for(reached).await.map_or(0, |applied| applied.cut);
    }
    cut
}

fn tell(what: &str, mesh: &Mesh) {
    let (workloads, services) = (mesh.workloads().len(), mesh.services().len());
    tracing::info!(workloads, services, policies = mesh.policy_count(), "{what}");
}
