//! The interface of a source of pods.

use std::error::Error;
use std::fmt;
use std::pin::Pin;

use thiserror::Error;

use crate::admin::endpoints::Readiness;
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

/// Whether the source delivers pods: a condition of the node's readiness. Clones share the state.
#[derive(Debug, Clone)]
pub(crate) struct SourceHealth(Readiness);

impl Default for SourceHealth {
    /// Starts as unhealthy.
    fn default() -> Self {
        Self::new(Readiness::for_node())
    }
}

impl SourceHealth {
    /// Reports to `readiness`.
    pub(crate) fn new(readiness: Readiness) -> Self {
        Self(readiness)
    }

    /// A source is ready when it is connected and has sent all pods, or has read its folder.
    pub(crate) fn set_ready(&self, ready: bool) {
        self.0.source_ready(ready);
    }

    /// Sets the problem of the source or of its pods; `None` if there is none.
    pub(crate) fn set_problem(&self, problem: Option<String>) {
        self.0.source_problem(problem);
    }

    /// Sets information about the source, which readiness shows without being unready.
    pub(crate) fn set_notice(&self, notice: Option<String>) {
        self.0.source_notice(notice);
    }

    #[cfg(test)]
    pub(crate) fn is_ready(&self) -> bool {
        self.0.is_source_ready()
    }
}
