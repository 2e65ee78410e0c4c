//! Takes over the pods of a running daemon.

use std::sync::Arc;

use tokio::time::timeout;

use super::{Daemon, NodePods, ProbeRules};
use crate::pods::probes;
use crate::pods::source::SourceState;
use crate::pods::take_over::incoming;
use crate::process::command_error::CommandError;
use crate::process::pause_gate::Pausable;
use crate::process::stop_signal::StopSignal;
use crate::process::take_over::TakeoverClient;

impl Daemon {
    /// Takes over from the running process. Returns the daemon with the state of the source; `None`
    /// if a stop signal came before.
    ///
    /// # Errors
    ///
    /// The running process continues with all pods.
    pub(super) async fn adopt(
        mut self,
        client: TakeoverClient,
        stop: &mut StopSignal,
    ) -> Result<Option<(Self, Option<SourceState>)>, CommandError> {
        let (client, endpoints) = (Arc::new(client), self.proxy.accepting());
        let outcome = tokio::select! {
            // Polls the proxy part first: without it nothing may be completed.
            biased;
            error = self.proxy.failed() => {
                client.cancel().await;
                return Err(error);
            }
            outcome = complete(&client, &self.pods, &*endpoints) => outcome.map(Some),
            why = stop.wait() => {
                tracing::info!(why, "stopped while taking over");
                Ok(None)
            }
        };
        // A stop signal waits for the answer: the running process may have left already.
        let outcome = match outcome {
            Ok(Some(adopted)) => {
                client.ready().await.map(|()| Some(adopted)).map_err(CommandError::from)
            }
            other => other,
        };
        match outcome {
            Ok(Some((source, probes))) => {
                self.takeovers.own();
                self.pods.registry.finish_adoption();
                if probes.is_none() {
                    probes::remove_rules(self.pods.access.clone()).await;
                }
                self.probes = probes;
                Ok(Some((self, source)))
            }
            failed => {
                // The running process accepts again, and repairs the rules.
                client.cancel().await;
                self.proxy.hand_over();
                let NodePods { registry, settings, .. } = &self.pods;
                timeout(settings.timeouts.drain, registry.hand_over().gone()).await.ok();
                self.proxy.end().await;
                failed.map(|_| None)
            }
        }
    }
}

/// Adopts the pods, and does everything before the last message. Returns the state of the source,
/// unless the running process ended before it passed that, and the rules in the host's namespace.
async fn complete(
    client: &Arc<TakeoverClient>,
    pods: &NodePods,
    endpoints: &dyn Pausable,
) -> Result<(Option<SourceState>, Option<ProbeRules>), CommandError> {
    let source = incoming::adopt(client, &pods.registry).await?;
    client.accept_unless_ended().await?;
    // Two processes would contend for these rules: the running one has stopped its repairs.
    let probes = pods.translate_probes().await?;
    // They are paused already. This waits for an answer of the proxy process: if it has ended, the
    // take-over is cancelled.
    endpoints.pause().await;
    Ok((source, probes))
}
