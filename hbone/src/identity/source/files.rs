//! Reads certificate, key and roots from files that another program renews.
//!
//! The other program writes the files one after another: the source waits until key and certificate
//! match. `crate::identity::files` watches the files.

use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use tokio::select;
use underpass_config::{FileWatcher, IdentityFiles};

use super::{IdentitySource, NextIdentity, NextPem, PemSource};
use crate::error::HboneError;
use crate::identity::Identity;
use crate::identity::files::WatchedFiles;
use crate::identity::identity_pem::IdentityPem;
use crate::identity::renewal::Schedule;

/// Reads the files at start and after each change: written in place, renamed, or reached through a
/// replaced symbolic link.
#[derive(Debug)]
pub struct FileSource {
    files: IdentityFiles,
    watched: WatchedFiles,
    /// The next retry without a file event. Unusable files may become valid or readable later.
    retry: Option<Schedule>,
    /// The hash of the files' content that is in use.
    used: Option<u64>,
    /// The last returned error about unusable files.
    reported: Option<String>,
}

impl FileSource {
    /// Creates a source. It starts to watch the files at the first call of `next`.
    pub fn new(files: IdentityFiles, watcher: &FileWatcher) -> Self {
        Self {
            files,
            watched: WatchedFiles::none(watcher),
            retry: Some(Schedule::new()),
            used: None,
            reported: None,
        }
    }

    async fn next_read(&mut self) -> Result<(IdentityPem, Identity), HboneError> {
        loop {
            select! {
                () = self.watched.changed() => {}
                () = due(self.retry.as_ref()) => {}
            }
            match self.read() {
                Ok(Some(read)) => return Ok(read),
                Ok(None) => {}
                Err(error) => {
                    self.retry.get_or_insert_with(Schedule::new).failed();
                    let text = error.to_string();
                    if self.reported.as_ref() != Some(&text) {
                        self.reported = Some(text);
                        return Err(error);
                    }
                }
            }
        }
    }

    /// Reads the identity. `None` if the same content is in use already.
    fn read(&mut self) -> Result<Option<(IdentityPem, Identity)>, HboneError> {
        if self.watched.is_empty() {
            let IdentityFiles { certificate, key, roots } = &self.files;
            self.watched.replace([certificate, key, roots])?;
        }
        let before = self.content_hash();
        let is_used = before.is_some() && before == self.used;
        let read = match is_used {
            true => None,
            false => {
                let (pem, identity) = Identity::from_files_with_pem(&self.files)?;
                Some((pem, identity.valid_now(&self.files.certificate)?))
            }
        };
        // A change during the read causes another file event.
        self.used = before;
        self.retry = None;
        self.reported = None;
        Ok(read)
    }

    /// The hash of the files' content. `None` if a file cannot be read.
    fn content_hash(&self) -> Option<u64> {
        let IdentityFiles { certificate, key, roots } = &self.files;
        let mut hasher = DefaultHasher::new();
        for file in [certificate, key, roots] {
            fs::read(file).ok()?.hash(&mut hasher);
        }
        Some(hasher.finish())
    }
}

impl IdentitySource for FileSource {
    fn next(&mut self) -> NextIdentity<'_> {
        Box::pin(async { Ok(self.next_read().await?.1) })
    }
}

impl PemSource for FileSource {
    fn next_pem(&mut self) -> NextPem<'_> {
        Box::pin(async { Ok(self.next_read().await?.0) })
    }
}

async fn due(schedule: Option<&Schedule>) {
    match schedule {
        Some(schedule) => schedule.due().await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
