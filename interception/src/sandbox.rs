//! Private namespaces for tests and demonstrations: in them anyone is root, and the machine is out
//! of reach.
//!
//! Not here: network namespaces beside each other (`netns.rs`), which are then made inside.

use std::fs;
use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, getegid, geteuid};

use crate::InterceptionError;
use crate::error::SandboxRemedy;

/// What [`enter_sandbox`] made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sandbox {
    /// Namespaces of mounts and network, where every user exists.
    OfRoot,
    /// The same in a user namespace, where only root does.
    InUserNamespace,
}

/// Moves the process into new mount and network namespaces, as their root and with an empty `/run`.
/// There is no way back.
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
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=0755"))
        .map_err(refused("mount an empty /run"))?;
    fs::create_dir("/run/netns").map_err(failed("create /run/netns"))?;
    Ok(sandbox)
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
