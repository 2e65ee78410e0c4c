//! A sandbox for tests and the demonstration: private namespaces in which the process is root.
//!
//! The sandbox is isolated from the machine. `setup` creates further network namespaces in it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, getegid, geteuid};

use crate::error::{InterceptionError, SandboxRemedy};

/// Mount points for the sandbox's empty file system, in order of preference. A minimal image may be
/// read-only, and have neither `/run` nor `/tmp`.
const FOLDERS: [&str; 9] =
    ["/run", "/tmp", "/var/tmp", "/mnt", "/srv", "/opt", "/var", "/home", "/dev"];

/// The result of [`sandbox_folder`] within a sandbox.
static FOLDER: OnceLock<PathBuf> = OnceLock::new();

/// The folder for the sandbox's temporary files, which is removed with the sandbox. Outside of a
/// sandbox, `/run`.
#[must_use]
pub fn sandbox_folder() -> &'static Path {
    FOLDER.get().map_or_else(|| Path::new("/run"), PathBuf::as_path)
}

/// The kind of namespaces that [`enter_sandbox`] created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sandbox {
    /// Mount and network namespaces. All users exist.
    OfRoot,
    /// Mount and network namespaces in a user namespace. Only root exists.
    InUserNamespace,
}

/// Moves the process into new mount and network namespaces, as root and with an empty
/// [`sandbox_folder`], which is `/run` if that exists. Cannot be undone.
///
/// A process without privileges also enters a user namespace, whose only user is root. A root
/// process does not, and can use all users in the sandbox.
///
/// # Errors
///
/// [`InterceptionError::Sandbox`] if the process has more than one thread, or the kernel forbids
/// it.
pub fn enter_sandbox() -> Result<Sandbox, InterceptionError> {
    let (uid, gid) = (geteuid(), getegid());
    // unshare affects only the calling thread, and the kernel rejects a user namespace for several
    // threads.
    if fs::read_dir("/proc/self/task").map_err(failed("count threads"))?.count() > 1 {
        return Err(refused("make namespaces")(Errno::EINVAL));
    }
    let private = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET;
    // Root without SYS_ADMIN, as in most containers, has no privileges here.
    let made = if uid.is_root() { unshare(private) } else { Err(Errno::EPERM) };
    let sandbox = if made == Err(Errno::EPERM) {
        unshare(private | CloneFlags::CLONE_NEWUSER).map_err(refused("make namespaces"))?;
        become_root(uid, gid).map_err(failed("become root"))?;
        Sandbox::InUserNamespace
    } else {
        made.map_err(refused("make namespaces"))?;
        Sandbox::OfRoot
    };
    // Otherwise mounts would also appear outside of the sandbox.
    let nothing = None::<&Path>;
    mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing)
        .map_err(refused("make the mounts private"))?;
    let folder = choose_folder().map_err(failed("find a folder for the mount point"))?;
    mount(Some("tmpfs"), folder, Some("tmpfs"), MsFlags::empty(), Some("mode=0755"))
        .map_err(refused("mount an empty folder"))?;
    let folder = FOLDER.get_or_init(|| folder.to_owned());
    fs::create_dir(folder.join("netns")).map_err(failed("create the folder of namespaces"))?;
    Ok(sandbox)
}

/// Selects `/run`, which is created if possible, or else another existing folder.
fn choose_folder() -> io::Result<&'static Path> {
    let program = std::env::current_exe().unwrap_or_default();
    // A container image may have no `/run`. If it cannot be created, another folder is used.
    fs::create_dir("/run").ok();
    let mut folders = FOLDERS.iter().map(Path::new);
    let none =
        || io::Error::new(io::ErrorKind::NotFound, format!("none of {}", FOLDERS.join(", ")));
    // Do not hide the running program, which may be executed again.
    folders.find(|folder| folder.is_dir() && !program.starts_with(folder)).ok_or_else(none)
}

/// Maps the current user and group to root (user_namespaces(7): `setgroups` must be denied first).
fn become_root(uid: Uid, gid: Gid) -> io::Result<()> {
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    fs::write("/proc/self/gid_map", format!("0 {gid} 1"))
}

fn refused(step: &'static str) -> impl FnOnce(Errno) -> InterceptionError {
    move |errno| failed(step)(errno.into())
}

fn failed(step: &'static str) -> impl FnOnce(io::Error) -> InterceptionError {
    move |source| {
        let remedy = match source.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EINVAL) => SandboxRemedy::SingleThread,
            // EPERM: a sysctl, seccomp or AppArmor; ENOSPC: user.max_user_namespaces (unshare(2)).
            Some(Errno::EPERM | Errno::EACCES | Errno::ENOSPC) => SandboxRemedy::UserNamespaces,
            _ => SandboxRemedy::Unknown,
        };
        InterceptionError::Sandbox { step, remedy, source }
    }
}
