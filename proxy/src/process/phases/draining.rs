//! The end of the process: drains the connections, and keeps or removes the rules.

use std::time::Duration;

use super::Core;
use crate::node::phases::ServingPod;
use crate::node::workers::WorkerThreads;
use crate::process::command_error::CommandError;
use crate::process::notify;
use crate::process::stop_signal::StopSignal;
use crate::process::supervise::Task;

/// A worker that has not stopped by then is abandoned: the end of the process frees its resources.
const WORKER_STOP_TIMEOUT: Duration = Duration::from_secs(1);

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
    core: Core,
    pod: ServingPod,
    threads: WorkerThreads,
    tasks: Vec<Task>,
    /// The drain deadlines. Each further stop signal selects the next one.
    deadlines: [Duration; 3],
}

impl Draining {
    /// Reports the proxy unready, with the reason.
    pub(super) fn new(
        end: StopReason,
        mut core: Core,
        mut pod: ServingPod,
        threads: WorkerThreads,
        tasks: Vec<Task>,
    ) -> Self {
        core.endpoints.readiness.draining();
        let (timeouts, connections) = (&core.settings.timeouts, core.node.pods.connections());
        let deadlines = match end {
            StopReason::Stopped(why) => {
                notify::stopping();
                tracing::info!(why, connections, deadline = ?timeouts.drain, "stopping");
                [timeouts.drain, Duration::ZERO, Duration::ZERO]
            }
            StopReason::HandedOver { pid } => {
                pod.disown_rules();
                core.endpoints.close();
                notify::succeeded_by(pid);
                let deadline = timeouts.handover_drain;
                tracing::info!(pid, connections, ?deadline, "another process has taken over");
                [deadline, timeouts.drain, Duration::ZERO]
            }
        };
        Self { core, pod, threads, tasks, deadlines }
    }

    /// Drains, keeps or removes the rules, and stops the workers.
    pub(crate) async fn finish(mut self, stop: &mut StopSignal) -> Result<(), CommandError> {
        self.pod.stop_accepting().await;
        let drain = self.core.node.drain.clone();
        drain.close();
        let terminated = self.drain(stop).await;
        tracing::info!(terminated, "drained");
        let Self { pod, threads, tasks, .. } = self;
        let outcome = pod.leave().await;
        // These tasks enforce policies, and the pod renews its certificate: both until the drain is
        // complete.
        drop(tasks);
        drain.end();
        tokio::time::timeout(WORKER_STOP_TIMEOUT, threads.join()).await.ok();
        if let Some(telemetry) = &self.core.telemetry {
            telemetry.flush().await;
        }
        tracing::info!("stopped");
        Ok(outcome?)
    }

    /// Drains until the first deadline. Each further stop signal selects the next, shorter one.
    /// Returns the number of terminated connections.
    async fn drain(&self, stop: &mut StopSignal) -> usize {
        let [first, second, last] = self.deadlines;
        for deadline in [first, second] {
            tokio::select! {
                terminated = self.pod.drain(deadline) => return terminated,
                why = stop.wait() => tracing::warn!(why, "stop signal during the drain: shortening it"),
            }
        }
        self.pod.drain(last).await
    }
}
