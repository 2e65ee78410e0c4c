//! Events of folders by inotify(7), for the file watcher of the configuration.

use std::ffi::{CStr, OsStr};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use underpass_config::{ChangeStep, FolderEvent, FolderEvents, FolderWatch};

/// An inotify instance.
#[derive(Debug)]
pub struct Inotify(AsyncFd<OwnedFd>);

impl Inotify {
    /// Opens an instance, and registers it with the current tokio runtime.
    ///
    /// # Errors
    ///
    /// The error of the kernel. By default a user may have 128 instances.
    ///
    /// # Panics
    ///
    /// There is no current tokio runtime with I/O.
    pub fn open() -> io::Result<Arc<dyn FolderEvents>> {
        let instance = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        #[expect(
            deprecated,
            reason = "safe here: an OwnedFd's descriptor stays open and the same (tokio #8587)"
        )]
        let instance = AsyncFd::with_interest(instance, Interest::READABLE)?;
        Ok(Arc::new(Self(instance)))
    }
}

impl FolderEvents for Inotify {
    fn watch(&self, path: &Path) -> io::Result<FolderWatch> {
        Ok(FolderWatch(inotify::add_watch(self.0.get_ref(), path, watched_events())?))
    }

    fn unwatch(&self, FolderWatch(watch): FolderWatch) {
        // Fails if the folder was removed, which ended the watch.
        inotify::remove_watch(self.0.get_ref(), watch).ok();
    }

    fn read(&self, report: &mut dyn FnMut(FolderEvent<'_>)) {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(self.0.get_ref(), &mut buffer);
        while let Ok(event) = events.next() {
            let name = event.file_name().map(|name| OsStr::from_bytes(CStr::to_bytes(name)));
            if let Some(event) = convert_event(event.events(), FolderWatch(event.wd()), name) {
                report(event);
            }
        }
    }

    fn queued(&self) -> Pin<Box<dyn Future<Output = io::Result<()>> + Send + '_>> {
        Box::pin(async {
            // Clear readiness: the next call waits for a new event.
            self.0.readable().await?.clear_ready();
            Ok(())
        })
    }
}

/// The events after which a file's content may have changed. MODIFY is not one of them: CLOSE_WRITE
/// follows it, and each line of a log in the same folder would wake the reader.
fn watched_events() -> WatchFlags {
    WatchFlags::CREATE
        | WatchFlags::CLOSE_WRITE
        | WatchFlags::ATTRIB
        | WatchFlags::MOVE
        | WatchFlags::DELETE
        | WatchFlags::MOVE_SELF
        | WatchFlags::DELETE_SELF
        | WatchFlags::ONLYDIR
}

/// Converts an event. `None` for IGNORED, which only confirms the end of a watch.
fn convert_event(
    flags: ReadFlags,
    watch: FolderWatch,
    name: Option<&OsStr>,
) -> Option<FolderEvent<'_>> {
    if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
        return Some(FolderEvent::Lost);
    }
    let writes = flags.contains(ReadFlags::ATTRIB)
        || flags.contains(ReadFlags::CREATE) && !flags.contains(ReadFlags::ISDIR);
    let step = if writes { ChangeStep::Writing } else { ChangeStep::Complete };
    (!flags.contains(ReadFlags::IGNORED)).then_some(FolderEvent::Changed { watch, name, step })
}

#[cfg(test)]
mod tests;
