//! The interface of a source of pods.

use std::convert::Infallible;
use std::error::Error;
use std::fmt;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;

use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

use crate::admin::readiness::SourceReport;
use crate::pods::registry::PodRegistry;

/// A source of pods, which adds and removes pods in the registry.
pub(crate) trait PodSource: fmt::Debug + Send {
    /// Adds and removes pods until a failure that only a restart can remedy. Retries other
    /// failures. Cancelled when the daemon stops.
    fn run(self: Box<Self>, context: SourceContext) -> SourceRun;
}

/// The environment of a running source.
#[derive(Debug)]
pub(crate) struct SourceContext {
    pub(crate) registry: PodRegistry,
    pub(crate) health: SourceHealth,
    pub(crate) pauses: PauseRequests,
    /// The state of the source of the process that was taken over, if that process passed it.
    pub(crate) inherited: Option<SourceState>,
}

/// The state that a source passes to the source of the process that takes over.
#[derive(Debug, Default)]
pub(crate) struct SourceState {
    /// Has no line break.
    pub(crate) text: String,
    pub(crate) descriptors: Vec<OwnedFd>,
}

/// Pauses a source.
#[derive(Debug, Clone)]
pub(crate) struct SourceHandle(mpsc::Sender<PauseRequest>);

/// The requests that a source pauses.
#[derive(Debug)]
pub(crate) struct PauseRequests(mpsc::Receiver<PauseRequest>);

/// A request to pause, while another process takes over.
#[derive(Debug)]
pub(crate) struct PauseRequest {
    state: oneshot::Sender<SourceState>,
    resumed: oneshot::Receiver<Infallible>,
}

/// A paused source, which resumes when this is dropped.
#[derive(Debug)]
pub(crate) struct PausedSource {
    _resumed: oneshot::Sender<Infallible>,
}

/// A handle of a source, and the requests that the source gets from it.
pub(crate) fn pauses() -> (SourceHandle, PauseRequests) {
    let (sender, receiver) = mpsc::channel(1);
    (SourceHandle(sender), PauseRequests(receiver))
}

impl SourceHandle {
    /// Waits until the source has finished its work in progress, and returns its state. `None` if
    /// the source has ended.
    pub(crate) async fn pause(&self) -> Option<(SourceState, PausedSource)> {
        let (state, received) = oneshot::channel();
        let (paused, resumed) = oneshot::channel();
        self.0.send(PauseRequest { state, resumed }).await.ok()?;
        Some((received.await.ok()?, PausedSource { _resumed: paused }))
    }
}

impl PauseRequests {
    /// Waits for a request. Cancel-safe.
    pub(crate) async fn next(&mut self) -> PauseRequest {
        match self.0.recv().await {
            Some(request) => request,
            None => std::future::pending().await,
        }
    }
}

impl PauseRequest {
    /// Waits until the pause is no longer requested. Cancel-safe.
    pub(crate) async fn withdrawn(&mut self) {
        self.state.closed().await;
    }

    /// Passes the state of the source, and waits until the source may continue.
    pub(crate) async fn pause(self, state: SourceState) {
        // Fails if the other process has failed meanwhile.
        self.state.send(state).ok();
        self.resumed.await.ok();
    }
}

/// A running source.
pub(crate) type SourceRun = Pin<Box<dyn Future<Output = SourceEnd> + Send>>;

/// The reason why a source ended.
#[derive(Debug, Error)]
#[error("the source of pods {source_name} has ended")]
pub(crate) struct SourceEnd {
    /// The setting of the source, such as `node.pods.cni`.
    pub(crate) source_name: &'static str,
    #[source]
    pub(crate) error: Box<dyn Error + Send + Sync>,
}

/// Reports whether the source delivers pods: a condition of the node's readiness.
#[derive(Clone)]
pub(crate) struct SourceHealth {
    report: Arc<dyn Fn(SourceReport) + Send + Sync>,
    #[cfg(test)]
    ready: Arc<std::sync::atomic::AtomicBool>,
}

impl Default for SourceHealth {
    /// Reports to nothing.
    fn default() -> Self {
        Self::new(|_| {})
    }
}

impl SourceHealth {
    /// Calls `report` with each report.
    pub(crate) fn new(report: impl Fn(SourceReport) + Send + Sync + 'static) -> Self {
        Self {
            report: Arc::new(report),
            #[cfg(test)]
            ready: Arc::default(),
        }
    }

    /// A source is ready when it is connected and has sent all pods, or has read its folder.
    pub(crate) fn set_ready(&self, ready: bool) {
        #[cfg(test)]
        self.ready.store(ready, std::sync::atomic::Ordering::Relaxed);
        (self.report)(SourceReport::Ready(ready));
    }

    /// Sets the problem of the source or of its pods; `None` if there is none.
    pub(crate) fn set_problem(&self, problem: Option<String>) {
        #[cfg(test)]
        self.ready.store(problem.is_none(), std::sync::atomic::Ordering::Relaxed);
        (self.report)(SourceReport::Problem(problem));
    }

    /// Sets information about the source, which readiness shows without being unready.
    pub(crate) fn set_notice(&self, notice: Option<String>) {
        (self.report)(SourceReport::Notice(notice));
    }

    #[cfg(test)]
    pub(crate) fn is_ready(&self) -> bool {
        self.ready.load(std::sync::atomic::Ordering::Relaxed)
    }
}

impl fmt::Debug for SourceHealth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SourceHealth").finish_non_exhaustive()
    }
}
