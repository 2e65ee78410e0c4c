//! Following a file, or the documents in a folder, whoever replaces them and however: written in place, renamed over, added,
//! removed, or reached through symbolic links that are swapped, as Kubernetes does with the files of a ConfigMap.
//!
//! Not here: what the files mean. Whoever is woken reads them anew.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use notify::event::{AccessKind, AccessMode, CreateKind, ModifyKind};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use crate::{ConfigErrors, files};

/// How long it must have been quiet while a file is being written: to write is to empty it, to fill it and to close it.
const WRITING: Duration = Duration::from_millis(100);
/// The same once it is closed, or after what is done in one step (renamed, removed): others may follow it.
const WRITTEN: Duration = Duration::from_millis(10);
/// How long whoever replaces without end can keep us from looking.
const MAX_SETTLE: Duration = Duration::from_secs(1);
/// How often to look without being told: some file systems tell nothing (NFS, FUSE), and a watch can get lost.
const LOOK: Duration = Duration::from_secs(30);
/// The kernel follows no more links either (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// Tells when the content of a file, or of the documents in a folder, has changed.
#[derive(Debug)]
pub struct FileWatch {
    watch: Watch,
    /// What there was at the last look.
    seen: u64,
}

impl FileWatch {
    /// Begins to watch what is at `path`, which need not exist yet. What is there now counts as known, so begin to watch
    /// before reading it.
    ///
    /// # Errors
    /// When the kernel has no more watches to give, or the folder cannot be read.
    pub fn new(path: &Path) -> Result<Self, ConfigErrors> {
        let watch = Watch::new(path)?;
        Ok(Self { seen: files::fingerprint(&watch.path), watch })
    }

    /// Waits until the content is another one than the last time, and has been for a moment. Several changes in a row are
    /// told once. Cancel safe.
    pub async fn changed(&mut self) {
        loop {
            self.watch.look().await;
            let now = files::fingerprint(&self.watch.path);
            if now != self.seen {
                self.seen = now;
                return;
            }
        }
    }
}

/// Tells when it is time to look whether something has changed.
///
/// The folders on the way to each file are watched, not the file: a watch on a file stays with the old one when a new one
/// takes its name.
#[derive(Debug)]
pub(crate) struct Watch {
    path: PathBuf,
    /// The folders that are watched.
    folders: BTreeSet<PathBuf>,
    watcher: RecommendedWatcher,
    told: Arc<Told>,
    /// When to look next.
    look_at: Instant,
    /// When to look at the latest, since something happened.
    settled_by: Option<Instant>,
}

/// Something happened that can lead to other content.
#[derive(Debug, Default)]
struct Told {
    notify: Notify,
    /// What counts. Others may write in the same folders, such as a log.
    relevant: Mutex<Relevant>,
    /// Whether the last that happened was that something is being written, and is not finished.
    writing: AtomicBool,
}

impl Told {
    fn tell(&self, event: notify::Result<Event>) {
        // What the kernel could not tell, or had to leave out, may be anything.
        let event = event.unwrap_or_default();
        if !is_reading(event.kind) && self.relevant().has(&event.paths) {
            self.writing.store(is_writing(event.kind), Relaxed);
            self.notify.notify_one();
        }
    }

    fn relevant(&self) -> MutexGuard<'_, Relevant> {
        self.relevant.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long to wait for more.
    fn pause(&self) -> Duration {
        if self.writing.load(Relaxed) { WRITING } else { WRITTEN }
    }
}

impl Watch {
    /// As [`FileWatch::new`].
    pub(crate) fn new(path: &Path) -> Result<Self, ConfigErrors> {
        Self::begin(path).map_err(|error| {
            let reason = format!(
                "{}: cannot be watched for changes: {error} (a limit may be too low: \
                 fs.inotify.max_user_instances, fs.inotify.max_user_watches)",
                path.display()
            );
            ConfigErrors::one(reason, None)
        })
    }

    fn begin(path: &Path) -> notify::Result<Self> {
        let told = Arc::new(Told::default());
        let teller = told.clone();
        let watcher = notify::recommended_watcher(move |event| teller.tell(event))?;
        let mut watch = Self {
            path: std::path::absolute(path)?,
            folders: BTreeSet::new(),
            watcher,
            told,
            look_at: Instant::now() + LOOK,
            settled_by: None,
        };
        watch.follow()?;
        Ok(watch)
    }

