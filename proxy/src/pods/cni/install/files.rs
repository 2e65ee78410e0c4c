//! Files of the container runtime: selects its network configuration, and changes files atomically.

use std::fs::{self, File, Permissions};
use std::io::{self, BufRead as _, BufReader, Read};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

/// The suffix of a list that is derived from a configuration of a single plugin. `-` sorts before
/// `.`, so runtimes prefer `10-a-underpass.conflist` to `10-a.conf`.
const DERIVED_LIST_SUFFIX: &str = "-underpass.conflist";
const NEW_FILE_MODE: u32 = 0o644;

/// A network configuration in the runtime's folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum NetworkConfig {
    /// A list of plugins.
    List(PathBuf),
    /// A configuration of a single plugin, and the path of the list that is derived from it.
    Single { source: PathBuf, list: PathBuf },
    /// A derived list whose single configuration was removed.
    Orphan(PathBuf),
}

impl NetworkConfig {
    /// All configurations in the order in which runtimes read them: sorted by name.
    pub(super) fn all(folder: &Path) -> io::Result<Vec<Self>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            if !entry.path().is_dir() {
                files.push(entry.path());
            }
        }
        files.sort_unstable();
        Ok(files.iter().filter_map(|file| Self::from_file(file)).collect())
    }

    fn from_file(file: &Path) -> Option<Self> {
        let name = file.file_name()?.to_str()?;
        match file.extension()?.to_str()? {
            "conflist" => Some(match name.strip_suffix(DERIVED_LIST_SUFFIX) {
                None => Self::List(file.to_owned()),
                Some(stem) => {
                    let sources =
                        ["conf", "json"].map(|end| file.with_file_name(format!("{stem}.{end}")));
                    match sources.into_iter().find(|source| source.exists()) {
                        Some(source) => Self::Single { source, list: file.to_owned() },
                        None => Self::Orphan(file.to_owned()),
                    }
                }
            }),
            "conf" | "json" => {
                let stem = file.file_stem()?.to_str()?;
                let list = file.with_file_name(format!("{stem}{DERIVED_LIST_SUFFIX}"));
                Some(Self::Single { source: file.to_owned(), list })
            }
            _ => None,
        }
    }
}

/// Replaces the content of `path` atomically. Keeps owner, mode and symbolic links.
pub(super) fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let old = fs::metadata(&path).ok();
    let mut content = content;
    replace(
        &path,
        &mut content,
        old.as_ref().map_or(NEW_FILE_MODE, |old| old.mode() & 0o7777),
        old.as_ref(),
    )
}

/// Copies an executable file atomically.
pub(super) fn copy_program(from: &Path, to: &Path) -> io::Result<()> {
    replace(to, &mut File::open(from)?, 0o755, None)
}

/// Whether two files have the same content. Reads pieces, because a binary is large.
pub(super) fn are_equal(one: &Path, other: &Path) -> io::Result<bool> {
    let (one, other) = (File::open(one)?, File::open(other)?);
    if one.metadata()?.len() != other.metadata()?.len() {
        return Ok(false);
    }
    let (mut one, mut other) = (BufReader::new(one), BufReader::new(other));
    loop {
        let (left, right) = (one.fill_buf()?, other.fill_buf()?);
        let length = left.len().min(right.len());
        if left.get(..length) != right.get(..length) {
            return Ok(false);
        }
        if length == 0 {
            return Ok(left.len() == right.len());
        }
        one.consume(length);
        other.consume(length);
    }
}

fn replace(
    path: &Path,
    content: &mut dyn Read,
    mode: u32,
    old: Option<&fs::Metadata>,
) -> io::Result<()> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy();
    // Runtimes ignore names that start with a dot.
    let new = path.with_file_name(format!(".{name}.{}.new", std::process::id()));
    let written = write_new(&new, content, mode, old).and_then(|()| fs::rename(&new, path));
    if written.is_err() {
        fs::remove_file(&new).ok();
    }
    written?;
    sync_folder(path)
}

fn write_new(
    new: &Path,
    content: &mut dyn Read,
    mode: u32,
    old: Option<&fs::Metadata>,
) -> io::Result<()> {
    let mut file = File::create(new)?;
    io::copy(content, &mut file)?;
    file.set_permissions(Permissions::from_mode(mode))?;
    if let Some(old) = old {
        chown(new, Some(old.uid()), Some(old.gid()))?;
    }
    file.sync_all()
}

/// Removes a file if it exists.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(()) => sync_folder(path),
    }
}

/// Syncs the folder, so that renamed and removed files survive a crash of the machine.
fn sync_folder(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::cni::testing::Folder;

    #[test]
    fn list_derived_from_single_configuration_precedes_it() {
        let found = NetworkConfig::from_file(Path::new("/net.d/10-a.conf")).unwrap();
        let NetworkConfig::Single { source, list } = &found else { panic!("{found:?}") };
        assert_eq!(list.to_str(), Some("/net.d/10-a-underpass.conflist"));
        assert!(list < source);
        let mut names = ["10-a.conf", "10-a-underpass.conflist", "10-a.json", "10-b.conf"];
        names.sort_unstable();
        assert_eq!(names[0], "10-a-underpass.conflist");
    }

    #[test]
    fn file_contents_are_compared_completely() {
        let folder = Folder::new();
        let file = |name: &str, content: &[u8]| {
            fs::write(folder.path(name), content).unwrap();
            folder.path(name)
        };
        let long = vec![7; 100_000];
        let mut changed = long.clone();
        changed[99_999] = 8;
        let one = file("one", &long);
        for (name, content, equal) in [
            ("equal", &*long, true),
            ("changed", &*changed, false),
            ("short", &long[..99_999], false),
            ("empty", &[], false),
        ] {
            assert_eq!(are_equal(&one, &file(name, content)).unwrap(), equal, "{name}");
        }
        are_equal(&one, &folder.path("missing")).unwrap_err();
    }

    #[test]
    fn files_that_runtimes_ignore_are_ignored() {
        for name in ["10-a.conflist.bak", "README", ".10-a.conflist.7.new", "10-a.yaml"] {
            assert_eq!(NetworkConfig::from_file(&Path::new("/net.d").join(name)), None, "{name}");
        }
    }
}
