//! Liveness (`/healthz/live`): whether every worker still runs its tasks.

use std::sync::{Arc, OnceLock};

use http::StatusCode;

use crate::admin::answer::{Answer, text};
use crate::node::inspection::Inspection;
use crate::node::workers::{INSPECTION_TIMEOUT, Workers};

/// The workers, once they run. Clones share them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Liveness(Arc<OnceLock<Workers>>);

impl Liveness {
    /// Includes the workers from now on. Must be called once.
    pub(crate) fn include(&self, workers: &Workers) {
        self.0.set(workers.clone()).ok();
    }

    /// The workers; `None` before they run.
    pub(super) fn workers(&self) -> Option<&Workers> {
        self.0.get()
    }

    /// Status 200 if all workers answer, or none runs yet.
    pub(super) async fn answer(&self) -> Answer {
        let answers = match self.0.get() {
            Some(workers) => workers.inspect(Inspection::Ping).await,
            None => Vec::new(),
        };
        let silent = answers.iter().enumerate().filter(|(_, answer)| answer.is_none());
        let silent: Vec<_> = silent.map(|(index, _)| format!("worker-{index}")).collect();
        if silent.is_empty() {
            return text(StatusCode::OK, "alive\n");
        }
        let (seconds, silent) = (INSPECTION_TIMEOUT.as_secs(), silent.join(", "));
        let reason = format!("not alive: no answer within {seconds} s from {silent}\n");
        text(StatusCode::SERVICE_UNAVAILABLE, reason)
    }
}
