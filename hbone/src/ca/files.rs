//! Writes the authority's files atomically, with keys readable only for their owner.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use crate::error::{CredentialProblem, HboneError};

pub(super) fn read(file: &Path) -> Result<String, HboneError> {
    fs::read_to_string(file).map_err(|error| HboneError::file(file, error))
}

pub(super) fn with_suffix(prefix: &Path, suffix: &str) -> PathBuf {
    let mut name = prefix.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Creates a file atomically. A hard link, unlike a rename, does not replace an existing file.
pub(super) fn create(file: &Path, text: &str, mode: u32) -> Result<(), HboneError> {
    let written = with_temporary(file, text, mode, |temporary| {
        let linked = fs::hard_link(temporary, file);
        linked.and_then(|()| fs::remove_file(temporary))
    });
    written.map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => HboneError::credential(file, CredentialProblem::Exists),
        _ => HboneError::file(file, error),
    })
}

pub(super) fn replace(file: &Path, text: &str, mode: u32) -> Result<(), HboneError> {
    with_temporary(file, text, mode, |temporary| fs::rename(temporary, file))
        .map_err(|error| HboneError::file(file, error))
}

/// Writes a temporary file, and passes its path to `publish`. The file is created with its final
/// mode, so that other users can never read a key.
fn with_temporary(
    file: &Path,
    text: &str,
    mode: u32,
    publish: impl FnOnce(&Path) -> io::Result<()>,
) -> io::Result<()> {
    let temporary = with_suffix(file, &format!(".{}.tmp", std::process::id()));
    let options = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary);
    let written =
        options.and_then(|opened| write_and_sync(opened, text)).and_then(|()| publish(&temporary));
    if written.is_err() {
        // Ignore the result: the file may not exist, and the earlier error is the one to report.
        let _removed = fs::remove_file(&temporary);
    }
    written
}

fn write_and_sync(mut file: File, text: &str) -> io::Result<()> {
    file.write_all(text.as_bytes())?;
    file.sync_all()
}
