//! Stores the enrolled pods on disk for a restarted daemon, because a runtime adds each pod only
//! once.
//!
//! The folder has one JSON file for each attachment. It is beside the socket in /run, so that a
//! reboot empties it. Files are written atomically. A file contains the path, device and inode of
//! the pod's namespace: another namespace at the same path is not the pod's.

use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use thiserror::Error;
use underpass_interception::Peer;

use super::attachment::Attachment;
use super::protocol::{ProtocolError, StoredPod};

/// The extension of a pod's file.
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
    #[error("{path} is not private: user {owner} owns it, or other users may write to it", path = path.display())]
    Unsafe { path: PathBuf, owner: u32 },
}

impl Store {
    /// Opens the folder, or creates it. Only this user may have write access.
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

    /// The stored pods. An unreadable file is logged and removed.
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
                // An unfinished file of a daemon that was killed.
                fs::remove_file(&path)?;
            }
        }
        Ok(pods)
    }

    /// Stores a pod atomically.
    pub(super) fn save(&self, pod: &StoredPod) -> io::Result<()> {
        let path = self.file(&pod.pod.attachment);
        let new = path.with_extension("new");
        fs::write(&new, pod.encode())?;
        fs::rename(&new, &path)
    }

    /// Removes a pod if it is stored.
    pub(super) fn remove(&self, attachment: &Attachment) -> io::Result<()> {
        match fs::remove_file(self.file(attachment)) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn file(&self, attachment: &Attachment) -> PathBuf {
        // An attachment's names contain no slash.
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
