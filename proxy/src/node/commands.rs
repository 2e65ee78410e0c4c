//! Executes the commands of one worker.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use underpass_hbone::log_panic;

use crate::dns::receive::{DnsReceiver, receive_queries};
use crate::mesh::publish::Reporter;
use crate::node::assignment::WorkerCommand;
use crate::node::pod::PodId;
use crate::node::worker::Worker;
use crate::process::supervise::Supervisor;
use crate::traffic::accept::accept_loop;

/// Executes the commands of one worker until the drain has ended.
pub(super) async fn execute(
    worker: Arc<Worker>,
    mut commands: mpsc::Receiver<WorkerCommand>,
    reporter: Reporter,
    supervisor: Supervisor,
) {
    let enforcing = worker.clone();
    let enforcing = async move { enforcing.enforce(&reporter).await };
    let _enforcing = supervisor.essential("enforcement of the mesh", enforcing);
    let _turns = worker
        .turns
        .clone()
        .map(|turns| supervisor.essential("turns of pods", async move { turns.give().await }));
    let mut listeners: HashMap<PodId, JoinSet<()>> = HashMap::new();
    loop {
        let command = tokio::select! {
            () = worker.node.drain.ended() => return,
            Some(command) = commands.recv() => command,
        };
        match command {
            WorkerCommand::Serve(assignment) => worker.serve(assignment),
            WorkerCommand::AddListener { pod, kind, listener, added } => {
                let registered = listener.register().map(|listener| {
                    let accepting = listeners.entry(pod.id).or_default();
                    accepting.spawn(accept_loop(worker.clone(), pod, kind, listener));
                });
                // Fails if the caller has stopped waiting.
                added.send(registered).ok();
            }
            WorkerCommand::AddDns { pod, service, listeners: of_dns, added } => {
                let accepting = listeners.entry(pod.id).or_default();
                let receiving = of_dns.into_kinds().try_for_each(|(_, listener)| {
                    let receiver = DnsReceiver::register(listener)?;
                    accepting.spawn(receive_queries(pod.clone(), service.clone(), receiver));
                    Ok(())
                });
                // Fails if the caller has stopped waiting.
                added.send(receiving).ok();
            }
            WorkerCommand::RemoveListeners { pod, removed } => {
                let mut accepting = listeners.remove(&pod).unwrap_or_default();
                let closing = async move {
                    accepting.shutdown().await;
                    // Fails if the caller has stopped waiting.
                    removed.send(()).ok();
                };
                tokio::spawn(log_panic("close of listeners", closing));
            }
            WorkerCommand::CloseTunnels(pod) => worker.close_tunnels(pod),
            WorkerCommand::Inspect(inspection) => worker.inspect(inspection),
        }
    }
}
