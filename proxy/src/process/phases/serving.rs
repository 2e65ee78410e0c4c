//! The process while it serves.

use super::draining::{Draining, StopReason};
use super::{Core, workers};
use underpass_config::Hint as _;
use underpass_interception::Ports;

use crate::node::phases::ServingPod;
use crate::node::workers::WorkerThreads;
use crate::process::notify;
use crate::process::stop_signal::StopSignal;
use crate::process::supervise::Task;
use crate::process::take_over::{TakeoverOutcome, TakeoverServer};

/// The process while it serves. Dropping it leaves the rules.
pub(crate) struct Serving {
    core: Core,
    pod: ServingPod,
    threads: WorkerThreads,
    takeovers: TakeoverServer,
    /// Tasks that run until the drain completes, such as the enforcement of policies.
    tasks: Vec<Task>,
}

impl Serving {
    pub(super) fn new(
        core: Core,
        pod: ServingPod,
        threads: WorkerThreads,
        takeovers: TakeoverServer,
        tasks: Vec<Task>,
    ) -> Self {
        core.endpoints.readiness.ready();
        notify::ready();
        let (settings, ports) = (&core.settings, Ports::of(&core.settings));
        tracing::info!(
            workload = %settings.workload.name, workers = workers(settings), outbound = ports.outbound,
            inbound = ports.inbound, hbone = ports.hbone, profile = %settings.interception.profile, "ready"
        );
        Self { core, pod, threads, takeovers, tasks }
    }

    /// Serves until a stop signal, or until another process has taken over. A stop signal waits for
    /// the end of a take-over in progress.
    pub(crate) async fn until_end(mut self, stop: &mut StopSignal) -> Draining {
        let end = loop {
            let conversation = tokio::select! {
                why = stop.wait() => break StopReason::Stopped(why),
                conversation = self.takeovers.accept() => conversation,
            };
            let mut gates = self.core.node.gates.clone();
            match self.takeovers.answer(conversation, &mut gates).await {
                TakeoverOutcome::Completed { pid } => break StopReason::HandedOver { pid },
                TakeoverOutcome::Abandoned => self.restore_rules().await,
            }
        };
        let Self { core, pod, threads, tasks, .. } = self;
        Draining::new(end, core, pod, threads, tasks)
    }

    /// Restores the rules, which a failed take-over may have changed: the reconciler verifies them
    /// now, and without a reconciler they are installed again.
    async fn restore_rules(&self) {
        if self.core.settings.interception.repair {
            return;
        }
        if let Err(error) = self.pod.restore_rules().await {
            let (error, hint) = (crate::error::chain(&error), error.hint());
            tracing::error!(
                error,
                hint = hint.as_deref(),
                "cannot restore the rules after a failed take-over"
            );
        }
    }
}
