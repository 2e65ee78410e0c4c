//! Files that others write: watched together, and warned of when too many can read them.
//!
//! Not here: what is in them (`pem`, `ca/clients.rs`).

use std::fs;
use std::future::poll_fn;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::task::Poll;

use underpass_config::{FileWatch, FileWatcher};

use crate::HboneError;

/// Files that are read together.
#[derive(Debug)]
pub(crate) struct WatchedFiles {
    watcher: FileWatcher,
    files: Vec<FileWatch>,
}

impl WatchedFiles {
    /// No file yet.
    pub(crate) fn none(watcher: &FileWatcher) -> Self {
        Self { watcher: watcher.clone(), files: Vec::new() }
    }

    /// Watches these files instead, from now on. Call it before they are read, so that no change is
    /// missed.
    ///
    /// # Errors
    /// [`HboneError::Watch`] for one that cannot be watched; then the former files stay watched.
    pub(crate) fn replace(
        &mut self,
        files: impl IntoIterator<Item = impl AsRef<Path>>,
    ) -> Result<(), HboneError> {
        let mut watched = Self::none(&self.watcher);
        for file in files {
            watched.add(file.as_ref())?;
        }
        *self = watched;
        Ok(())
    }

    /// Watches one more.
    ///
    /// # Errors
    /// [`HboneError::Watch`] if it cannot be watched.
    pub(crate) fn add(&mut self, file: &Path) -> Result<(), HboneError> {
        let watch = self.watcher.watch(file).map_err(|source| HboneError::Watch { source })?;
        self.files.push(watch);
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Waits until one of them has changed; for ever, if there is none. Cancel-safe.
    pub(crate) async fn changed(&mut self) {
        let mut changes: Vec<_> =
            self.files.iter_mut().map(|file| Box::pin(file.changed())).collect();
        poll_fn(|cx| {
            let changed = changes.iter_mut().any(|change| change.as_mut().poll(cx).is_ready());
            if changed { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}

/// Warns of a file with `secret` in it that others than its owner may read.
pub(crate) fn warn_if_exposed(file: &Path, secret: &str) -> Result<(), HboneError> {
    let metadata = fs::metadata(file).map_err(|error| HboneError::file(file, error))?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        let file = file.display();
        tracing::warn!(%file, mode = %format_args!("{mode:04o}"), "others may read {secret}: chmod 0600");
    }
    Ok(())
}
