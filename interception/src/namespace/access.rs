//! A namespace together with the thread that runs operations in it: what a caller holds instead of
//! being in the namespace.
//!
//! Not here: how a namespace is entered (`thread.rs`).

use std::io;

use super::{Entered, Namespace, NamespaceThread};
use crate::InterceptionError;

/// One namespace, and the thread that runs operations in it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct NamespaceAccess {
    namespace: Namespace,
    thread: NamespaceThread,
}

impl NamespaceAccess {
    /// Operations in `namespace`, run by `thread`.
    #[must_use]
    pub fn new(namespace: Namespace, thread: NamespaceThread) -> Self {
        Self { namespace, thread }
    }

    /// The calling thread's namespace, with a thread of its own, which has the caller's
    /// capabilities.
    ///
    /// # Errors
    ///
    /// As of [`NamespaceThread::start`].
    pub fn current() -> io::Result<Self> {
        let namespace = Namespace::current().map_err(io::Error::other)?;
        Ok(Self::new(namespace, NamespaceThread::start(|| Ok(()))?))
    }

    /// Which namespace it is.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// The thread that runs the operations, of other namespaces too.
    #[must_use]
    pub fn thread(&self) -> &NamespaceThread {
        &self.thread
    }

    /// Runs `operation` in the namespace, as [`NamespaceThread::run`] does.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Namespace`].
    pub async fn run<T, F>(&self, operation: F) -> Result<T, InterceptionError>
    where
        F: AsyncFnOnce(&Entered) -> T + Send + 'static,
        T: Send + 'static,
    {
        self.thread.run(&self.namespace, operation).await
    }

    /// Waits for the end of every operation that was started before, also of those whose callers
    /// have stopped waiting.
    pub async fn finish(&self) {
        // An error means that the thread has ended, and all operations with it.
        self.thread.run(&self.namespace, async |_| ()).await.ok();
    }
}
