//! Installs the plugin: its binary, and its entry in the runtime's network configuration.
//!
//! ```text
//! install    binary ─▶ entry           a configuration never names a binary that does not exist
//! uninstall  entry ─▶ binary
//! ```
//!
//! Each step replaces one file atomically, and is skipped if it is already done. The daemon repeats
//! the installation when another program rewrites the configuration (`upkeep.rs`).

mod conflist;
mod files;
pub(crate) mod platform;

use std::borrow::Cow;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;
use underpass_config::Hint;

use self::conflist::{Conflist, ConflistError};
use self::files::NetworkConfig;

/// The name of the plugin's binary, which is also its `type` in network configurations.
pub(crate) const PLUGIN_NAME: &str = "underpass-cni";
pub(crate) const DEFAULT_SOCKET: &str = "/run/underpass/cni.sock";

/// A path to the running binary that also works after its file was replaced.
const OWN_BINARY: &str = "/proc/self/exe";
/// The file name of the drop-in.
const DROP_IN: &str = "underpass.conf";

/// The paths and the form of an installation of the plugin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Installation {
    pub(crate) network_folder: PathBuf,
    /// The folder of the plugins' binaries.
    pub(crate) program_folder: PathBuf,
    pub(crate) socket: PathBuf,
    /// Whether the entry is a separate drop-in file instead of a part of the list.
    pub(crate) drop_in: bool,
}

/// A change of one file, which installs or removes the plugin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    /// Copies the running binary.
    CopyProgram(PathBuf),
    /// Replaces the content of a file.
    Write {
        path: PathBuf,
        text: String,
    },
    Remove(PathBuf),
    /// Creates and removes a file, because containerd does not watch folders of drop-ins.
    Touch(PathBuf),
}

/// Why the plugin cannot be installed.
#[derive(Debug, Error)]
pub(crate) enum InstallError {
    #[error("cannot {operation} {path}", path = path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "{folder} has no network configuration yet",
        folder = folder.display()
    )]
    NoConfiguration { folder: PathBuf },
    #[error("the network configuration {path} cannot be edited", path = path.display())]
    Configuration { path: PathBuf, source: ConflistError },
    #[error(
        "the runtime reads no drop-in for {path}, which is not a list of plugins",
        path = path.display()
    )]
    DropInOfSingle { path: PathBuf },
}

impl Hint for InstallError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        match self {
            Self::Io { .. } => None,
            Self::NoConfiguration { .. } => {
                Some("install the network plugin of the cluster first".into())
            }
            Self::Configuration { source, .. } => source.hint(),
            Self::DropInOfSingle { .. } => Some("install without --drop-in".into()),
        }
    }
}

impl Installation {
    /// The changes that install the plugin; empty if it is installed.
    pub(crate) fn install(&self) -> Result<Vec<Change>, InstallError> {
        let mut changes = Vec::new();
        if !self.has_program() {
            changes.push(Change::CopyProgram(self.program()));
        }
        changes.extend(self.entry()?);
        Ok(changes)
    }

    /// The changes that remove the plugin; empty if no part of it is left.
    pub(crate) fn uninstall(&self) -> Result<Vec<Change>, InstallError> {
        let mut changes = self.remove_drop_ins()?;
        for found in self.configurations()? {
            if let Some(change) = remove_entry(found)?
                && !changes.contains(&change)
            {
                changes.push(change);
            }
        }
        if self.program().exists() {
            changes.push(Change::Remove(self.program()));
        }
        Ok(changes)
    }

    fn program(&self) -> PathBuf {
        self.program_folder.join(PLUGIN_NAME)
    }

    /// Whether the installed binary equals the running one. An unreadable binary is replaced.
    fn has_program(&self) -> bool {
        files::are_equal(Path::new(OWN_BINARY), &self.program()).unwrap_or(false)
    }

    /// The changes that add the entry to the configuration that runtimes use: the first one by
    /// name.
    fn entry(&self) -> Result<Vec<Change>, InstallError> {
        let mut changes = Vec::new();
        for found in self.configurations()? {
            match found {
                NetworkConfig::Orphan(path) => changes.push(Change::Remove(path)),
                found if self.drop_in => {
                    changes.extend(self.add_drop_in(found)?);
                    return Ok(changes);
                }
                NetworkConfig::List(path) => {
                    changes.extend(self.add_to_list(path)?);
                    changes.extend(self.remove_drop_ins()?);
                    return Ok(changes);
                }
                NetworkConfig::Single { source, list } => {
                    changes.extend(self.add_list(&source, list)?);
                    changes.extend(self.remove_drop_ins()?);
                    return Ok(changes);
                }
            }
        }
        Err(InstallError::NoConfiguration { folder: self.network_folder.clone() })
    }

    fn configurations(&self) -> Result<Vec<NetworkConfig>, InstallError> {
        match NetworkConfig::all(&self.network_folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            found => found.map_err(failed("read", &self.network_folder)),
        }
    }

