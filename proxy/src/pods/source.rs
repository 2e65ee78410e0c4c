//! What a source of pods is: it drives the registry's handle.

use std::error::Error;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use thiserror::Error;

use crate::pods::registry::PodRegistry;

/// A source of pods. It adds and removes pods in the registry.
pub(crate) trait PodSource: fmt::Debug + Send {
    /// Drives the registry until something ends it that only a restart can mend. Reconnects and
    /// reads again by itself. It is cancelled when the daemon stops.
    fn run(self: Box<Self>, registry: PodRegistry, health: SourceHealth) -> SourceRun;
}

/// A running source.
pub(crate) type SourceRun = Pin<Box<dyn Future<Output = SourceEnd> + Send>>;

/// Why a source ended.
#[derive(Debug, Error)]
#[error("the source of pods {source_name} has ended")]
pub(crate) struct SourceEnd {
    /// The setting of the source, such as `node.pods.cni`.
    pub(crate) source_name: &'static str,
    #[source]
    pub(crate) error: Box<dyn Error + Send + Sync>,
}

/// Whether the source delivers pods; a condition of the node's readiness. False at first. Clones
/// share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct SourceHealth(Arc<AtomicBool>);

impl SourceHealth {
    /// Connected and synchronized, or the folder is read.
    pub(crate) fn set_ready(&self, ready: bool) {
        self.0.store(ready, Relaxed);
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.0.load(Relaxed)
    }
}
