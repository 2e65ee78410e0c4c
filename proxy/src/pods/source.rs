//! The interface of a source of pods.

use std::error::Error;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use thiserror::Error;

use crate::admin::endpoints::SourceReport;
use crate::pods::registry::PodRegistry;

/// A source of pods, which adds and removes pods in the registry.
pub(crate) trait PodSource: fmt::Debug + Send {
    /// Adds and removes pods until a failure that only a restart can remedy. Retries other
    /// failures. Cancelled when the daemon stops.
    fn run(self: Box<Self>, registry: PodRegistry, health: SourceHealth) -> SourceRun;
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
