//! The mesh as it changes: read, handed to the workers, and said once all of them go by it.
//!
//! Not here: where a mesh comes from (the config crate), and what a change means for open connections (`policy.rs`, `live.rs`).

use std::sync::Arc;

use tokio::sync::watch;
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
}

impl Publisher {
    pub(crate) fn new(source: MeshSource, first: Arc<Mesh>, own: &WorkloadSettings) -> Self {
        tell("mesh loaded", &first);
        let current = watch::Sender::new(Arc::new(Snapshot::new(first, own, 1)));
        Self { source, own: own.clone(), current }
    }

    /// What workers go by.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.current.subscribe()
    }

    /// Publishes every change until the end; `workers` tell when they go by it.
    pub(crate) async fn follow(mut self, mut workers: Vec<watch::Receiver<Applied>>) {
        let first = self.current.borrow().clone();
        self.wait_for_all(&first, &mut workers).await;
        drop(first);
        loop {
            match self.source.changed().await {
                Ok(mesh) => self.publish(mesh, &mut workers).await,
                Err(errors) => {
                    metrics::mesh_refused();
                    tracing::error!("the mesh cannot be read, the last good one stays: {errors}");
                }
            }
        }
    }

    async fn publish(&self, mesh: Arc<Mesh>, workers: &mut [watch::Receiver<Applied>]) {
        let began = Instant::now();
        let generation = self.current.borrow().generation + 1;
        let new = Arc::new(Snapshot::new(mesh, &self.own, generation));
        let old = self.current.send_replace(new.clone());
        let cut = self.wait_for_all(&new, workers).await;
        let took = began.elapsed();
        tell("mesh changed", &new.mesh);
        tracing::info!(generation, cut, ?took, "the change is in force");
        tokio::spawn(old.mesh.clone().retire());
    }

    /// Waits until every worker goes by `snapshot`; returns how many connections they ended.
    async fn wait_for_all(
        &self,
        snapshot: &Snapshot,
        workers: &mut [watch::Receiver<Applied>],
    ) -> usize {
        let mut cut = 0;
        for worker in workers {
            let reached = |applied: &Applied| applied.generation >= snapshot.generation;
            // A worker that is gone has no connections.
            cut += worker.wait_for(reached).await.map_or(0, |applied| applied.cut);
        }
        metrics::mesh_applied(&snapshot.mesh, snapshot.generation, cut);
        cut
    }
}

fn tell(what: &str, mesh: &Mesh) {
    let (workloads, services) = (mesh.workloads().len(), mesh.services().len());
    tracing::info!(workloads, services, policies = mesh.policy_count(), "{what}");
}
