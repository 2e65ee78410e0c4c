//! The source of snapshots: reads a mesh file or folder, and again after changes. The caller
//! publishes the snapshots.

use std::mem::take;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::sleep;

use super::Mesh;
use super::reader::Reader;
use crate::error::ConfigErrors;
use crate::watch::{FileWatcher, PathWatch};

/// The polling interval until a replaced snapshot is unused.
const RETIRE_POLL_INTERVAL: Duration = Duration::from_millis(200);

/// The nice value of the reading thread. Data threads get nine tenths of a contended CPU (weights
/// in sched(7)), so a large mesh delays no request.
const NICE: i32 = 10;

/// Follows the changes of a mesh.
#[derive(Debug)]
pub struct MeshSource(Option<FollowedMesh>);

#[derive(Debug)]
struct FollowedMesh {
    path: PathBuf,
    watch: PathWatch,
    /// The reader. While `reading` is set, the reading thread owns it.
    reader: Reader,
    /// The read in progress. It continues if the wait for it is cancelled.
    reading: Option<oneshot::Receiver<(Reader, Outcome)>>,
}

/// The result of a read; `None` if the content is unchanged.
type Outcome = Option<Result<Mesh, ConfigErrors>>;

impl MeshSource {
    /// Opens a source and reads the first snapshot from the file or folder at `path`. Without a
    /// path, the mesh stays empty.
    ///
    /// # Errors
    /// As [`Mesh::from_file`], or the files cannot be watched.
    pub fn open(
        path: Option<&Path>,
        watcher: &FileWatcher,
    ) -> Result<(Self, Arc<Mesh>), ConfigErrors> {
        let Some(path) = path else {
            return Ok((Self(None), Arc::default()));
        };
        // Watch before reading, so that no change is missed.
        let watch = watcher.watch_path(path)?;
        let mut reader = Reader::default();
        let mesh = Arc::new(reader.read(path)?);
        let followed = FollowedMesh { path: path.to_owned(), watch, reader, reading: None };
        Ok((Self(Some(followed)), mesh))
    }

    /// Waits for a change, and returns the new snapshot. It is read on a thread of its own. Cancel
    /// safe.
    ///
    /// # Errors
    /// All mistakes in the new content. They are returned once; later changes are still followed.
    pub async fn changed(&mut self) -> Result<Arc<Mesh>, ConfigErrors> {
        match &mut self.0 {
            Some(followed) => followed.changed().await.map(Arc::new),
            None => std::future::pending().await,
        }
    }
}

impl FollowedMesh {
    async fn changed(&mut self) -> Result<Mesh, ConfigErrors> {
        loop {
            let reading = match &mut self.reading {
                Some(reading) => reading,
                None => {
                    self.watch.settled().await;
                    let (path, mut reader) = (self.path.clone(), take(&mut self.reader));
                    self.reading.insert(spawn_low_priority(move || {
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
                Err(_) => {
                    let reason = format!("{}: no thread to read it", self.path.display());
                    return Err(ConfigErrors::one(reason, None));
                }
            }
        }
    }
}

impl Mesh {
    /// Waits until the snapshot is otherwise unused, and frees it on a thread of its own, because
    /// freeing a large one would delay connections. Call it for each replaced snapshot.
    pub async fn retire(self: Arc<Self>) {
        let mut snapshot = self;
        loop {
            match Arc::try_unwrap(snapshot) {
                Ok(mesh) => {
                    // The completion is not awaited.
                    drop(spawn_low_priority(move || drop(mesh)));
                    return;
                }
                Err(shared) => snapshot = shared,
            }
            sleep(RETIRE_POLL_INTERVAL).await;
        }
    }
}

/// Runs `work` on a thread with low priority. The receiver gets the result, or an error if no
/// thread can be started.
fn spawn_low_priority<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> oneshot::Receiver<T> {
    let (done, told) = oneshot::channel();
    let run = move || {
        // nice(2) affects only this thread. If it is not permitted, the thread keeps its priority.
        rustix::process::nice(NICE).ok();
        // The receiver may have been dropped.
        done.send(work()).ok();
    };
    // Without a thread, the sender is dropped, which the receiver notices.
    thread::Builder::new().name("mesh".to_owned()).spawn(run).ok();
    told
}

#[cfg(test)]
mod tests;
