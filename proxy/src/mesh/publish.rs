//! Publishes every generation of the mesh to the workers, and reports when all have applied it.
//!
//! Generations overlap: a new one is published while connections that the previous one forbids are
//! still ending. A busy worker may skip generations. Each worker reports the generations that it
//! applies in order, and the [`Ledger`] accounts for each exactly once.
//!
//! The config crate reads the mesh. `policy.rs` and `connection_registry.rs` enforce a change on
//! open connections.

mod ledger;

use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use underpass_config::{Mesh, WorkloadSettings, retire_mesh};
use underpass_hbone::log_panic;
use underpass_interception::run_in_background;

use self::ledger::{Ledger, Published};
use super::feed::MeshFeed;
use super::on_demand::Lookups;
use super::report::{log_refused, log_size};
use crate::decide::snapshot::Snapshot;

/// The reports of all workers.
#[derive(Debug)]
pub(crate) struct Reports {
    workers: usize,
    reports: mpsc::UnboundedReceiver<Report>,
}

/// A report of one worker.
#[derive(Debug)]
enum Report {
    /// The worker has no open connection left that this generation or an older one forbids.
    Applied { worker: usize, generation: u64, terminated: usize },
    /// The worker has stopped, and has no connections.
    Ended { worker: usize },
}

/// Sends the reports of one worker.
#[derive(Debug)]
pub(crate) struct Reporter {
    worker: usize,
    reports: mpsc::UnboundedSender<Report>,
}

impl Reporter {
    /// Reports that the worker has applied `generation` and terminated `terminated` connections.
    /// The worker has skipped the generations since its last report.
    pub(crate) fn applied(&self, generation: u64, terminated: usize) {
        let report = Report::Applied { worker: self.worker, generation, terminated };
        // Fails when the process is stopping and no longer follows the mesh.
        self.reports.send(report).ok();
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.reports.send(Report::Ended { worker: self.worker }).ok();
    }
}

/// Creates a reporter for each worker, and the receiver of their reports.
pub(crate) fn reports(workers: usize) -> (Vec<Reporter>, Reports) {
    let (sender, reports) = mpsc::unbounded_channel();
    let reporter = |worker| Reporter { worker, reports: sender.clone() };
    ((0..workers).map(reporter).collect(), Reports { workers, reports })
}

/// Publishes every generation of the mesh.
#[derive(Debug)]
pub(crate) struct Publisher {
    feed: MeshFeed,
    own: WorkloadSettings,
    current: watch::Sender<Arc<Snapshot>>,
}

impl Publisher {
    pub(crate) fn new(feed: MeshFeed, first: Arc<Mesh>, own: &WorkloadSettings) -> Self {
        if matches!(feed, MeshFeed::File(..)) {
            log_size(first.size(), "mesh loaded");
        }
        let current = watch::Sender::new(Arc::new(Snapshot::new(first, own, 1)));
        Self { feed, own: own.clone(), current }
    }

    /// Waits for the first state of a control plane, without a timeout. Call it before any
    /// connection is accepted, so that no decision uses an empty mesh.
    pub(crate) async fn first_state(&mut self) {
        if let Some(first) = self.feed.first().await {
            log_size(first.size(), "mesh received");
            self.current.send_replace(Arc::new(Snapshot::new(first, &self.own, 1)));
        }
    }

    /// The lookups on demand of the mesh's source.
    pub(crate) fn lookups(&self) -> Lookups {
        self.feed.lookups()
    }

    /// The current snapshot of the mesh, which workers apply.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.current.subscribe()
    }

    /// Publishes every change and accounts for the workers' reports, until it is cancelled.
    pub(crate) async fn follow(mut self, Reports { workers, mut reports }: Reports) {
        let mut ledger = Ledger::new(workers);
        {
            let first = self.current.borrow();
            ledger.publish(Published::first(first.generation, first.mesh.size()));
        }
        loop {
            let complete = tokio::select! {
                changed = self.feed.changed() => {
                    match changed {
                        Ok(mesh) => self.publish(mesh, &mut ledger),
                        Err(errors) => log_refused(&errors),
                    }
                    continue;
                }
                Some(report) = reports.recv() => ledger.take(report),
            };
            complete.into_iter().for_each(Published::account);
        }
    }

    /// Publishes a generation. The previous one may not be in force yet.
    fn publish(&self, mesh: Arc<Mesh>, ledger: &mut Ledger) {
        let generation = self.current.borrow().generation + 1;
        let size = mesh.size();
        ledger.publish(Published::change(generation, size, Instant::now()));
        let new = Arc::new(Snapshot::new(mesh, &self.own, generation));
        let old = self.current.send_replace(new).mesh.clone();
        let released = retire_mesh(old, run_in_background);
        tokio::spawn(log_panic("release of an old mesh", released));
    }
}

#[cfg(test)]
mod tests;
