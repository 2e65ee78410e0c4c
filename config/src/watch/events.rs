//! Events of folders, with which the watcher detects changed files. The interception crate
//! implements them with inotify(7).

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

/// Opens a source of events. A [`FileWatcher`](crate::FileWatcher) calls it for the first file.
pub type OpenFolderEvents = dyn Fn() -> io::Result<Arc<dyn FolderEvents>> + Send + Sync;

/// Reports changes of the entries of folders.
pub trait FolderEvents: fmt::Debug + Send + Sync {
    /// Starts to watch the folder at `path`. A folder has one watch, also if several paths lead to
    /// it.
    ///
    /// # Errors
    /// The limit of watches is reached, or there is no readable folder at `path`.
    fn watch(&self, path: &Path) -> io::Result<FolderWatch>;

    /// Ends a watch, unless the removal of the folder has already ended it.
    fn unwatch(&self, watch: FolderWatch);

    /// Reads all queued events without waiting.
    fn read(&self, report: &mut dyn FnMut(FolderEvent<'_>));

    /// Waits until events are queued. Cancel-safe.
    ///
    /// # Errors
    /// No later event will be reported.
    fn queued(&self) -> Pin<Box<dyn Future<Output = io::Result<()>> + Send + '_>>;
}

/// The number of a watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FolderWatch(pub i32);

/// An event of a watched folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FolderEvent<'a> {
    /// An entry of the folder changed, or the folder itself if `name` is `None`.
    Changed {
        /// The watch of the folder.
        watch: FolderWatch,
        /// The name of the entry.
        name: Option<&'a OsStr>,
        /// The progress of the change.
        step: ChangeStep,
    },
    /// Events of any folder may be missing, because the queue was full.
    Lost,
}

/// The progress of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeStep {
    /// A file is being written. `Complete` follows when it is closed.
    Writing,
    /// A file was closed, renamed, linked or removed.
    Complete,
}
