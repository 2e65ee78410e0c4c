//! The process while it serves.

use underpass_config::Hint as _;
use underpass_interception::Ports;

use super::Core;
use super::draining::{Draining, StopReason};
use crate::node::phases::ServingPod;
use crate::process::command_error::CommandError;
use crate::process::node_proxy::workers;
use crate::process::notify;
use crate::process::proxy_part::ProxyPart;
use crate::process::stop_signal::StopSignal;
use crate::process::supervise::Task;
use crate::process::take_over::{FixedPod, TakeoverOutcome, TakeoverServer};
use crate::process::watchdog;

/// The process while it serves. Dropping it leaves the rules.
pub(crate) struct Serving {
    core: Core,
    pod: ServingPod,
    proxy: ProxyPart,
    takeovers: TakeoverServer,
    /// Tasks that run until the drain completes.
    tasks: Vec<Task>,
    /// Reports to the supervisor's watchdog, until another process has taken over.
    watchdog: Option<Task>,
}

impl Serving {
    pub(super) async fn new(
        mut core: Core,
        pod: ServingPod,
        mut proxy: ProxyPart,
        takeovers: TakeoverServer,
        reloading: Task,
    ) -> Self {
        proxy.ready().await;
        core.store.keep(takeovers.listeners());
        let watchdog = watchdog::start(proxy.liveness());
        notify::ready();
        let (settings, ports) = (&core.settings, Ports::of(&core.settings));
        tracing::info!(
            workload = %settings.workload.name, workers = workers(settings), outbound = ports.outbound,
            inbound = ports.inbound, hbone = ports.hbone, profile = %settings.interception.profile, "ready"
        );
        Self { core, pod, proxy, takeovers, tasks: vec![reloading], watchdog }
    }

    /// Serves until a stop signal, or until another process has taken over. A stop signal waits for
    /// the end of a take-over in progress.
    ///
    /// # Errors
    ///
    /// The proxy process has ended. The rules stay.
    pub(crate) async fn until_end(
        mut self,
        stop: &mut StopSignal,
    ) -> Result<Draining, CommandError> {
        let end = loop {
            let conversation = tokio::select! {
                why = stop.wait() => break StopReason::Stopped(why),
                error = self.proxy.failed() => return Err(error),
                conversation = self.takeovers.accept() => conversation,
            };
            let rules = self.core.rules_gate.clone();
            let mut pod = FixedPod { accepting: self.proxy.accepting(), rules };
            let outcome = tokio::select! {
                outcome = self.takeovers.answer(conversation, &mut pod) => outcome,
                error = self.proxy.failed() => return Err(error),
            };
            match outcome {
                TakeoverOutcome::Completed { pid } => break StopReason::HandedOver { pid },
                TakeoverOutcome::Abandoned => self.restore_rules().await,
            }
        };
        let Self { core, pod, proxy, mut tasks, watchdog, .. } = self;
        match end {
            StopReason::Stopped(_) => tasks.extend(watchdog),
            // The supervisor watches the process that has taken over.
            StopReason::HandedOver { .. } => drop(watchdog),
        }
        Ok(Draining::new(end, core, pod, proxy, tasks))
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
