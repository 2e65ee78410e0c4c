//! Watches files, and the documents of folders, for changes of their content.
//!
//! Every replacement of a file is detected: written in place, renamed over, added, removed, or
//! reached through swapped symbolic links as in a ConfigMap. The folders on the path are watched
//! instead of the file, because a watch on a file follows the old inode after a rename.
//!
//! A process has one [`FileWatcher`], because by default a user may have only 128 inotify
//! instances.

pub(crate) mod events;
pub(crate) mod files;
mod hub;
mod relevant;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use self::events::FolderEvents;
use self::hub::{Hub, Subscription};
use self::relevant::FilesOfFolder;
use crate::error::{ConfigErrors, Reason};
use crate::ticks::next_multiple;

/// The maximum delay of a read while the file is replaced repeatedly.
const MAX_SETTLE_TIME: Duration = Duration::from_secs(1);
/// The polling interval without events: some file systems send none (NFS, FUSE), and a watch can be
/// lost.
const POLL_INTERVAL: Duration = Duration::from_secs(30);

/// Watches files with one source of events, which is opened with the first file. Clones share it.
/// The default has no source of events and polls.
#[derive(Debug, Clone, Default)]
pub struct FileWatcher(Arc<Hub>);

/// Reports when the content of a file, or of the documents in a folder, has changed.
#[derive(Debug)]
pub struct FileWatch {
    path: PathWatch,
    /// The hash of the content at the last check.
    seen: u64,
}

/// Reports when the content of a path may have changed.
#[derive(Debug)]
pub(crate) struct PathWatch {
    path: PathBuf,
    subscription: Subscription,
    /// The time of the next poll.
    check_at: Instant,
    /// The latest time of the next check, set by the first event after the last check.
    settled_by: Option<Instant>,
}

/// Reports when a file of a folder may have changed.
#[derive(Debug)]
pub struct FolderFilesWatch(PathWatch);

impl FileWatcher {
    /// Creates a watcher. `open` opens its source of events.
    pub fn new(
        open: impl Fn() -> io::Result<Arc<dyn FolderEvents>> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(Hub::new(Box::new(open))))
    }

    /// Watches `path`, which need not exist yet. The current content counts as known, so watch the
    /// path before reading it.
    ///
    /// # Errors
    /// The kernel's limit of watches is reached, or the folder cannot be read.
    pub fn watch(&self, path: &Path) -> Result<FileWatch, ConfigErrors> {
        let path = self.watch_path(path)?;
        Ok(FileWatch { seen: files::fingerprint(&path.path), path })
    }

    /// Like [`FileWatcher::watch`], without reading the content.
    pub(crate) fn watch_path(&self, path: &Path) -> Result<PathWatch, ConfigErrors> {
        self.watch_files(path, FilesOfFolder::Documents)
    }

    /// Watches every file of a folder that other programs write to.
    ///
    /// # Errors
    /// As [`FileWatcher::watch`].
    pub fn watch_folder(&self, folder: &Path) -> Result<FolderFilesWatch, ConfigErrors> {
        self.watch_files(folder, FilesOfFolder::All).map(FolderFilesWatch)
    }

    fn watch_files(&self, path: &Path, kind: FilesOfFolder) -> Result<PathWatch, ConfigErrors> {
        self.subscribe(path, kind).map_err(|error| {
            let reason = format!("{}: cannot be watched for changes: {error}", path.display());
            let hint =
                "raise the sysctls fs.inotify.max_user_instances and fs.inotify.max_user_watches";
            ConfigErrors::one(Reason::with_hint(reason, hint), None)
        })
    }

    fn subscribe(&self, path: &Path, kind: FilesOfFolder) -> io::Result<PathWatch> {
        let path = std::path::absolute(path)?;
        let subscription = self.0.subscribe(&path, kind)?;
        Ok(PathWatch {
            path,
            subscription,
            check_at: next_multiple(POLL_INTERVAL),
            settled_by: None,
        })
    }
}

impl FileWatch {
    /// Waits until the content differs from that of the last call and no further change follows for
    /// a moment. Reports consecutive changes once. Cancel-safe.
    pub async fn changed(&mut self) {
        loop {
            self.path.settled().await;
            let now = files::fingerprint(&self.path.path);
            if now != self.seen {
                self.seen = now;
                return;
            }
        }
    }
}

impl FolderFilesWatch {
    /// Waits until a file may have changed and no further change follows for a moment. Cancel-safe.
    pub async fn settled(&mut self) {
        self.0.settled().await;
    }
}

impl PathWatch {
    /// Waits until the content may have changed and no event follows for a moment, at most
    /// [`MAX_SETTLE_TIME`] after the first one. Cancel-safe.
    pub(crate) async fn settled(&mut self) {
        loop {
            tokio::select! {
                pause = self.subscription.event() => {
                    let now = Instant::now();
                    let by = *self.settled_by.get_or_insert(now + MAX_SETTLE_TIME);
                    self.check_at = by.min(now + pause);
                }
                () = sleep_until(self.check_at) => {
                    self.check_at = next_multiple(POLL_INTERVAL);
                    self.settled_by = None;
                    // The next poll retries watching folders that cannot be watched now.
                    self.subscription.follow().ok();
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
