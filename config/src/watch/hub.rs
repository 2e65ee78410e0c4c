//! One inotify instance for all watched paths, and the task that reads its events.
//!
//! A folder on several paths is watched once: inotify has one watch per inode.

use std::collections::BTreeMap;
use std::ffi::{CStr, OsStr};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::relevant::Relevant;

/// Quiet period before reading a file that is being written: a writer creates, fills and closes it.
pub(super) const WRITING: Duration = Duration::from_millis(100);
/// Quiet period after a file is closed, renamed or removed: further changes may follow.
pub(super) const WRITTEN: Duration = Duration::from_millis(10);

/// Distributes the events of the inotify instance.
#[derive(Debug, Default)]
pub(super) struct Hub(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Opened with the first subscription.
    inotify: Option<Arc<OwnedFd>>,
    reader: Option<JoinHandle<()>>,
    subscriptions: BTreeMap<u64, Watched>,
    next: u64,
}

/// The watches of one subscription.
#[derive(Debug)]
struct Watched {
    path: PathBuf,
    relevant: Relevant,
    /// The watched folders, and the kernel's descriptor of each watch.
    folders: BTreeMap<PathBuf, i32>,
    /// Sends the quiet period after each event.
    pauses: watch::Sender<Duration>,
}

/// Receives the events of one path.
#[derive(Debug)]
pub(super) struct Subscription {
    hub: Arc<Hub>,
    id: u64,
    pauses: watch::Receiver<Duration>,
}

impl Hub {
    /// Watches the folders that lead to `path`, which is absolute, from now on.
    pub(super) fn subscribe(self: &Arc<Self>, path: &Path) -> io::Result<Subscription> {
        let mut state = self.state();
        let inotify = match &state.inotify {
            Some(inotify) => inotify.clone(),
            None => {
                let flags = CreateFlags::NONBLOCK | CreateFlags::CLOEXEC;
                state.inotify.insert(Arc::new(inotify::init(flags)?)).clone()
            }
        };
        let (sender, pauses) = watch::channel(WRITTEN);
        let (path, id) = (path.to_owned(), state.next);
        let (relevant, folders) = (Relevant::default(), BTreeMap::new());
        let watched = Watched { path, relevant, folders, pauses: sender };
        state.next += 1;
        state.subscriptions.insert(id, watched);
        // Dropping it after an error removes its watches.
        let subscription = Subscription { hub: self.clone(), id, pauses };
        let followed = state.follow(&inotify, id);
        drop(state);
        followed.map(|()| subscription)
    }

    /// Starts the task that reads the events, unless it runs. It ends with the hub.
    fn start_reader(self: &Arc<Self>) {
        let mut state = self.state();
        if state.reader.as_ref().is_some_and(|reader| !reader.is_finished()) {
            return;
        }
        if let Some(inotify) = state.inotify.clone() {
            state.reader = Some(tokio::spawn(read(Arc::downgrade(self), inotify)));
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        if let Some(reader) = self.state().reader.take() {
            reader.abort();
        }
    }
}

async fn read(hub: Weak<Hub>, inotify: Arc<OwnedFd>) {
    #[expect(
        deprecated,
        reason = "its successor is `unsafe`, for what closes its descriptor too early; this one owns a share of it"
    )]
    let Ok(inotify) = AsyncFd::with_interest(inotify, Interest::READABLE) else {
        // Polling still detects changes.
        return;
    };
    while let Ok(mut ready) = inotify.readable().await {
        let Some(hub) = hub.upgrade() else { return };
        hub.state().distribute(inotify.get_ref());
        ready.clear_ready();
    }
}

impl State {
    /// Reads all queued events. Holds the lock, so that the watches of these events are registered
    /// already.
    fn distribute(&self, inotify: &OwnedFd) {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(inotify, &mut buffer);
        while let Ok(event) = events.next() {
            let pause = if is_writing(event.events()) { WRITING } else { WRITTEN };
            for watched in self.subscriptions.values().filter(|watched| watched.concerns(&event)) {
                watched.pauses.send_replace(pause);
            }
        }
    }

