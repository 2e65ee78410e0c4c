//! One source of events for all watched paths, and the task that reads it.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::events::{ChangeStep, FolderEvent, FolderEvents, FolderWatch, OpenFolderEvents};
use super::relevant::{FilesOfFolder, RelevantEntries};

/// The quiet period before reading a file that is being written: a program creates, fills and
/// closes it.
const QUIET_WHILE_WRITING: Duration = Duration::from_millis(100);
/// The quiet period after a file was closed, renamed or removed: further changes may follow.
const QUIET_AFTER_WRITE: Duration = Duration::from_millis(10);

/// Distributes the events to the subscriptions.
#[derive(Default)]
pub(super) struct Hub {
    /// Opens the source of events. Without it, files are only polled.
    open: Option<Box<OpenFolderEvents>>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The source of events, opened with the first subscription.
    events: Option<Arc<dyn FolderEvents>>,
    reader: Option<JoinHandle<()>>,
    subscriptions: BTreeMap<u64, SubscriptionWatches>,
    next: u64,
}

/// The watches of one subscription.
#[derive(Debug)]
struct SubscriptionWatches {
    path: PathBuf,
    kind: FilesOfFolder,
    relevant: RelevantEntries,
    folders: BTreeMap<PathBuf, FolderWatch>,
    /// Sends the quiet period that each event requires.
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
    /// Creates a hub with the source of events that `open` opens.
    pub(super) fn new(open: Box<OpenFolderEvents>) -> Self {
        Self { open: Some(open), state: Mutex::default() }
    }

    /// Starts to watch the folders that lead to the absolute `path`.
    pub(super) fn subscribe(
        self: &Arc<Self>,
        path: &Path,
        kind: FilesOfFolder,
    ) -> io::Result<Subscription> {
        let mut state = self.state();
        if let (None, Some(open)) = (&state.events, &self.open) {
            state.events = Some(open()?);
        }
        let (sender, pauses) = watch::channel(QUIET_AFTER_WRITE);
        let (path, id) = (path.to_owned(), state.next);
        let (relevant, folders) = (RelevantEntries::default(), BTreeMap::new());
        let watches = SubscriptionWatches { path, kind, relevant, folders, pauses: sender };
        state.next += 1;
        state.subscriptions.insert(id, watches);
        // Dropping the subscription after an error removes its watches.
        let subscription = Subscription { hub: self.clone(), id, pauses };
        let followed = state.follow(id);
        drop(state);
        followed.map(|()| subscription)
    }

    /// Starts the task that reads the events if it does not run, also after a panic. It ends with
    /// the hub.
    fn start_reader(self: &Arc<Self>) {
        let mut state = self.state();
        if state.reader.as_ref().is_some_and(|reader| !reader.is_finished()) {
            return;
        }
        if let Some(events) = state.events.clone() {
            state.reader = Some(tokio::spawn(read(Arc::downgrade(self), events)));
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        if let Some(reader) = self.state().reader.take() {
            reader.abort();
        }
    }
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub").field("state", &self.state).finish_non_exhaustive()
    }
}

/// Reads events until they end. Polling still detects changes afterwards.
async fn read(hub: Weak<Hub>, events: Arc<dyn FolderEvents>) {
    while events.queued().await.is_ok() {
        let Some(hub) = hub.upgrade() else { return };
        hub.state().distribute(&*events);
    }
}

impl State {
    /// Reads all queued events. Holding the lock ensures that the watches of these events are
    /// registered.
    fn distribute(&self, events: &dyn FolderEvents) {
        events.read(&mut |event| {
            let is_writing =
                matches!(event, FolderEvent::Changed { step: ChangeStep::Writing, .. });
            let pause = if is_writing { QUIET_WHILE_WRITING } else { QUIET_AFTER_WRITE };
            for watches in
                self.subscriptions.values().filter(|watches| watches.is_affected_by(event))
            {
                watches.pauses.send_replace(pause);
            }
        });
    }

    /// Watches the folders that now lead to the files of a subscription, and no others.
    fn follow(&mut self, id: u64) -> io::Result<()> {
        let Some(events) = self.events.clone() else { return Ok(()) };
        loop {
            let Some(watches) = self.subscriptions.get_mut(&id) else { return Ok(()) };
            watches.relevant = RelevantEntries::new(&watches.path, watches.kind);
            let mut folders = BTreeMap::new();
            for folder in watches.relevant.folders() {
                // Watch known folders again: another folder may have taken the name.
                match events.watch(&folder) {
                    Ok(watch) => folders.insert(folder, watch),
                    Err(error) => {
                        self.unwatch(&*events, &folders);
                        return Err(error);
                    }
                };
            }
            if folders == watches.folders {
                return Ok(());
            }
            // A folder that was replaced before its watch began sent no event, so resolve the path
            // again.
            let before = std::mem::replace(&mut watches.folders, folders);
            self.unwatch(&*events, &before);
        }
    }

    /// Removes the watches that no subscription needs.
    fn unwatch(&self, events: &dyn FolderEvents, folders: &BTreeMap<PathBuf, FolderWatch>) {
        for watch in folders.values() {
            let mut needed = self.subscriptions.values().flat_map(|other| other.folders.values());
            if !needed.any(|other| other == watch) {
                events.unwatch(*watch);
            }
        }
    }
}

impl SubscriptionWatches {
    fn is_affected_by(&self, event: FolderEvent<'_>) -> bool {
        let FolderEvent::Changed { watch, name, .. } = event else { return true };
        self.folders.iter().any(|(folder, own)| {
            *own == watch && name.is_none_or(|name| self.relevant.has(&folder.join(name)))
        })
    }
}

impl Subscription {
    /// Waits for an event that can change the content. Returns the time to wait for further ones.
    /// Cancel-safe.
    pub(super) async fn event(&mut self) -> Duration {
        self.hub.start_reader();
        if self.pauses.changed().await.is_err() {
            // The hub keeps the sender while the subscription exists.
            return std::future::pending().await;
        }
        *self.pauses.borrow_and_update()
    }

    /// Watches the folders that now lead to the files, and no others.
    pub(super) fn follow(&self) -> io::Result<()> {
        self.hub.state().follow(self.id)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut state = self.hub.state();
        let watches = state.subscriptions.remove(&self.id);
        if let (Some(watches), Some(events)) = (watches, &state.events) {
            state.unwatch(&**events, &watches.folders);
        }
    }
}
