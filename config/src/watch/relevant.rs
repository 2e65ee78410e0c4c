//! Which directory entries decide what content a path leads to.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use crate::watch::files;

/// The limit of the kernel (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// The directory entries whose change can lead to other content.
#[derive(Debug, Default)]
pub(super) struct Relevant {
    /// The files, and each symbolic link on the way to them. Where a path ends early, its first
    /// component that does not exist.
    entries: BTreeSet<PathBuf>,
    /// The folder of which every document counts.
    folder: Option<PathBuf>,
}

impl Relevant {
    /// Those of `path`, which is absolute.
    pub(super) fn of(path: &Path) -> Self {
        if !path.is_dir() {
            return Self { entries: entries(path), folder: None };
        }
        // Every name in the folder is reached through the folder, also when it has no document yet.
        let mut all = entries(&path.join("any"));
        let folder = all.iter().find(|entry| entry.ends_with("any"));
        let folder = folder.and_then(|any| any.parent()).map(Path::to_owned);
        for document in files::at(path).unwrap_or_default() {
            all.append(&mut entries(&document));
        }
        Self { entries: all, folder }
    }

    /// The folders that the entries are in.
    pub(super) fn folders(&self) -> BTreeSet<PathBuf> {
        let parents = self.entries.iter().filter_map(|entry| entry.parent());
        parents.map(Path::to_owned).collect()
    }

    pub(super) fn has(&self, path: &Path) -> bool {
        let is_document = self.folder.as_deref() == path.parent() && files::is_document(path);
        is_document || self.entries.contains(path)
    }
}

/// The directory entries that lead to `path` (absolute): the file, and each symbolic link on the
/// way to it; the first missing component, where the path ends early.
fn entries(path: &Path) -> BTreeSet<PathBuf> {
    let mut entries = BTreeSet::new();
    let mut links = 0;
    let mut here = PathBuf::from("/");
    let mut ahead = components(path);
    while let Some(component) = ahead.pop() {
        if component == ".." {
            // `here` has no links in it, so that the folder above it is its parent.
            here.pop();
            continue;
        }
        let next = here.join(component);
        if let Ok(target) = next.read_link() {
            entries.insert(next);
            links += 1;
            if links > MAX_LINKS {
                break;
            }
            ahead.extend(components(&target));
        } else if ahead.is_empty() || !next.is_dir() {
            entries.insert(next);
            break;
        } else {
            here = next;
        }
    }
    entries
}

/// The components of a path, the last one first.
fn components(path: &Path) -> Vec<OsString> {
    let components = path.components().rev().filter(|one| *one != Component::CurDir);
    components.map(|one| one.as_os_str().to_owned()).collect()
}
