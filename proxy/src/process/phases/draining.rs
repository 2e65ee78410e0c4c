//! The end of the process: drains the connections, and keeps or removes the rules.

use std::time::Duration;

use super::Core;
use crate::node::phases::ServingPod;
use crate::process::command_error::CommandError;
use crate::process::notify;
use crate::process::proxy_part::ProxyPart;
use crate::process::stop_signal::StopSignal;
use crate::process::supervise::Task;

/// The reason why the proxy stops serving.
#[derive(Debug, Clone, Copy)]
pub(in crate::process) enum StopReason {
    Stopped(&'static str),
    /// Another process has taken over.
    HandedOver {
        pid: Option<i32>,
    },
}

/// The process after it has stopped serving.
pub(crate) struct Draining {
    pod: ServingPod,
    proxy: ProxyPart,
    tasks: Vec<Task>,
    /// The drain deadlines. Each further stop signal selects the next one.
    deadlines: [Duration; 3],
    /// Keeps the namespaces thread.
    _core: Core,
}

impl Draining {
    /// Reports the proxy unready, with the reason.
    pub(super) fn new(
        end: StopReason,
        mut core: Core,
        mut pod: ServingPod,
        mut proxy: ProxyPart,
        tasks: Vec<Task>,
    ) -> Self {
        let (timeouts, connections) = (&core.settings.timeouts, proxy.connections());
        let deadlines = match end {
            StopReason::Stopped(why) => {
                proxy.drain();
                notify::stopping();
                core.store.clear();
                tracing::info!(why, connections, deadline = ?timeouts.drain, "stopping");
                [timeouts.drain, Duration::ZERO, Duration::ZERO]
            }
            StopReason::HandedOver { pid } => {
                pod.disown_rules();
                proxy.hand_over();
                let deadline = timeouts.handover_drain;
                tracing::info!(pid, connections, ?deadline, "another process has taken over");
                core.instance = None;
                [deadline, core.settings.timeouts.drain, Duration::ZERO]
            }
        };
        Self { pod, proxy, tasks, deadlines, _core: core }
    }

    /// Drains, keeps or removes the rules, and stops the workers.
    ///
    /// # Errors
    ///
    /// The proxy process has ended, or the rules cannot be kept or removed.
    pub(crate) async fn finish(mut self, stop: &mut StopSignal) -> Result<(), CommandError> {
        let Self { pod, proxy, deadlines, .. } = &mut self;
        let draining = async {
            pod.stop_accepting().await;
            drain(pod, *deadlines, stop).await
        };
        let terminated = tokio::select! {
            terminated = draining => terminated,
            error = proxy.failed() => return Err(error),
        };
        tracing::info!(terminated, "drained");
        let Self { pod, proxy, tasks, .. } = self;
        let outcome = pod.leave().await;
        drop(tasks);
        proxy.end().await;
        tracing::info!("stopped");
        Ok(outcome?)
    }
}

/// Drains until the first deadline. Each further stop signal selects the next, shorter one. Returns
/// the number of terminated connections.
async fn drain(pod: &ServingPod, deadlines: [Duration; 3], stop: &mut StopSignal) -> usize {
    let [first, second, last] = deadlines;
    for deadline in [first, second] {
        tokio::select! {
            terminated = pod.drain(deadline) => return terminated,
            why = stop.wait() => tracing::warn!(why, "stop signal during the drain: shortening it"),
        }
    }
    pod.drain(last).await
}
