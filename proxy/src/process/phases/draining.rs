//! The end of the process: its drain, and what becomes of its rules.

use std::time::Duration;

use super::Core;
use crate::node::phases::ServingPod;
use crate::node::workers::WorkerThreads;
use crate::process::command_error::CommandError;
use crate::process::notify;
use crate::process::stop_signal::StopSignal;
use crate::process::supervise::Task;

/// Timeout for the end of the workers: the end of the process frees the resources of one that does
/// not stop in time.
const WORKERS_END: Duration = Duration::from_secs(1);

/// Why the proxy stops serving.
#[derive(Debug, Clone, Copy)]
pub(super) enum End {
    Stopped(&'static str),
    /// Another process has taken over.
    HandedOver {
        pid: Option<i32>,
    },
}

/// The process when it serves no longer.
pub(crate) struct Draining {
    core: Core,
    pod: ServingPod,
    threads: WorkerThreads,
    tasks: Vec<Task>,
    /// Each further stop signal selects the next deadline.
    deadlines: [Duration; 3],
}

impl Draining {
    /// Reports that the proxy is not ready any longer, and why.
    pub(super) fn new(
        end: End,
        mut core: Core,
        mut pod: ServingPod,
        threads: WorkerThreads,
        tasks: Vec<Task>,
    ) -> Self {
        core.endpoints.readiness.draining();
        let (timeouts, connections) = (&core.settings.timeouts, core.node.pods.connections());
        let deadlines = match end {
            End::Stopped(why) => {
                notify::stopping();
                tracing::info!(why, connections, deadline = ?timeouts.drain, "stopping");
                [timeouts.drain, Duration::ZERO, Duration::ZERO]
            }
            End::HandedOver { pid } => {
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

    /// Drains, keeps or removes the rules, and ends the workers.
    pub(crate) async fn finish(mut self, stop: &mut StopSignal) -> Result<(), CommandError> {
        self.pod.stop_accepting().await;
        let drain = self.core.node.drain.clone();
        drain.close();
        let terminated = self.drain(stop).await;
        tracing::info!(terminated, "drained");
        let Self { pod, threads, tasks, .. } = self;
        let left = pod.leave().await;
        // Policy enforcement ran until the drain completed, and so did certificate renewal: the pod
        // held it.
        drop(tasks);
        drain.end();
        tokio::time::timeout(WORKERS_END, threads.join()).await.ok();
        tracing::info!("stopped");
        Ok(left?)
    }

    /// Drains until the first deadline; each further stop signal selects the next, shorter one.
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
