//! Finds the directory entries that determine the content at a path.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use crate::watch::files;

/// The kernel's limit of symbolic links (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// The directory entries whose change can change the content.
#[derive(Debug, Default)]
pub(super) struct RelevantEntries {
    /// The files, and each symbolic link on the paths to them. If a path does not exist, its first
    /// missing component.
    entries: BTreeSet<PathBuf>,
    /// The folder whose files are relevant.
    folder: Option<PathBuf>,
    kind: FilesOfFolder,
}

/// The relevant files of a folder.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum FilesOfFolder {
    /// The documents of a configuration.
    #[default]
    Documents,
    /// Every file, in a folder of other programs.
    All,
}

impl RelevantEntries {
    /// The entries of the absolute `path`.
    pub(super) fn new(path: &Path, kind: FilesOfFolder) -> Self {
        if !path.is_dir() {
            return Self { entries: entries(path), folder: None, kind };
        }
        // Every document is reached through the folder, even if it has no document yet.
        let mut all = entries(&path.join("any"));
        let folder = all.iter().find(|entry| entry.ends_with("any"));
        let folder = folder.and_then(|any| any.parent()).map(Path::to_owned);
        for document in files::list(path).unwrap_or_default() {
            all.append(&mut entries(&document));
        }
        Self { entries: all, folder, kind }
    }

    /// The folders that contain the entries.
    pub(super) fn folders(&self) -> BTreeSet<PathBuf> {
        let parents = self.entries.iter().filter_map(|entry| entry.parent());
        parents.map(Path::to_owned).collect()
    }

    pub(super) fn has(&self, path: &Path) -> bool {
        let is_wanted = self.kind == FilesOfFolder::All || files::is_document(path);
        let is_in_folder = is_wanted && self.folder.as_deref() == path.parent();
        is_in_folder || self.entries.contains(path)
    }
}

/// The directory entries that lead to the absolute `path`: the file, each symbolic link on the
/// path, or the first missing component.
fn entries(path: &Path) -> BTreeSet<PathBuf> {
    let mut entries = BTreeSet::new();
    let mut links = 0;
    let mut resolved = PathBuf::from("/");
    let mut remaining = components(path);
    while let Some(component) = remaining.pop() {
        if component == ".." {
            // `resolved` contains no links, so its textual parent is its real one.
            resolved.pop();
            continue;
        }
        let next = resolved.join(component);
        if let Ok(target) = next.read_link() {
            entries.insert(next);
            links += 1;
            if links > MAX_LINKS {
                break;
            }
            remaining.extend(components(&target));
        } else if remaining.is_empty() || !next.is_dir() {
            entries.insert(next);
            break;
        } else {
            resolved = next;
        }
    }
    entries
}

/// The components of a path, the last one first.
fn components(path: &Path) -> Vec<OsString> {
    let components = path.components().rev().filter(|one| *one != Component::CurDir);
    components.map(|one| one.as_os_str().to_owned()).collect()
}
