//! Where snapshots come from: a mesh file or a folder of them, read now and whenever it changes.
//!
//! Not here: who uses them. The caller publishes what it is given.

use std::mem::take;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::sleep;

use super::Mesh;
use super::reader::Reader;
use crate::ConfigErrors;
use crate::file_watch::Watch;

/// How long to wait before seeing again whether a snapshot is still in use.
const RETIREMENT: Duration = Duration::from_millis(200);

/// How much those who carry traffic go before us: they get some nine tenths of a CPU that both want (sched(7), weights of nice
/// values). A large mesh is read a little later then, and no request waits for it.
const NICE: i32 = 10;

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
    reading: Option<oneshot::Receiver<(Reader, Outcome)>>,
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
                    self.reading.insert(at_leisure(move || {
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
    /// Waits until nobody else holds the snapshot, and frees it on a thread of its own: to free a large one takes longer than a
    /// connection should have to wait. Whoever replaces a snapshot spawns this with the old one.
    pub async fn retire(self: Arc<Self>) {
        let mut snapshot = self;
        loop {
            match Arc::try_unwrap(snapshot) {
                Ok(mesh) => {
                    // Nobody waits for it.
                    drop(at_leisure(move || drop(mesh)));
                    return;
                }
                Err(shared) => snapshot = shared,
            }
            sleep(RETIREMENT).await;
        }
    }
}

/// Does `work` on a thread of its own that gives way to others. Its end is told; it is dropped if there is no thread to be had.
fn at_leisure<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> oneshot::Receiver<T> {
    let (done, told) = oneshot::channel();
    let run = move || {
        // Of this thread only (nice(2)). Where it is forbidden, it is as important as the others.
        rustix::process::nice(NICE).ok();
        // Whoever waited may be gone.
        done.send(work()).ok();
    };
    // Without a thread, what would tell is dropped.
    thread::Builder::new().name("mesh".to_owned()).spawn(run).ok();
    told
}

#[cfg(test)]
mod tests;
