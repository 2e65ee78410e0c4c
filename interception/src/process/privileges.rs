//! What the proxy may do: the user that it runs as, and the capabilities that each thread keeps.
//!
//! Capabilities belong to threads, and a new thread has those of the one that made it. So the
//! process goes down in steps: [`confine_process`] first of all, then each auxiliary thread by
//! [`confine_auxiliary_thread`], then the namespaces thread and the control thread by
//! [`confine_thread`] once the rules stand, and from it the workers.
//!
//! A change of user is made by the C library on all threads, and ends the process unless it
//! succeeds on all or on none (setxid in nptl(7)). While one is to come, auxiliary threads keep
//! SETUID and SETGID; the kernel clears both as they stop being root (capabilities(7)). A thread
//! whose capabilities must survive the change calls [`prepare_change_of_user`] before it and
//! [`confine_thread`] after it.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl;

/// Whether the process is to become another user later on.
static USER_WILL_CHANGE: AtomicBool = AtomicBool::new(false);

/// Whom a profile tells as its proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProxyUser {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

/// The capabilities that a thread keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// No capability.
    Nothing,
    /// NET_ADMIN, to repair or remove rules, and to open sockets that are marked or imitate clients.
    NetAdmin,
    /// NET_ADMIN and NET_RAW, for the programs of iptables too.
    NetAdminForPrograms,
}

/// Capabilities that would be needed and that the calling thread does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MissingCapabilities(Vec<Capability>);

impl MissingCapabilities {
    pub(super) fn of(needed: &[Capability]) -> Self {
        let has = |one| caps::has_cap(None, CapSet::Effective, one).unwrap_or(false);
        Self(needed.iter().copied().filter(|&one| !has(one)).collect())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// As container runtimes write them, without `CAP_`: `SETUID, SETGID`.
impl fmt::Display for MissingCapabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        let names: Vec<&str> = names.iter().map(|name| name.trim_start_matches("CAP_")).collect();
        f.write_str(&names.join(", "))
    }
}

/// Announces a change of user to threads that are confined before it, or that it has been made.
pub(super) fn announce_change_of_user(is_to_come: bool) {
    USER_WILL_CHANGE.store(is_to_come, Relaxed);
}

/// Whether this thread lacks NET_ADMIN. If capget(2) fails, the operation itself reports the error.
pub(crate) fn lacks_net_admin() -> bool {
    caps::has_cap(None, CapSet::Effective, Capability::CAP_NET_ADMIN).is_ok_and(|has| !has)
}

/// Confines the whole process: no program that it runs can have more privileges than it has
/// (no_new_privs), and no other process of its user can read its memory, which holds private keys,
/// or trace it (not dumpable: no core dumps either). Call it while there is one thread.
///
/// # Errors
///
/// The kernel's.
pub fn confine_process() -> io::Result<()> {
    prctl::set_no_new_privs()?;
    prctl::set_dumpable(false)?;
    Ok(())
}

/// Lets the calling thread keep what it is permitted when the process becomes another user, until
/// [`confine_thread`] leaves it no more than `kept`.
///
/// # Errors
///
/// The kernel's.
pub fn prepare_change_of_user(kept: Kept) -> io::Result<()> {
    // While SETPCAP is effective.
    bound(kept)?;
    // Otherwise the kernel clears them with the user (capabilities(7)).
    prctl::set_keepcaps(true)?;
    Ok(())
}

/// Leaves the calling thread these capabilities, and as many in its bounding set as programs that
/// it runs need. The threads that it makes have no more. Without SETPCAP, which some containers do
/// not have, the bounding set stays as it is.
///
/// # Errors
///
/// The kernel's.
pub fn confine_thread(kept: Kept) -> io::Result<()> {
    bound(kept)?;
    keep(kept)
}

/// Leaves no capability to a thread that only waits, reads or writes files: those for logs, name
/// resolution and the like.
///
/// # Errors
///
/// The kernel's.
pub fn confine_auxiliary_thread() -> io::Result<()> {
    bound(Kept::Nothing)?;
    if USER_WILL_CHANGE.load(Relaxed) {
        return set(&[Capability::CAP_SETUID, Capability::CAP_SETGID], &[]);
    }
    keep(Kept::Nothing)
}

/// Takes out of the bounding set what no program needs.
pub(super) fn bound(kept: Kept) -> io::Result<()> {
    if !caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP).unwrap_or(false) {
        return Ok(());
    }
    let needed = kept.inherited();
    let bounding = caps::read(None, CapSet::Bounding).map_err(io::Error::other)?;
    for capability in bounding.into_iter().filter(|one| !needed.contains(one)) {
        caps::drop(None, CapSet::Bounding, capability).map_err(io::Error::other)?;
    }
    Ok(())
}

impl Kept {
    /// Of the thread itself.
    fn own(self) -> &'static [Capability] {
        match self {
            Self::Nothing => &[],
            Self::NetAdmin => &[Capability::CAP_NET_ADMIN],
            Self::NetAdminForPrograms => self.inherited(),
        }
    }

    /// Of the programs that it runs.
    fn inherited(self) -> &'static [Capability] {
        match self {
            Self::Nothing | Self::NetAdmin => &[],
            Self::NetAdminForPrograms => &[Capability::CAP_NET_ADMIN, Capability::CAP_NET_RAW],
        }
    }
}

/// Leaves the calling thread these capabilities.
pub(super) fn keep(kept: Kept) -> io::Result<()> {
    prctl::set_keepcaps(false)?;
    set(kept.own(), kept.inherited())
}

fn set(own: &[Capability], inherited: &[Capability]) -> io::Result<()> {
    let permitted = caps::read(None, CapSet::Permitted).map_err(io::Error::other)?;
    let allowed = |capabilities: &[Capability]| -> CapsHashSet {
        capabilities.iter().copied().filter(|capability| permitted.contains(capability)).collect()
    };
    // Ambient first: the others cannot lose what it still has. Each is a subset of the next.
    let steps = [
        (CapSet::Ambient, CapsHashSet::new()),
        (CapSet::Inheritable, allowed(inherited)),
        (CapSet::Effective, allowed(own)),
        (CapSet::Permitted, allowed(own)),
        (CapSet::Ambient, allowed(inherited)),
    ];
    for (which, capabilities) in steps {
        caps::set(None, which, &capabilities).map_err(io::Error::other)?;
    }
    Ok(())
}
