//! Following a file, or the documents in a folder, whoever replaces them and however: written in place, renamed over, added,
//! removed, or reached through symbolic links that are swapped, as Kubernetes does with the files of a ConfigMap.
//!
//! Not here: what the files mean. Whoever is woken reads them anew.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CStr, OsStr, OsString};
use std::future::pending;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until};

use crate::{ConfigErrors, files};

/// How long it must have been quiet while a file is being written: to write is to make it, to fill it and to close it.
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
    /// Where the kernel tells of what happens in the folders.
    inotify: OwnedFd,
    /// The folders that are watched, and what the kernel calls each of them.
    folders: BTreeMap<PathBuf, i32>,
    /// What counts. Others may write in the same folders, such as a log.
    relevant: Relevant,
    /// When to look next.
    look_at: Instant,
    /// When to look at the latest, since something happened.
    settled_by: Option<Instant>,
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

    fn begin(path: &Path) -> io::Result<Self> {
        let mut watch = Self {
            path: std::path::absolute(path)?,
            inotify: inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?,
            folders: BTreeMap::new(),
            relevant: Relevant::default(),
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
                pause = self.told() => {
                    let now = Instant::now();
                    let by = *self.settled_by.get_or_insert(now + MAX_SETTLE);
                    self.look_at = by.min(now + pause);
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

    /// Waits until something happens that can lead to other content, and tells how long to wait for more of it.
    async fn told(&self) -> Duration {
        // For as long as somebody waits: to begin to watch takes no runtime. What came before is told at once, and what cannot be told
        // is found by the next look.
        #[expect(
            deprecated,
            reason = "its successor is `unsafe`, for what closes its descriptor too early; ours is borrowed for as long"
        )]
        let Ok(inotify) = AsyncFd::with_interest(self.inotify.as_fd(), Interest::READABLE) else {
            return pending().await;
        };
        loop {
            let Ok(mut ready) = inotify.readable().await else {
                return pending().await;
            };
            if let Some(pause) = self.read() {
                return pause;
            }
            ready.clear_ready();
        }
    }

    /// Reads all that the kernel has to tell. How long to wait for more after the last of it that counts.
    fn read(&self) -> Option<Duration> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&self.inotify, &mut buffer);
        let mut pause = None;
        while let Ok(event) = events.next() {
            if self.counts(&event) {
                pause = Some(if is_writing(event.events()) { WRITING } else { WRITTEN });
            }
        }
        pause
    }

    fn counts(&self, event: &inotify::Event<'_>) -> bool {
        let (kind, name) = (event.events(), event.file_name().map(CStr::to_bytes));
        // What was left out may be anything; that a watch has ended was told by what ended it.
        kind.contains(ReadFlags::QUEUE_OVERFLOW)
            || !kind.contains(ReadFlags::IGNORED)
                && self.folders.iter().any(|(folder, watch)| {
                    *watch == event.wd()
                        && name.is_none_or(|name| {
                            self.relevant.has(&folder.join(OsStr::from_bytes(name)))
                        })
                })
    }

    /// Watches the folders that lead to the files now, and no others.
    fn follow(&mut self) -> io::Result<()> {
        loop {
            self.relevant = Relevant::of(&self.path);
            let mut folders = BTreeMap::new();
            for folder in self.relevant.folders() {
                // Also a folder that is watched: another may have taken its name.
                let watch = inotify::add_watch(&self.inotify, &folder, told_of())?;
                folders.insert(folder, watch);
            }
            let before = std::mem::replace(&mut self.folders, folders);
            let left = |watch: &&i32| !self.folders.values().any(|other| other == *watch);
            for gone in before.values().filter(left) {
                // It is gone already if the folder itself is.
                inotify::remove_watch(&self.inotify, *gone).ok();
            }
            // What was swapped before its folder was watched was not told.
            if before == self.folders {
                return Ok(());
            }
        }
    }
}

/// What can lead to other content. Not that somebody writes, as to a log beside the file: under new connections, to be woken by
/// each line of it was 15 % of the proxy's CPU. Whoever writes the file closes it too.
fn told_of() -> WatchFlags {
    WatchFlags::CREATE
        | WatchFlags::CLOSE_WRITE
        | WatchFlags::ATTRIB
        | WatchFlags::MOVE
        | WatchFlags::DELETE
        | WatchFlags::MOVE_SELF
        | WatchFlags::DELETE_SELF
        | WatchFlags::ONLYDIR
}

/// Whether an event is part of writing a file, whose end is told too: that it is closed.
fn is_writing(event: ReadFlags) -> bool {
    event.contains(ReadFlags::ATTRIB)
        || event.contains(ReadFlags::CREATE) && !event.contains(ReadFlags::ISDIR)
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

    fn has(&self, path: &Path) -> bool {
        let is_document = self.folder.as_deref() == path.parent() && files::is_document(path);
        is_document || self.turns.contains(path)
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
