//! The running process's side: passes the pods, and pauses what the new process takes over.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use underpass_config::PodUid;

use super::{
    ACCEPT, AGAIN, END, EXEMPT, GONE, NEXT, POD, RELEASED, RESUME, RULES, SERVED, SOURCE, message,
};
use crate::pods::enrolment::Pause;
use crate::pods::registry::PodRegistry;
use crate::pods::source::{PausedSource, SourceHandle};
use crate::pods::state::moving::Moved;
use crate::process::pause_gate::{Pausable, PauseGate};
use crate::process::take_over::{PREPARE_TIMEOUT, Reply, SWITCH_TIMEOUT, Subject};

/// Timeout for the source to finish its work in progress, and for removed pods to drain, below that
/// of the new process.
const SOURCE_TIMEOUT: Duration = Duration::from_secs(6);

/// The pods of a node, while another process takes them over.
#[derive(Debug)]
pub(crate) struct OutgoingPods {
    registry: PodRegistry,
    source: SourceHandle,
    /// Pauses accepting on the endpoints of the node.
    endpoints: Arc<dyn Pausable>,
    /// Pauses the repair of the rules in the host's namespace.
    host_rules: PauseGate,
    /// The pods for which possibly no process accepts: the new one has not reported success or
    /// failure.
    switching: BTreeSet<PodUid>,
    paused: Option<PausedSource>,
}

impl OutgoingPods {
    pub(crate) fn new(
        registry: PodRegistry,
        source: SourceHandle,
        endpoints: Arc<dyn Pausable>,
        host_rules: PauseGate,
    ) -> Self {
        let (switching, paused) = (BTreeSet::new(), None);
        Self { registry, source, endpoints, host_rules, switching, paused }
    }

    async fn next(&self) -> Reply {
        match self.registry.next_moved() {
            Some(Moved::Pod(pod)) => {
                let has_certificate = self.registry.has_certificate(&pod.facts.uid).await;
                let Ok(message) = message::encode(&pod, has_certificate) else {
                    return Reply::refused("cannot encode a pod");
                };
                let listeners = pod.listeners.into_iter().flatten();
                let listeners = listeners.map(|(_, listener)| Box::new(listener) as _);
                let namespace: Box<dyn AsFd + Send + Sync> = Box::new(pod.namespace);
                Reply::new(format!("{POD} {message}"))
                    .with(std::iter::once(namespace).chain(listeners))
            }
            Some(Moved::Gone(uid)) => Reply::new(format!("{GONE} {uid}")),
            None => Reply::idle(END.to_owned()),
        }
    }

    async fn perform_for_pod(&mut self, request: &str, uid: PodUid) -> Option<Reply> {
        match request {
            RULES => self.registry.pause(&uid, Pause::Rules).await,
            ACCEPT => {
                self.registry.pause(&uid, Pause::Accepting).await;
                self.switching.insert(uid);
            }
            SERVED => drop(self.switching.remove(&uid)),
            RESUME => {
                self.registry.resume(&uid);
                self.switching.remove(&uid);
            }
            EXEMPT => self.registry.exempt(&uid),
            RELEASED => self.registry.released(&uid),
            _ => return None,
        }
        Some(Reply::done())
    }

    /// Pauses the source, then the registry, so that the requests in progress are finished.
    ///
    /// The source may wait for a removed pod in whose namespace the other process still has
    /// listeners. The other process must then learn of the removal first.
    async fn pause_source(&mut self) -> Reply {
        let deadline = Instant::now() + SOURCE_TIMEOUT;
        let paused = tokio::select! {
            biased;
            () = self.registry.wait_for_gone() => return Reply::new(AGAIN.to_owned()),
            paused = timeout_at(deadline, self.source.pause()) => paused,
        };
        let Ok(paused) = paused else {
            return Reply::busy("the source of pods has requests in progress");
        };
        let Some((state, paused)) = paused else {
            return Reply::refused("the source of pods has ended");
        };
        if self.registry.has_gone() {
            return Reply::new(AGAIN.to_owned());
        }
        self.paused = Some(paused);
        if timeout_at(deadline, self.registry.freeze().gone()).await.is_err() {
            return Reply::busy("a removed pod still drains");
        }
        let descriptors = state.descriptors.into_iter().map(|descriptor| Box::new(descriptor) as _);
        Reply::new(format!("{SOURCE} {}", state.text)).with(descriptors)
    }
}

impl Subject for OutgoingPods {
    const REQUESTS: &'static str = "a request about pods";

    async fn perform(&mut self, request: &str) -> Option<Reply> {
        match request.split_once(' ') {
            None if request == NEXT => Some(self.next().await),
            None if request == SOURCE => Some(self.pause_source().await),
            Some((request, uid)) => self.perform_for_pod(request, uid.parse().ok()?).await,
            None => None,
        }
    }

    fn timeout(&self) -> Duration {
        if self.switching.is_empty() { PREPARE_TIMEOUT } else { SWITCH_TIMEOUT }
    }

    async fn pause(&mut self) {
        self.host_rules.close().await;
        self.endpoints.pause().await;
    }

    async fn complete(&mut self) {
        self.registry.finish_rules().await;
    }

    fn resume(&mut self) {
        self.host_rules.open();
        self.endpoints.resume();
        self.registry.resume_all();
        self.switching.clear();
        self.paused = None;
    }
}
