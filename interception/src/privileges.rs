//! Whom the proxy runs as: the user that the profile tells it by, with no more capabilities than it
//! still needs.
//!
//! Capabilities belong to threads: call this while there are no others that need any, and each
//! thread made afterwards has what the one that made it has.

use std::io;

use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl;
use nix::unistd::{Gid, Uid, getegid, geteuid, setgroups, setresgid, setresuid};
use underpass_config::{InboundMode, InterceptionSettings, Profile};

use crate::InterceptionError;

/// Whom a profile tells as its proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProxyUser {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

/// What stays after [`ProxyUser::become_it`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// No capability.
    Nothing,
    /// NET_ADMIN, to repair or remove rules, or to imitate clients.
    NetAdmin,
    /// NET_ADMIN and NET_RAW, for the programs of iptables too.
    NetAdminForPrograms,
}

impl ProxyUser {
    /// Whom the process has to become, so that the rules know its connections; `None` if they do as
    /// it is, or tell them otherwise.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::WrongUser`]: it would have to, and cannot.
    pub fn required(settings: &InterceptionSettings) -> Result<Option<Self>, InterceptionError> {
        match settings.profile {
            Profile::Ambient | Profile::None => return Ok(None),
            Profile::Sidecar | Profile::Osm => {}
        }
        let (uid, gid) = (geteuid(), getegid());
        if settings.proxy_uids.contains(&uid.as_raw())
            || settings.proxy_gids.contains(&gid.as_raw())
        {
            return Ok(None);
        }
        let first_gid = settings.proxy_gids.first();
        // Istio's own TPROXY rules know the proxy by its group; as their user, it would be caught again.
        let by_group = settings.exact && settings.inbound.mode == InboundMode::Tproxy;
        let first_uid = settings.proxy_uids.first().filter(|_| !by_group);
        let user = match (first_uid, first_gid) {
            (Some(&uid), gid) => Self { uid, gid: gid.copied().unwrap_or(uid) },
            (None, Some(&gid)) => Self { uid: uid.as_raw(), gid },
            (None, None) => return Ok(None),
        };
        let may = |capability| caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false);
        if may(Capability::CAP_SETUID) && may(Capability::CAP_SETGID) {
            return Ok(Some(user));
        }
        Err(InterceptionError::WrongUser { is: uid.as_raw(), user })
    }

    /// Makes the process this user's. There is no way back.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::BecomeUser`]: the kernel refused, as it does for a user that the user
    /// namespace does not have.
    pub fn become_it(self, kept: Kept) -> Result<(), InterceptionError> {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        let become_it = || -> io::Result<()> {
            // Else the kernel clears them with the user (capabilities(7)).
            prctl::set_keepcaps(true)?;
            // What the process was allowed as a member of root's groups.
            setgroups(&[])?;
            setresgid(gid, gid, gid)?;
            setresuid(uid, uid, uid)?;
            prctl::set_keepcaps(false)?;
            Ok(())
        };
        become_it()
            .and_then(|()| keep(kept))
            .map_err(|source| InterceptionError::BecomeUser { user: self, source })
    }
}

/// Gives up all capabilities of the calling thread, and with them those of the threads that it
/// makes.
///
/// # Errors
///
/// The kernel's.
pub fn drop_capabilities() -> io::Result<()> {
    keep(Kept::Nothing)
}

fn keep(kept: Kept) -> io::Result<()> {
    let (own, inherited): (&[Capability], &[Capability]) = match kept {
        Kept::Nothing => (&[], &[]),
        Kept::NetAdmin => (&[Capability::CAP_NET_ADMIN], &[]),
        Kept::NetAdminForPrograms => {
            const BOTH: &[Capability] = &[Capability::CAP_NET_ADMIN, Capability::CAP_NET_RAW];
            (BOTH, BOTH)
        }
    };
    let permitted = caps::read(None, CapSet::Permitted).map_err(io::Error::other)?;
    let set = |capabilities: &[Capability]| -> CapsHashSet {
        capabilities.iter().copied().filter(|capability| permitted.contains(capability)).collect()
    };
    // Ambient first: the others cannot lose what it still has. Each is a subset of the next.
    let steps = [
        (CapSet::Ambient, CapsHashSet::new()),
        (CapSet::Inheritable, set(inherited)),
        (CapSet::Effective, set(own)),
        (CapSet::Permitted, set(own)),
        (CapSet::Ambient, set(inherited)),
    ];
    for (which, capabilities) in steps {
        caps::set(None, which, &capabilities).map_err(io::Error::other)?;
    }
    Ok(())
}