    /// Updates the watches of a subscription to the folders that lead to its files now.
    fn follow(&mut self, inotify: &OwnedFd, id: u64) -> io::Result<()> {
        loop {
            let Some(watched) = self.subscriptions.get_mut(&id) else { return Ok(()) };
            watched.relevant = Relevant::of(&watched.path);
            let mut folders = BTreeMap::new();
            for folder in watched.relevant.folders() {
                // Add known folders too: another folder may have taken the name.
                match inotify::add_watch(inotify, &folder, watched_events()) {
                    Ok(watch) => folders.insert(folder, watch),
                    Err(error) => {
                        self.unwatch(inotify, &folders);
                        return Err(error.into());
                    }
                };
            }
            if folders == watched.folders {
                return Ok(());
            }
            // A folder that was replaced before its watch began sent no event: resolve the path
            // again.
            let before = std::mem::replace(&mut watched.folders, folders);
            self.unwatch(inotify, &before);
        }
    }

    /// Removes the watches that no subscription needs.
    fn unwatch(&self, inotify: &OwnedFd, folders: &BTreeMap<PathBuf, i32>) {
        for watch in folders.values() {
            let mut needed = self.subscriptions.values().flat_map(|other| other.folders.values());
            if !needed.any(|other| other == watch) {
                // Fails if the folder was removed, which ended the watch.
                inotify::remove_watch(inotify, *watch).ok();
            }
        }
    }
}

impl Watched {
    fn concerns(&self, event: &inotify::Event<'_>) -> bool {
        let (kind, name) = (event.events(), event.file_name().map(CStr::to_bytes));
        // After an overflow, the lost events may concern any path. IGNORED follows the event that
        // ended a watch.
        kind.contains(ReadFlags::QUEUE_OVERFLOW)
            || !kind.contains(ReadFlags::IGNORED)
                && self.folders.iter().any(|(folder, watch)| {
                    *watch == event.wd()
                        && name.is_none_or(|name| {
                            self.relevant.has(&folder.join(OsStr::from_bytes(name)))
                        })
                })
    }
}

impl Subscription {
    /// Waits for an event that can change the content; returns how long to wait for further ones.
    /// Cancel-safe.
    pub(super) async fn event(&mut self) -> Duration {
        self.hub.start_reader();
        if self.pauses.changed().await.is_err() {
            // The hub keeps the sender while the subscription lives.
            return std::future::pending().await;
        }
        *self.pauses.borrow_and_update()
    }

    /// Updates the watches to the folders that lead to the files now.
    pub(super) fn follow(&self) -> io::Result<()> {
        let mut state = self.hub.state();
        match state.inotify.clone() {
            Some(inotify) => state.follow(&inotify, self.id),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
impl Subscription {
    pub(super) fn folders(&self) -> Vec<PathBuf> {
        self.hub.state().subscriptions[&self.id].folders.keys().cloned().collect()
    }

    /// Removes the watches in the kernel, as remounting a file system does.
    pub(super) fn lose_watches(&self) {
        let state = self.hub.state();
        let inotify = state.inotify.as_ref().unwrap();
        for watch in state.subscriptions[&self.id].folders.values() {
            inotify::remove_watch(inotify, *watch).unwrap();
        }
    }

    /// Number of bytes of events that the kernel has queued.
    pub(super) fn pending_events(&self) -> usize {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let inotify = self.hub.state().inotify.clone().unwrap();
        let mut events = inotify::Reader::new(&*inotify, &mut buffer);
        std::iter::from_fn(|| events.next().ok().map(drop)).count()
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut state = self.hub.state();
        let watched = state.subscriptions.remove(&self.id);
        if let (Some(watched), Some(inotify)) = (watched, state.inotify.as_ref()) {
            state.unwatch(inotify, &watched.folders);
        }
    }
}

/// The events that can change the content. Not MODIFY: CLOSE_WRITE follows it, and each line of a
/// log in the same folder would wake the reader.
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

/// Whether an event is part of a write, which CLOSE_WRITE ends.
fn is_writing(event: ReadFlags) -> bool {
    event.contains(ReadFlags::ATTRIB)
        || event.contains(ReadFlags::CREATE) && !event.contains(ReadFlags::ISDIR)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pause_is_long_while_a_file_is_written_and_short_after_one_step() {
        for (event, writing) in [
            (ReadFlags::CREATE, true),
            (ReadFlags::CREATE | ReadFlags::ISDIR, false),
            (ReadFlags::ATTRIB, true),
            (ReadFlags::CLOSE_WRITE, false),
            (ReadFlags::MOVED_TO, false),
            (ReadFlags::DELETE, false),
        ] {
            assert_eq!(is_writing(event), writing, "{event:?}");
        }
    }
}
