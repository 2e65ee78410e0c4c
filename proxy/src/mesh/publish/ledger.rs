//! Accounts for every generation of the mesh exactly once.
//!
//! ```text
//! published ── every worker applied it ─────────────────────────> in force
//!           └─ some worker applied a newer one instead of it ───> superseded
//! ```
//!
//! Generations complete in their order, so that the metrics describe the newest one.

use std::collections::VecDeque;

use tokio::time::Instant;
use underpass_config::MeshSize;

use super::Report;
use crate::mesh::report::log_size;
use crate::observe::metrics;

/// The generations that at least one worker has not applied yet.
#[derive(Debug)]
pub(super) struct Ledger {
    /// The newest generation that each worker has applied.
    applied: Vec<u64>,
    /// Oldest first.
    pending: VecDeque<Published>,
}

/// A generation that was published.
#[derive(Debug)]
pub(super) struct Published {
    generation: u64,
    size: MeshSize,
    /// When it was published; `None` for the first one, which changes nothing.
    since: Option<Instant>,
    /// The number of connections that the workers have terminated for it.
    terminated: usize,
    /// Whether a worker has applied a newer generation instead.
    is_superseded: bool,
}

impl Ledger {
    /// A ledger for this number of workers, none of which has applied a generation.
    pub(super) fn new(workers: usize) -> Self {
        Self { applied: vec![0; workers], pending: VecDeque::new() }
    }

    /// Adds a generation, before any worker can apply it.
    pub(super) fn publish(&mut self, published: Published) {
        self.pending.push_back(published);
    }

    /// Records a report. Returns the generations that it completes.
    pub(super) fn take(&mut self, report: Report) -> Vec<Published> {
        match report {
            Report::Applied { worker, generation, terminated } => {
                self.applied(worker, generation, terminated);
            }
            Report::Ended { worker } => self.ended(worker),
        }
        self.complete()
    }

    /// Records that a worker has applied `generation` and skipped those since its previous one.
    fn applied(&mut self, worker: usize, generation: u64, terminated: usize) {
        let Some(applied) = self.applied.get_mut(worker) else { return };
        let last = std::mem::replace(applied, generation);
        for published in &mut self.pending {
            if published.generation == generation {
                published.terminated += terminated;
            } else if (last + 1..generation).contains(&published.generation) {
                published.is_superseded = true;
            }
        }
    }

    /// Records that a worker has stopped: no generation waits for it.
    fn ended(&mut self, worker: usize) {
        if let Some(applied) = self.applied.get_mut(worker) {
            *applied = u64::MAX;
        }
    }

    fn complete(&mut self) -> Vec<Published> {
        let by_all = self.applied.iter().min().copied().unwrap_or(u64::MAX);
        let pending = self.pending.partition_point(|published| published.generation <= by_all);
        self.pending.drain(..pending).collect()
    }
}

impl Published {
    /// The generation with which the workers start.
    pub(super) fn first(generation: u64, size: MeshSize) -> Self {
        Self { generation, size, since: None, terminated: 0, is_superseded: false }
    }

    /// A later generation.
    pub(super) fn change(generation: u64, size: MeshSize, now: Instant) -> Self {
        Self { since: Some(now), ..Self::first(generation, size) }
    }

    #[cfg(test)]
    pub(super) fn facts(&self) -> (u64, usize, bool) {
        (self.generation, self.terminated, self.is_superseded)
    }

    /// Counts and logs a generation that is complete.
    pub(super) fn account(self) {
        let Self { generation, size, since, terminated, is_superseded } = self;
        // The first generation is not a change.
        let took = since.map(|since| since.elapsed());
        metrics::mesh::connections_terminated(terminated);
        if is_superseded {
            let took = took.unwrap_or_default();
            metrics::mesh::superseded();
            tracing::info!(
                generation,
                terminated,
                ?took,
                "a newer change of the mesh has superseded this one"
            );
            return;
        }
        metrics::mesh::applied(size, generation);
        if let Some(took) = took {
            log_size(size, "mesh changed");
            tracing::info!(generation, terminated, ?took, "the change of the mesh is in force");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The generations that a report completes: number, terminated connections, whether superseded.
    fn applied(
        ledger: &mut Ledger,
        worker: usize,
        generation: u64,
        terminated: usize,
    ) -> Vec<(u64, usize, bool)> {
        let complete = ledger.take(Report::Applied { worker, generation, terminated });
        complete.iter().map(Published::facts).collect()
    }

    fn ledger(workers: usize, generations: u64) -> Ledger {
        let mut ledger = Ledger::new(workers);
        for generation in 1..=generations {
            ledger.publish(Published::first(generation, MeshSize::default()));
        }
        ledger
    }

    #[test]
    fn mesh_generation_is_in_force_when_last_worker_has_applied_it() {
        let mut ledger = ledger(2, 2);
        assert_eq!(applied(&mut ledger, 0, 1, 0), []);
        assert_eq!(applied(&mut ledger, 0, 2, 3), []);
        assert_eq!(applied(&mut ledger, 1, 1, 0), [(1, 0, false)]);
        assert_eq!(applied(&mut ledger, 1, 2, 4), [(2, 7, false)]);
    }

    #[test]
    fn overlapping_generations_count_terminated_connections_separately() {
        let mut ledger = ledger(2, 3);
        for (generation, terminated) in [(1, 0), (2, 1500), (3, 0)] {
            assert_eq!(applied(&mut ledger, 0, generation, terminated), []);
        }
        assert_eq!(applied(&mut ledger, 1, 1, 0), [(1, 0, false)]);
        assert_eq!(applied(&mut ledger, 1, 2, 1500), [(2, 3000, false)]);
        assert_eq!(applied(&mut ledger, 1, 3, 0), [(3, 0, false)]);
    }

    #[test]
    fn generation_that_a_worker_skipped_is_superseded() {
        let mut ledger = ledger(2, 4);
        for generation in 1..=4 {
            assert_eq!(applied(&mut ledger, 0, generation, 1), []);
        }
        assert_eq!(applied(&mut ledger, 1, 1, 0), [(1, 1, false)]);
        let rest = applied(&mut ledger, 1, 4, 9);
        assert_eq!(rest, [(2, 1, true), (3, 1, true), (4, 10, false)]);
    }

    #[test]
    fn worker_that_has_ended_delays_no_generation() {
        let mut ledger = ledger(2, 2);
        applied(&mut ledger, 0, 1, 0);
        applied(&mut ledger, 0, 2, 5);
        let complete = ledger.take(Report::Ended { worker: 1 });
        let complete: Vec<_> = complete.iter().map(Published::facts).collect();
        assert_eq!(complete, [(1, 0, false), (2, 5, false)]);
        ledger.publish(Published::first(3, MeshSize::default()));
        assert_eq!(applied(&mut ledger, 0, 3, 1), [(3, 1, false)]);
    }
}
