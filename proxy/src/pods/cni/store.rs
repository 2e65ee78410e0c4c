//! The enrolled pods on disk, from which a restarted daemon learns them: a runtime adds a pod once.
//!
//! The folder has one JSON file for each attachment, beside the socket in /run, so that nothing
//! outlives a reboot. A file is written at once and names the pod's namespace by its path, device
//! and inode: a path that leads to another namespace meanwhile is not the pod's.

use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use thiserror::Error;
use underpass_interception::{NamespaceId, Peer};

use super::attachment::{AttachedPod, Attachment};
use super::protocol::{ProtocolError, StoredPod};

/// The end of a file's name.
const EXTENSION: &str = "pod";

/// The folder of the enrolled pods.
#[derive(Debug)]
pub(super) struct Store {
    folder: PathBuf,
}

/// Why the folder of the pods cannot be used.
#[derive(Debug, Error)]
pub(crate) enum StoreError {
    #[error("cannot {operation} {path}", path = path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("{path} belongs to user {owner}, or others may write to it", path = path.display())]
    Unsafe { path: PathBuf, owner: u32 },
}

impl Store {
    /// Opens the folder, which is created if it does not exist. Only this user may write to it.
    pub(super) fn open(folder: PathBuf) -> Result<Self, StoreError> {
        let failed = |operation| {
            let path = folder.clone();
            move |source| StoreError::Io { operation, path, source }
        };
        match DirBuilder::new().mode(0o700).create(&folder) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                return Err(failed("create")(error));
            }
            _ => {}
        }
        let metadata = fs::symlink_metadata(&folder).map_err(failed("read"))?;
        let owner = metadata.uid();
        let is_trusted = Peer { uid: owner, pid: None }.is_trusted();
        if !is_trusted || !metadata.is_dir() || metadata.mode() & 0o022 != 0 {
            return Err(StoreError::Unsafe { path: folder, owner });
        }
        Ok(Self { folder })
    }

    /// The stored pods. A file that cannot be read is reported and removed.
    pub(super) fn load(&self) -> io::Result<Vec<StoredPod>> {
        let mut pods = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == EXTENSION) {
                match read(&path) {
                    Ok(pod) => pods.push(pod),
                    Err(error) => discard(&path, &error),
                }
            } else {
                // A file that was being written when the daemon was killed.
                fs::remove_file(&path)?;
            }
        }
        Ok(pods)
    }

    /// Stores a pod, in one step.
    pub(super) fn save(&self, pod: &AttachedPod, namespace: NamespaceId) -> io::Result<()> {
        let path = self.file(&pod.attachment);
        let new = path.with_extension("new");
        fs::write(&new, StoredPod::encode(pod, namespace.device(), namespace.inode()))?;
        fs::rename(&new, &path)
    }

    /// Removes a pod; done as well if there is none.
    pub(super) fn remove(&self, attachment: &Attachment) -> io::Result<()> {
        match fs::remove_file(self.file(attachment)) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn file(&self, attachment: &Attachment) -> PathBuf {
        // Neither name contains a slash.
        self.folder.join(format!("{attachment}.{EXTENSION}"))
    }
}

fn read(path: &Path) -> Result<StoredPod, ReadError> {
    Ok(StoredPod::decode(&fs::read_to_string(path)?)?)
}

fn discard(path: &Path, error: &ReadError) {
    let error = crate::error::chain(error);
    tracing::error!(path = %path.display(), error, "cannot read a stored pod: it is not enrolled again");
    fs::remove_file(path).ok();
}

#[derive(Debug, Error)]
enum ReadError {
    #[error("the file cannot be read")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Content(#[from] ProtocolError),
}

#[cfg(test)]
mod tests;
