//! Watches groups of files, and warns if other users can read a secret file.

use std::fs;
use std::future::poll_fn;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::task::Poll;

use underpass_config::{FileWatch, FileWatcher};

use crate::error::HboneError;

/// A group of files that are watched together.
#[derive(Debug)]
pub(crate) struct WatchedFiles {
    watcher: FileWatcher,
    files: Vec<FileWatch>,
}

impl WatchedFiles {
    /// Creates an empty group.
    pub(crate) fn none(watcher: &FileWatcher) -> Self {
        Self { watcher: watcher.clone(), files: Vec::new() }
    }

    /// Replaces the watched files. Call this before reading the files, so that no change is missed.
    ///
    /// # Errors
    /// [`HboneError::Watch`] for a file that cannot be watched; the previous group stays.
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

    /// Adds a file to the group.
    ///
    /// # Errors
    /// [`HboneError::Watch`] if the file cannot be watched.
    pub(crate) fn add(&mut self, file: &Path) -> Result<(), HboneError> {
        let watch = self.watcher.watch(file).map_err(|source| HboneError::Watch { source })?;
        self.files.push(watch);
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Waits for a change of any file in the group. Never returns for an empty group. Cancel-safe.
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
    if let Some(mode) = exposed_mode(file)? {
        let file = file.display();
        let mode = format_args!("{mode:04o}");
        tracing::warn!(%file, %mode, hint = "run chmod 0600", "other users can read {secret}");
    }
    Ok(())
}

/// The mode of the file, if users other than the owner can access it.
pub(crate) fn exposed_mode(file: &Path) -> Result<Option<u32>, HboneError> {
    let metadata = fs::metadata(file).map_err(|error| HboneError::file(file, error))?;
    let mode = metadata.permissions().mode() & 0o777;
    Ok((mode & 0o077 != 0).then_some(mode))
}
