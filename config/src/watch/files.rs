//! Lists and reads the files of a path: a single file, or the documents in a folder.
//!
//! `watch.rs` detects changes.

use std::hash::{DefaultHasher, Hasher};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

const EXTENSIONS: &[&str] = &["yaml", "yml", "json"];

/// A file and its content.
#[derive(Debug)]
pub(crate) struct File {
    pub(crate) path: PathBuf,
    pub(crate) content: io::Result<Vec<u8>>,
    /// A hash of path and content. Collisions are improbable.
    pub(crate) fingerprint: u64,
}

/// The file at `path`, or the documents of a folder sorted by name. Skips subfolders, and hidden
/// files because a mounted ConfigMap contains each file twice.
pub(crate) fn list(path: &Path) -> io::Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut documents = Vec::new();
    for entry in std::fs::read_dir(path)? {
        let path = entry?.path();
        if is_document(&path) && !path.is_dir() {
            documents.push(path);
        }
    }
    documents.sort_unstable();
    Ok(documents)
}

/// Reads the files of `path` and passes each to `read`. Returns their common [`fingerprint`].
pub(crate) fn read_each(path: &Path, mut read: impl FnMut(File)) -> u64 {
    let mut all = DefaultHasher::new();
    let mut one = |path: PathBuf, content: io::Result<Vec<u8>>| {
        let file = File::new(path, content);
        all.write_u64(file.fingerprint);
        read(file);
    };
    match list(path) {
        Ok(files) => files.into_iter().for_each(|file| {
            let content = std::fs::read(&file);
            one(file, content);
        }),
        Err(error) => one(path.to_owned(), Err(error)),
    }
    all.finish()
}

/// A hash of the files of `path` and their contents. Collisions are improbable.
pub(crate) fn fingerprint(path: &Path) -> u64 {
    read_each(path, drop)
}

impl File {
    fn new(path: PathBuf, content: io::Result<Vec<u8>>) -> Self {
        let mut hasher = DefaultHasher::new();
        for part in [path.as_os_str().as_bytes(), content.as_deref().unwrap_or_default()] {
            hasher.write_usize(part.len());
            hasher.write(part);
        }
        // An unreadable file differs from an empty one.
        hasher.write_u8(content.is_err().into());
        Self { path, content, fingerprint: hasher.finish() }
    }
}

/// Whether the name of a file is that of a document.
pub(crate) fn is_document(path: &Path) -> bool {
    let is_hidden = path.file_name().is_some_and(|name| name.as_bytes().starts_with(b"."));
    let extension = path.extension().and_then(|extension| extension.to_str());
    !is_hidden && extension.is_some_and(|extension| EXTENSIONS.contains(&extension))
}