    /// Waits until something may have changed and has been quiet for a moment, though not for ever. Cancel safe.
    pub(crate) async fn look(&mut self) {
        loop {
            tokio::select! {
                () = self.told.notify.notified() => {
                    let now = Instant::now();
                    let by = *self.settled_by.get_or_insert(now + MAX_SETTLE);
                    self.look_at = by.min(now + self.told.pause());
                }
                () = sleep_until(self.look_at) => {
                    self.look_at = Instant::now() + LOOK;
                    self.settled_by = None;
                    // What cannot be watched now is tried again at the next look.
                    self.follow().ok();
                    return;
                }
            }
        }
    }

    /// Watches the folders that lead to the files now, and no others.
    fn follow(&mut self) -> notify::Result<()> {
        loop {
            let relevant = Relevant::of(&self.path);
            let folders = relevant.folders();
            *self.told.relevant() = relevant;
            for folder in &folders {
                // Also a folder that is watched: another may have taken its name.
                self.watcher.watch(folder, RecursiveMode::NonRecursive)?;
            }
            let before = std::mem::replace(&mut self.folders, folders);
            for gone in before.difference(&self.folders) {
                // Its watch is gone already if the folder itself is.
                self.watcher.unwatch(gone).ok();
            }
            // What was swapped before its folder was watched was not told.
            if before == self.folders {
                return Ok(());
            }
        }
    }
}

/// Whether an event tells of reading only, as our own is told too.
fn is_reading(kind: EventKind) -> bool {
    matches!(kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write))
}

/// Whether an event is part of writing a file, whose end is told too: that it is closed.
fn is_writing(kind: EventKind) -> bool {
    matches!(
        kind,
        EventKind::Create(CreateKind::File)
            | EventKind::Modify(ModifyKind::Data(_) | ModifyKind::Metadata(_))
    )
}

/// Where a change can lead to other content.
#[derive(Debug, Default)]
struct Relevant {
    /// The files, and each symbolic link on the way to them; where a way ends early, the first that is missing.
    turns: BTreeSet<PathBuf>,
    /// The folder of which every document counts.
    folder: Option<PathBuf>,
}

impl Relevant {
    fn of(path: &Path) -> Self {
        if !path.is_dir() {
            return Self { turns: turns(path), folder: None };
        }
        // Also without a document in it: the way to any name in the folder leads through the folder.
        let mut turns_to_all = turns(&path.join("any"));
        let folder = turns_to_all.iter().find(|turn| turn.ends_with("any"));
        let folder = folder.and_then(|any| any.parent()).map(Path::to_owned);
        for document in files::at(path).unwrap_or_default() {
            turns_to_all.append(&mut turns(&document));
        }
        Self { turns: turns_to_all, folder }
    }

    /// The folders in which all that happens.
    fn folders(&self) -> BTreeSet<PathBuf> {
        let parents = self.turns.iter().filter_map(|turn| turn.parent());
        parents.map(Path::to_owned).collect()
    }

    fn has(&self, paths: &[PathBuf]) -> bool {
        let is_document =
            |path: &Path| self.folder.as_deref() == path.parent() && files::is_document(path);
        // A folder itself is told of when it goes.
        let is_folder = |path: &Path| self.turns.iter().any(|turn| turn.parent() == Some(path));
        paths.is_empty()
            || paths
                .iter()
                .any(|path| self.turns.contains(path) || is_document(path) || is_folder(path))
    }
}

/// Where a change can lead to another file at `path` (absolute): the file, and each symbolic link on the way to it; where the
/// way ends early, what is missing.
fn turns(path: &Path) -> BTreeSet<PathBuf> {
    let mut turns = BTreeSet::new();
    let mut links = 0;
    let mut here = PathBuf::from("/");
    let mut ahead = steps(path);
    while let Some(step) = ahead.pop() {
        if step == ".." {
            // `here` has no links in it, so that the folder above it is its parent.
            here.pop();
            continue;
        }
        let next = here.join(step);
        if let Ok(target) = next.read_link() {
            turns.insert(next);
            links += 1;
            if links > MAX_LINKS {
                break;
            }
            ahead.extend(steps(&target));
        } else if ahead.is_empty() || !next.is_dir() {
            turns.insert(next);
            break;
        } else {
            here = next;
        }
    }
    turns
}

/// The components of a path, the last one first.
fn steps(path: &Path) -> Vec<OsString> {
    let steps = path.components().rev().filter(|step| *step != Component::CurDir);
    steps.map(|step| step.as_os_str().to_owned()).collect()
}

#[cfg(test)]
mod tests;
