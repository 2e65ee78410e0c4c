//! Watches groups of files, and warns of files with secrets that other users can read.

use std::fs;
use std::future::poll_fn;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::task::Poll;

use underpass_config::{FileWatch, FileWatcher};

use crate::error::HboneError;

/// A group of watched files.
#[derive(Debug)]
pub(crate) struct WatchedFiles {
    watcher: FileWatcher,
    files: Vec<FileWatch>,
}

impl WatchedFiles {
    /// An empty group.
    pub(crate) fn none(watcher: &FileWatcher) -> Self {
        Self { watcher: watcher.clone(), files: Vec::new() }
    }

    /// Replaces the group by these files. Call it before reading them, so that no change is missed.
    ///
    /// # Errors
    /// [`HboneError::Watch`] for a file that cannot be watched; the previous group then stays.
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

    /// Watches another file.
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

    /// Waits for a change of any file; forever if there are none. Cancel-safe.
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

/// Logs a warning if users other than the owner can read a file that contains `secret`.
pub(crate) fn warn_if_exposed(file: &Path, secret: &str) -> Result<(), HboneError> {
    let metadata = fs::metadata(file).map_err(|error| HboneError::file(file, error))?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        let file = file.display();
        let mode = format_args!("{mode:04o}");
        tracing::warn!(%file, %mode, hint = "run chmod 0600", "other users can read {secret}");
    }
    Ok(())
}
