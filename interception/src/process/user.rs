//! Changes the process to the user by which the rules of a profile identify the proxy.
//!
//! The capabilities of the threads meanwhile: `privileges.rs`.

use std::io;

use caps::Capability;
use nix::sys::prctl;
use nix::unistd::{Gid, Uid, getegid, geteuid, setgroups, setresgid, setresuid};
use underpass_config::{InboundMode, InterceptionSettings, Profile};

use crate::error::InterceptionError;
use crate::process::privileges::{
    Kept, MissingCapabilities, ProxyUser, announce_change_of_user, bound, keep,
};

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
        let missing = MissingCapabilities::of(&[Capability::CAP_SETUID, Capability::CAP_SETGID]);
        if missing.is_empty() {
            return Ok(Some(user));
        }
        Err(InterceptionError::WrongUser { is: uid.as_raw(), user, missing })
    }

    /// Announces the change to threads that are confined before it.
    pub fn announce(self) {
        announce_change_of_user(true);
    }

    /// Makes the process this user's, and leaves the calling thread no capability. There is no way
    /// back.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::BecomeUser`]: the kernel refused, as it does for a user that the user
    /// namespace does not have.
    pub fn become_it(self) -> Result<(), InterceptionError> {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        let become_it = || -> io::Result<()> {
            bound(Kept::Nothing)?;
            // What the process was allowed as a member of root's groups.
            setgroups(&[])?;
            setresgid(gid, gid, gid)?;
            setresuid(uid, uid, uid)?;
            announce_change_of_user(false);
            keep(Kept::Nothing)?;
            // The kernel sets it to fs.suid_dumpable with the user (proc(5)).
            prctl::set_dumpable(false)?;
            Ok(())
        };
        become_it().map_err(|source| InterceptionError::BecomeUser { user: self, source })
    }
}
