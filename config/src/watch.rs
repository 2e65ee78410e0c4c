//! Watches files, and the documents of folders, for changes of their content.
//!
//! Every way to replace a file is noticed: written in place, renamed over, added, removed, or
//! reached through symbolic links that are swapped, as Kubernetes does with a ConfigMap. The folders
//! on the way to each file are watched, not the file: a watch on a file stays with the old one when
//! a new one takes its name.
//!
//! A process has one [`FileWatcher`]: a user may have 128 inotify instances by default.

pub(crate) mod files;
mod hub;
mod relevant;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use self::hub::{Hub, Subscription};
use crate::error::ConfigErrors;

/// For how long a file that is replaced again and again is not read.
const MAX_SETTLE: Duration = Duration::from_secs(1);
/// How often to look without an event: some file systems send none (NFS, FUSE), and a watch can get
/// lost.
const LOOK: Duration = Duration::from_secs(30);

/// Watches files with one inotify instance, which is opened for the first of them. Cheap to clone;
/// clones share the instance.
#[derive(Debug, Clone, Default)]
pub struct FileWatcher(Arc<Hub>);

/// Reports when the content of a file, or of the documents in a folder, has changed.
#[derive(Debug)]
pub struct FileWatch {
    path: PathWatch,
    /// Of the content at the last look.
    seen: u64,
}

/// Reports when the content of a path may have changed.
#[derive(Debug)]
pub(crate) struct PathWatch {
    path: PathBuf,
    subscription: Subscription,
    /// When to look next.
    look_at: Instant,
    /// When to look at the latest, since the first event after the last look.
    settled_by: Option<Instant>,
}

impl FileWatcher {
    /// Watches `path`, which need not exist yet. Its content now counts as known, so watch it before
    /// reading it.
    ///
    /// # Errors
    /// When the kernel has no more watches to give, or the folder cannot be read.
    pub fn watch(&self, path: &Path) -> Result<FileWatch, ConfigErrors> {
        let path = self.watch_path(path)?;
        Ok(FileWatch { seen: files::fingerprint(&path.path), path })
    }

    /// As [`FileWatcher::watch`], without reading it.
    pub(crate) fn watch_path(&self, path: &Path) -> Result<PathWatch, ConfigErrors> {
        self.subscribe(path).map_err(|error| {
            let reason = format!(
                "{}: cannot be watched for changes: {error} (a limit may be too low: \
                 fs.inotify.max_user_instances, fs.inotify.max_user_watches)",
                path.display()
            );
            ConfigErrors::one(reason, None)
        })
    }

    fn subscribe(&self, path: &Path) -> io::Result<PathWatch> {
        let path = std::path::absolute(path)?;
        let subscription = self.0.subscribe(&path)?;
        Ok(PathWatch { path, subscription, look_at: Instant::now() + LOOK, settled_by: None })
    }
}

impl FileWatch {
    /// Waits until the content differs from that of the last time and no further change follows for
    /// a moment. Several changes in a row are reported once. Cancel safe.
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

impl PathWatch {
    /// Waits until the content may have changed and no event has come for a moment, at most
    /// [`MAX_SETTLE`] after the first. Cancel safe.
    pub(crate) async fn settled(&mut self) {
        loop {
            tokio::select! {
                pause = self.subscription.event() => {
                    let now = Instant::now();
                    let by = *self.settled_by.get_or_insert(now + MAX_SETTLE);
                    self.look_at = by.min(now + pause);
                }
                () = sleep_until(self.look_at) => {
                    self.look_at = Instant::now() + LOOK;
                    self.settled_by = None;
                    // A folder that cannot be watched now is tried again at the next look.
                    self.subscription.follow().ok();
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
