//! Private namespaces for tests and demonstrations: in them anyone is root, and the machine is out
//! of reach.
//!
//! Not here: network namespaces beside each other (`namespace.rs`), which are then made inside.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, getegid, geteuid};

use crate::InterceptionError;
use crate::error::SandboxRemedy;

/// Where an empty file system can be mounted, the first that there is: a minimal image may have
/// neither `/run` nor `/tmp`, and be read-only.
const FOLDERS: [&str; 9] =
    ["/run", "/tmp", "/var/tmp", "/mnt", "/srv", "/opt", "/var", "/home", "/dev"];

/// What [`sandbox_folder`] returns, once there is a sandbox.
static FOLDER: OnceLock<PathBuf> = OnceLock::new();

/// The folder that is the sandbox's own, on a file system that ends with it. Outside of a sandbox
/// `/run`.
#[must_use]
pub fn sandbox_folder() -> &'static Path {
    FOLDER.get().map_or_else(|| Path::new("/run"), PathBuf::as_path)
}

/// What [`enter_sandbox`] made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sandbox {
    /// Namespaces of mounts and network, where every user exists.
    OfRoot,
    /// The same in a user namespace, where only root does.
    InUserNamespace,
}

/// Moves the process into new mount and network namespaces, as their root and with an empty
/// [`sandbox_folder`], which is `/run` if there is one. There is no way back.
///
/// Who is not root becomes it in a user namespace too, where there is no other user; root needs none,
/// and so can be any user inside.
///
/// # Errors
///
/// [`InterceptionError::Sandbox`]: the process has more than one thread, or the kernel forbids it.
pub fn enter_sandbox() -> Result<Sandbox, InterceptionError> {
    let (uid, gid) = (geteuid(), getegid());
    // Of several threads only this one would enter; for a user namespace the kernel itself refuses it.
    if fs::read_dir("/proc/self/task").map_err(failed("count threads"))?.count() > 1 {
        return Err(refused("make namespaces")(Errno::EINVAL));
    }
    let private = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET;
    // Root without SYS_ADMIN, as in most containers, is like any other user.
    let made = if uid.is_root() { unshare(private) } else { Err(Errno::EPERM) };
    let sandbox = if made == Err(Errno::EPERM) {
        unshare(private | CloneFlags::CLONE_NEWUSER).map_err(refused("make namespaces"))?;
        become_root(uid, gid).map_err(failed("become root"))?;
        Sandbox::InUserNamespace
    } else {
        made.map_err(refused("make namespaces"))?;
        Sandbox::OfRoot
    };
    // Else what is mounted here would appear outside too.
    let nothing = None::<&Path>;
    mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing)
        .map_err(refused("make the mounts private"))?;
    let folder = choose_folder().map_err(failed("find a folder to mount an empty one over"))?;
    mount(Some("tmpfs"), folder, Some("tmpfs"), MsFlags::empty(), Some("mode=0755"))
        .map_err(refused("mount an empty folder"))?;
    let folder = FOLDER.get_or_init(|| folder.to_owned());
    fs::create_dir(folder.join("netns")).map_err(failed("create the folder of namespaces"))?;
    Ok(sandbox)
}

/// `/run`, which is made if it can be, or else another folder that is there.
fn choose_folder() -> io::Result<&'static Path> {
    let program = std::env::current_exe().unwrap_or_default();
    // In a container's image that has none. Where it cannot be made, the next is taken.
    fs::create_dir("/run").ok();
    let mut folders = FOLDERS.iter().map(Path::new);
    let none =
        || io::Error::new(io::ErrorKind::NotFound, format!("none of {}", FOLDERS.join(", ")));
    // What is started again must not be covered.
    folders.find(|folder| folder.is_dir() && !program.starts_with(folder)).ok_or_else(none)
}

/// Maps our user and group to root's (user_namespaces(7): `setgroups` has to be denied first).
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
