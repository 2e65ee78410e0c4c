//! Where snapshots come from: a mesh file or a folder of them, read now and whenever it changes.
//!
//! Not here: who uses them. The caller publishes what it is given.

use std::mem::take;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::sleep;

use super::Mesh;
use super::reader::Reader;
use crate::ConfigErrors;
use crate::file_watch::Watch;

/// How long to wait before seeing again whether a snapshot is still in use.
const RETIREMENT: Duration = Duration::from_millis(200);

/// Follows a mesh.
#[derive(Debug)]
pub struct MeshSource(Option<Followed>);

#[derive(Debug)]
struct Followed {
    path: PathBuf,
    watch: Watch,
    /// What has been read; it is with `reading` meanwhile.
    reader: Reader,
    /// What is being read now; it goes on when the wait for it is cancelled.
    reading: Option<JoinHandle<(Reader, Outcome)>>,
}

/// What new content means, if it is new.
type Outcome = Option<Result<Mesh, ConfigErrors>>;

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
        let mut reader = Reader::default();
        let mesh = Arc::new(reader.read(path)?);
        let followed = Followed { path: path.to_owned(), watch, reader, reading: None };
        Ok((Self(Some(followed)), mesh))
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
                    let (path, mut reader) = (self.path.clone(), take(&mut self.reader));
                    self.reading.insert(spawn_blocking(move || {
                        let outcome = reader.read_if_new(&path);
                        (reader, outcome)
                    }))
                }
            };
            let outcome = reading.await;
            self.reading = None;
            match outcome {
                Ok((reader, outcome)) => {
                    self.reader = reader;
                    if let Some(mesh) = outcome {
                        return mesh;
                    }
                }
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

#[cfg(test)]
mod tests;