    fn add_to_list(&self, path: PathBuf) -> Result<Option<Change>, InstallError> {
        let text = read_text(&path)?;
        let edited = Conflist::parse(&text).and_then(|list| list.with_entry(&self.socket));
        let edited = edited.map_err(invalid(&path))?;
        Ok(edited.map(|text| Change::Write { path, text }))
    }

    fn add_list(&self, source: &Path, list: PathBuf) -> Result<Option<Change>, InstallError> {
        let text = conflist::list_of(&read_text(source)?, &self.socket).map_err(invalid(source))?;
        let is_there = fs::read_to_string(&list).is_ok_and(|found| found == text);
        Ok((!is_there).then_some(Change::Write { path: list, text }))
    }

    /// Writes the drop-in, which libcni 1.3 and later append to the list. Then removes the entry
    /// from the list.
    fn add_drop_in(&self, found: NetworkConfig) -> Result<Vec<Change>, InstallError> {
        let path = match found {
            NetworkConfig::List(path) => path,
            NetworkConfig::Single { source: path, .. } | NetworkConfig::Orphan(path) => {
                return Err(InstallError::DropInOfSingle { path });
            }
        };
        let text = read_text(&path)?;
        let list = Conflist::parse(&text).map_err(invalid(&path))?;
        list.check_drop_in().map_err(invalid(&path))?;
        let name = list.name().map_err(invalid(&path))?;
        let file = self.network_folder.join(name.as_str()).join(DROP_IN);
        let entry = format!("{}\n", conflist::entry(&self.socket));
        let mut changes = Vec::new();
        if !fs::read_to_string(&file).is_ok_and(|found| found == entry) {
            changes.push(Change::Write { path: file, text: entry });
            changes.push(Change::Touch(self.network_folder.clone()));
        }
        changes.extend(remove_entry(NetworkConfig::List(path))?);
        Ok(changes)
    }

    fn remove_drop_ins(&self) -> Result<Vec<Change>, InstallError> {
        let folders = match fs::read_dir(&self.network_folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            folders => folders.map_err(failed("read", &self.network_folder))?,
        };
        let mut changes = Vec::new();
        for folder in folders {
            let folder = folder.map_err(failed("read", &self.network_folder))?;
            let file = folder.path().join(DROP_IN);
            if file.is_file() {
                changes.push(Change::Remove(file));
            }
        }
        if !changes.is_empty() {
            changes.push(Change::Touch(self.network_folder.clone()));
        }
        Ok(changes)
    }
}

fn remove_entry(found: NetworkConfig) -> Result<Option<Change>, InstallError> {
    match found {
        NetworkConfig::Orphan(path) => Ok(Some(Change::Remove(path))),
        NetworkConfig::Single { list, .. } => Ok(list.exists().then_some(Change::Remove(list))),
        NetworkConfig::List(path) => {
            let text = read_text(&path)?;
            // Other files of the runtime may be invalid, which does not matter without an entry.
            if !text.contains(PLUGIN_NAME) {
                return Ok(None);
            }
            let edited = Conflist::parse(&text).and_then(|list| list.without_entry());
            let edited = edited.map_err(invalid(&path))?;
            Ok(edited.map(|text| Change::Write { path, text }))
        }
    }
}

impl Change {
    pub(crate) fn apply(&self) -> Result<(), InstallError> {
        match self {
            Self::CopyProgram(path) => {
                let copied = files::copy_program(Path::new(OWN_BINARY), path);
                copied.map_err(failed("write", path))
            }
            Self::Write { path, text } => {
                let folder = path.parent().unwrap_or(path);
                fs::create_dir_all(folder).map_err(failed("create", folder))?;
                files::write(path, text.as_bytes()).map_err(failed("write", path))
            }
            Self::Remove(path) => files::remove(path).map_err(failed("remove", path)),
            Self::Touch(folder) => {
                let scratch = folder.join(".underpass.new");
                let touched = fs::write(&scratch, "").and_then(|()| files::remove(&scratch));
                touched.map_err(failed("write", &scratch))
            }
        }
    }
}

/// The alternate format includes the new content.
impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CopyProgram(path) => write!(f, "copy this binary to {}", path.display()),
            Self::Write { path, text } if f.alternate() => {
                write!(f, "write {}:\n{}", path.display(), text.trim_end())
            }
            Self::Write { path, .. } => write!(f, "write {}", path.display()),
            Self::Remove(path) => write!(f, "remove {}", path.display()),
            Self::Touch(path) => write!(f, "make the runtime read {} again", path.display()),
        }
    }
}

fn read_text(path: &Path) -> Result<String, InstallError> {
    fs::read_to_string(path).map_err(failed("read", path))
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> InstallError {
    let path = path.to_owned();
    move |source| InstallError::Io { operation, path, source }
}

fn invalid(path: &Path) -> impl FnOnce(ConflistError) -> InstallError {
    let path = path.to_owned();
    move |source| InstallError::Configuration { path, source }
}

#[cfg(test)]
mod tests;
