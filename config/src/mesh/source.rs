//! Where snapshots come from: a mesh file or a folder of them, read now and whenever it changes.
//!
//! Not here: who uses them. The caller publishes what it is given.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::sleep;

use super::Mesh;
use super::document::Reader;
use crate::file_watch::Watch;
use crate::{ConfigErrors, files};

/// How often to read again what was replaced meanwhile, before it is taken as it was read.
const MAX_READS: usize = 3;
/// How long to wait before seeing again whether a snapshot is still in use.
const RETIREMENT: Duration = Duration::from_millis(200);

/// Follows a mesh.
#[derive(Debug)]
pub struct MeshSource(Option<Followed>);

#[derive(Debug)]
struct Followed {
    path: PathBuf,
    watch: Watch,
    /// The content that was read last, right or wrong.
    seen: u64,
    /// What is being read now; it goes on when the wait for it is cancelled.
    reading: Option<JoinHandle<Option<Outcome>>>,
}

/// What a content is called, and what it means.
type Outcome = (u64, Result<Mesh, ConfigErrors>);

impl MeshSource {
    /// A source and its first snapshot: of the file or folder at `path`, or for ever the empty mesh when there is none.
    ///
    /// # Errors
    /// As [`Mesh::from_file`], or when the files cannot be watched.
    pub fn open(path: Option<&Path>) -> Result<(Self, Arc<Mesh>), ConfigErrors> {
        let Some(path) = path else {
            return Ok((Self(None), Arc::default()));
        };
        // Before it is read, so that no change goes unnoticed.
        let watch = Watch::new(path)?;
        let (seen, mesh) = read_whole(path);
        let followed = Followed { path: path.to_owned(), watch, seen, reading: None };
        Ok((Self(Some(followed)), Arc::new(mesh?)))
    }

    /// Waits for the next content, and gives the snapshot that it makes. It is read on a thread of its own. Cancel safe.
    ///
    /// # Errors
    /// Every mistake in the new content, which are told once; the next change counts again.
    pub async fn changed(&mut self) -> Result<Arc<Mesh>, ConfigErrors> {
        match &mut self.0 {
            Some(followed) => followed.changed().await.map(Arc::new),
            None => std::future::pending().await,
        }
    }
}

impl Followed {
    async fn changed(&mut self) -> Result<Mesh, ConfigErrors> {
        loop {
            let reading = match &mut self.reading {
                Some(reading) => reading,
                None => {
                    self.watch.look().await;
                    let (path, seen) = (self.path.clone(), self.seen);
                    self.reading.insert(spawn_blocking(move || read_if_new(&path, seen)))
                }
            };
            let outcome = reading.await;
            self.reading = None;
            match outcome {
                Ok(Some((seen, mesh))) => {
                    self.seen = seen;
                    return mesh;
                }
                Ok(None) => {}
                Err(error) => {
                    let reason = format!("{}: reading was given up: {error}", self.path.display());
                    return Err(ConfigErrors::one(reason, None));
                }
            }
        }
    }
}

impl Mesh {
    /// Waits until nobody else holds the snapshot, and frees it on a thread of its own: to free a large one takes longer than a
    /// connection should have to wait. Whoever replaces a snapshot spawns this with the old one.
    pub async fn retire(self: Arc<Self>) {
        let mut snapshot = self;
        loop {
            match Arc::try_unwrap(snapshot) {
                Ok(mesh) => {
                    // Nobody waits for it, and a runtime that ends frees it all the same.
                    drop(spawn_blocking(move || drop(mesh)));
                    return;
                }
                Err(shared) => snapshot = shared,
            }
            sleep(RETIREMENT).await;
        }
    }
}

/// Reads the mesh at `path`, and tells which content it was.
pub(super) fn read(path: &Path) -> Outcome {
    let mut reader = Reader::default();
    let content = files::read_each(path, |file, content| {
        let name = file.display();
        match content.map(String::from_utf8) {
            Ok(Ok(text)) => reader.document(&name.to_string(), &text),
            Ok(Err(error)) => reader.unreadable(format!("{name}: is no text: {error}")),
            Err(error) => reader.unreadable(format!("{name}: cannot be read: {error}")),
        }
    });
    (content, reader.finish())
}

/// As [`read`], but all of one time: files may be replaced while they are read, one before and one after its reading.
fn read_whole(path: &Path) -> Outcome {
    let mut outcome = read(path);
    for _ in 1..MAX_READS {
        if outcome.0 == files::fingerprint(path) {
            break;
        }
        outcome = read(path);
    }
    outcome
}

fn read_if_new(path: &Path, seen: u64) -> Option<Outcome> {
    (files::fingerprint(path) != seen).then(|| read_whole(path))
}

#[cfg(test)]
mod tests;
