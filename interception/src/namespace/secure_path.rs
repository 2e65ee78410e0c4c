//! Opens the file of a network namespace by a path that only root can change.
//!
//! The path comes from a file or a message about a pod. A user who could replace a part of the path
//! could choose the namespace, and with it the identity of its traffic.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path};
use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, fstat, openat2};
use rustix::io::Errno;
use rustix::process::geteuid;

use super::host::INITIAL_USER;
use super::{Namespace, NamespaceFile, failed};
use crate::error::InterceptionError;

/// How to open one folder of the path: no symbolic links, no `..`.
const STEP: ResolveFlags =
    ResolveFlags::NO_SYMLINKS.union(ResolveFlags::NO_MAGICLINKS).union(ResolveFlags::BENEATH);
const FOLDER: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
/// How to open the last part of the path. NONBLOCK: do not wait if it is a named pipe.
const FILE: OFlags = OFlags::RDONLY.union(OFlags::NONBLOCK).union(OFlags::CLOEXEC);

/// The mode bits that allow the group and others to write.
const WRITABLE: u32 = 0o022;
/// The user that owns the files of users outside of the user namespace (the default of
/// kernel.overflowuid).
const OVERFLOW_USER: u32 = 65534;

impl Namespace {
    /// Opens the namespace with the file `path`. The path must be absolute, without symbolic links,
    /// in folders that only root or the user of this process can change.
    ///
    /// Rejects `/proc/PID/ns/net`: it is a link, and a process id may be reused.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Namespace`], also if the file is not a namespace.
    pub fn open_secure_path(path: &Path) -> Result<Self, InterceptionError> {
        let opened = open(path).and_then(|file| NamespaceFile::new(file, path.to_owned()));
        opened.map(|file| Self(Arc::new(file))).map_err(failed("open", path))
    }
}

fn open(path: &Path) -> io::Result<File> {
    let mut steps = Vec::new();
    for component in path.components() {
        match component {
            Component::RootDir => steps.clear(),
            Component::Normal(name) => steps.push(name),
            Component::CurDir | Component::ParentDir | Component::Prefix(_) => {
                return Err(refused("the path must not contain '.' or '..'"));
            }
        }
    }
    let Some((name, folders)) = steps.split_last().filter(|_| path.is_absolute()) else {
        return Err(refused("the path must be absolute"));
    };
    let mut folder = openat2(CWD, "/", FOLDER, Mode::empty(), ResolveFlags::empty())?;
    check_folder(&folder, Path::new("/"))?;
    let mut passed = Path::new("/").to_path_buf();
    for step in folders {
        passed.push(step);
        folder = step_into(&folder, step, FOLDER)?;
        check_folder(&folder, &passed)?;
    }
    step_into(&folder, name, FILE).map(File::from)
}

fn step_into(folder: &OwnedFd, name: &OsStr, flags: OFlags) -> io::Result<OwnedFd> {
    openat2(folder, name, flags, Mode::empty(), STEP).map_err(|error| match error {
        Errno::LOOP => refused(
            "the path contains a symbolic link: write the path that `realpath` prints; for the \
             namespace of a process, create a file with `ip netns attach NAME PID`",
        ),
        error => error.into(),
    })
}

/// Rejects a folder in which other users can replace entries.
fn check_folder(folder: &OwnedFd, path: &Path) -> io::Result<()> {
    let status = fstat(folder)?;
    if !is_trusted(status.st_uid) || status.st_mode & WRITABLE != 0 {
        let path = path.display();
        return Err(refused(&format!(
            "users other than root can change the folder {path}: only root may own it and write into it"
        )));
    }
    Ok(())
}

fn is_trusted(user: u32) -> bool {
    let own = geteuid().as_raw();
    // In a user namespace, the host's root appears as the overflow user.
    user == 0 || user == own || user == OVERFLOW_USER && in_user_namespace()
}

fn in_user_namespace() -> bool {
    fs::metadata("/proc/self/ns/user").is_ok_and(|namespace| namespace.ino() != INITIAL_USER)
}

fn refused(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, reason)
}
