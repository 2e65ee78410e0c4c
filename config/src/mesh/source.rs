//! The source of snapshots: reads a mesh file or folder, again after each change. The caller
//! publishes the snapshots.

use std::mem::take;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::sleep;

use super::Mesh;
use super::reader::Reader;
use crate::error::ConfigErrors;
use crate::watch::{FileWatcher, PathWatch};

/// The polling interval until a replaced snapshot is no longer used.
const RETIRE_POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Runs work on another thread of low priority, so that a large mesh delays no request. If there is
/// no thread, the work is dropped.
pub type Background = fn(work: Box<dyn FnOnce() + Send>);

/// Follows the changes of a mesh.
#[derive(Debug)]
pub struct MeshSource {
    /// `None` if the mesh stays empty.
    followed: Option<FollowedMesh>,
    background: Background,
}

#[derive(Debug)]
struct FollowedMesh {
    path: PathBuf,
    watch: PathWatch,
    /// The reader. A read in progress owns it instead.
    reader: Reader,
    /// The read in progress. It continues if the wait for it is cancelled.
    reading: Option<oneshot::Receiver<(Reader, Outcome)>>,
}

/// The result of a read; `None` if the content is unchanged.
type Outcome = Option<Result<Mesh, ConfigErrors>>;

impl MeshSource {
    /// Opens a source and reads the first snapshot from the file or folder at `path`. Without a
    /// path, the mesh stays empty. Later snapshots are read, and replaced ones freed, in the
    /// background.
    ///
    /// # Errors
    /// As [`Mesh::from_file`], or the files cannot be watched.
    pub fn open(
        path: Option<&Path>,
        watcher: &FileWatcher,
        background: Background,
    ) -> Result<(Self, Arc<Mesh>), ConfigErrors> {
        let Some(path) = path else {
            return Ok((Self { followed: None, background }, Arc::default()));
        };
        // Watch before reading, so that no change is missed.
        let watch = watcher.watch_path(path)?;
        let mut reader = Reader::default();
        let mesh = Arc::new(reader.read(path)?);
        let followed = FollowedMesh { path: path.to_owned(), watch, reader, reading: None };
        Ok((Self { followed: Some(followed), background }, mesh))
    }

    /// Waits for a change, and returns the new snapshot. Cancel-safe.
    ///
    /// # Errors
    /// All mistakes in the new content. They are returned once; later changes are still followed.
    pub async fn changed(&mut self) -> Result<Arc<Mesh>, ConfigErrors> {
        match &mut self.followed {
            Some(followed) => followed.changed(self.background).await.map(Arc::new),
            None => std::future::pending().await,
        }
    }
}

/// Waits until a replaced snapshot is no longer used, and frees it in the background, because
/// freeing a large one would delay connections. Call it for each replaced snapshot.
pub async fn retire_mesh(mut replaced: Arc<Mesh>, background: Background) {
    loop {
        match Arc::try_unwrap(replaced) {
            Ok(mesh) => return background(Box::new(move || drop(mesh))),
            Err(shared) => replaced = shared,
        }
        sleep(RETIRE_POLL_INTERVAL).await;
    }
}

impl FollowedMesh {
    async fn changed(&mut self, background: Background) -> Result<Mesh, ConfigErrors> {
        loop {
            let reading = match &mut self.reading {
                Some(reading) => reading,
                None => {
                    self.watch.settled().await;
                    let (path, mut reader) = (self.path.clone(), take(&mut self.reader));
                    let (finished, reading) = oneshot::channel();
                    background(Box::new(move || {
                        let outcome = reader.read_if_new(&path);
                        // The source may have been dropped.
                        finished.send((reader, outcome)).ok();
                    }));
                    self.reading.insert(reading)
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
                Err(_) => {
                    let reason = format!("{}: no thread to read it", self.path.display());
                    return Err(ConfigErrors::one(reason, None));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
