//! The privileges of the proxy: its user, and the capabilities that each thread keeps.
//!
//! A new thread inherits the capabilities of the thread that creates it. The process drops them in
//! steps: [`confine_process`] first, then [`confine_auxiliary_thread`] for each auxiliary thread.
//! Once the rules are installed, [`confine_thread`] confines the namespaces thread and the control
//! thread, which starts the workers.
//!
//! The C library changes the user of all threads, and ends the process unless all succeed or all
//! fail (setxid in nptl(7)). Until then auxiliary threads keep SETUID and SETGID; the kernel clears
//! both when they stop being root (capabilities(7)). A thread whose capabilities must survive the
//! change calls [`prepare_change_of_user`] before it and [`confine_thread`] after it.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl;

/// True if the process will change its user.
static USER_WILL_CHANGE: AtomicBool = AtomicBool::new(false);

/// The user and group by which a profile identifies its proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProxyUser {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

/// The capabilities that a thread keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeptCapabilities {
    /// No capability.
    Nothing,
    /// KILL, to end a child process of another user.
    Kill,
    /// NET_ADMIN, to repair or remove rules, and to open sockets with marks or foreign source
    /// addresses.
    NetAdmin,
    /// NET_ADMIN and NET_RAW, also for the iptables programs.
    NetAdminForPrograms,
    /// NET_ADMIN, and SYS_ADMIN to enter the namespaces of a node's pods.
    Namespaces {
        /// True to keep NET_RAW too, because iptables programs may be needed.
        programs: bool,
    },
}

const NET_ADMIN: Capability = Capability::CAP_NET_ADMIN;
const NET_RAW: Capability = Capability::CAP_NET_RAW;
const SYS_ADMIN: Capability = Capability::CAP_SYS_ADMIN;

/// The required capabilities that the calling thread lacks.
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

/// Prints names like container runtimes, without `CAP_`: `SETUID, SETGID`.
impl fmt::Display for MissingCapabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        let names: Vec<&str> = names.iter().map(|name| name.trim_start_matches("CAP_")).collect();
        f.write_str(&names.join(", "))
    }
}

/// Announces a change of user to threads that are confined before it. `is_planned` is false after
/// the change.
pub(super) fn announce_change_of_user(is_planned: bool) {
    USER_WILL_CHANGE.store(is_planned, Relaxed);
}

/// Returns true if this thread lacks NET_ADMIN. Returns false if capget(2) fails: the operation
/// itself then reports the error.
pub(crate) fn lacks_net_admin() -> bool {
    caps::has_cap(None, CapSet::Effective, Capability::CAP_NET_ADMIN).is_ok_and(|has| !has)
}

/// Returns true if this thread may send signals to processes of other users.
#[must_use]
pub fn may_signal_other_users() -> bool {
    MissingCapabilities::of(&[Capability::CAP_KILL]).is_empty()
}

/// Confines the whole process. Programs that it runs gain no privileges (no_new_privs). It is not
/// dumpable: other processes of its user can neither trace it nor read its memory, which contains
/// private keys. Call this while there is one thread.
///
/// # Errors
///
/// The kernel rejected the operation.
pub fn confine_process() -> io::Result<()> {
    prctl::set_no_new_privs()?;
    prctl::set_dumpable(false)?;
    Ok(())
}

/// Makes the permitted capabilities of this thread effective: those of the binary's file
/// (`setcap cap_net_admin=p`). If they were effective in the file, the kernel would refuse to
/// execute it in a container without NET_ADMIN. Call this while there is one thread.
///
/// # Errors
///
/// The kernel rejected the operation.
pub fn raise_capabilities() -> io::Result<()> {
    let permitted = caps::read(None, CapSet::Permitted).map_err(io::Error::other)?;
    caps::set(None, CapSet::Effective, &permitted).map_err(io::Error::other)
}

/// Preserves the capabilities of the calling thread across a change of user, until
/// [`confine_thread`] reduces them to `kept`.
///
/// # Errors
///
/// The kernel rejected the operation.
pub fn prepare_change_of_user(kept: KeptCapabilities) -> io::Result<()> {
    // SETPCAP must still be effective for this.
    reduce_bounding_set(kept)?;
    // Otherwise the kernel clears the capabilities when the user changes (capabilities(7)).
    prctl::set_keepcaps(true)?;
    Ok(())
}

/// Reduces the calling thread to these capabilities, and its bounding set to those that its
/// programs need. New threads inherit both. Without SETPCAP, which some containers lack, the
/// bounding set stays.
///
/// # Errors
///
/// The kernel rejected the operation.
pub fn confine_thread(kept: KeptCapabilities) -> io::Result<()> {
    reduce_bounding_set(kept)?;
    reduce_capabilities(kept)
}

/// Drops all capabilities of a thread that only waits, or reads and writes files, such as those for
/// logs and name resolution.
///
/// # Errors
///
/// The kernel rejected the operation.
pub fn confine_auxiliary_thread() -> io::Result<()> {
    reduce_bounding_set(KeptCapabilities::Nothing)?;
    if USER_WILL_CHANGE.load(Relaxed) {
        return set(&[Capability::CAP_SETUID, Capability::CAP_SETGID], &[]);
    }
    reduce_capabilities(KeptCapabilities::Nothing)
}

/// Removes all capabilities that no program needs from the bounding set.
pub(super) fn reduce_bounding_set(kept: KeptCapabilities) -> io::Result<()> {
    if !caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP).unwrap_or(false) {
        return Ok(());
    }
    let needed = kept.of_programs();
    let bounding = caps::read(None, CapSet::Bounding).map_err(io::Error::other)?;
    for capability in bounding.into_iter().filter(|one| !needed.contains(one)) {
        caps::drop(None, CapSet::Bounding, capability).map_err(io::Error::other)?;
    }
    Ok(())
}

impl KeptCapabilities {
    /// The capabilities that the thread itself keeps.
    fn of_thread(self) -> &'static [Capability] {
        match self {
            Self::Nothing => &[],
            Self::Kill => &[Capability::CAP_KILL],
            Self::NetAdmin => &[NET_ADMIN],
            Self::NetAdminForPrograms => self.of_programs(),
            Self::Namespaces { programs: false } => &[SYS_ADMIN, NET_ADMIN],
            Self::Namespaces { programs: true } => &[SYS_ADMIN, NET_ADMIN, NET_RAW],
        }
    }

    /// The capabilities that its programs inherit.
    fn of_programs(self) -> &'static [Capability] {
        match self {
            Self::Nothing | Self::Kill | Self::NetAdmin | Self::Namespaces { programs: false } => {
                &[]
            }
            Self::NetAdminForPrograms | Self::Namespaces { programs: true } => {
                &[NET_ADMIN, NET_RAW]
            }
        }
    }
}

/// Reduces the calling thread to these capabilities.
pub(super) fn reduce_capabilities(kept: KeptCapabilities) -> io::Result<()> {
    prctl::set_keepcaps(false)?;
    set(kept.of_thread(), kept.of_programs())
}

fn set(own: &[Capability], inherited: &[Capability]) -> io::Result<()> {
    let permitted = caps::read(None, CapSet::Permitted).map_err(io::Error::other)?;
    let allowed = |capabilities: &[Capability]| -> CapsHashSet {
        capabilities.iter().copied().filter(|capability| permitted.contains(capability)).collect()
    };
    // Ambient first, because each set must be a subset of the next one.
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
