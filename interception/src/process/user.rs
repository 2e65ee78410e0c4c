//! Changes the process to the user by which the rules identify the proxy.
//!
//! `privileges` describes the capabilities of the threads in the meantime.

use std::io;

use caps::Capability;
use nix::sys::prctl;
use nix::unistd::{
    Gid, Uid, getegid, geteuid, setfsgid, setfsuid, setgroups, setresgid, setresuid,
};
use underpass_config::{InboundMode, InterceptionSettings, Profile};

use crate::error::InterceptionError;
use crate::process::privileges::{
    KeptCapabilities, MissingCapabilities, ProxyUser, announce_change_of_user, reduce_bounding_set,
    reduce_capabilities,
};

impl ProxyUser {
    /// The user that the process must change to, so that the rules recognize its connections.
    /// `None` if it runs as this user already, or if the rules use another criterion.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::WrongUser`] if the change is required but impossible.
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
        // Istio's own TPROXY rules recognize the proxy by its group. They would capture its
        // connections if the proxy also ran as the user that they match.
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

    /// Changes the user of the process permanently, and drops all capabilities of the calling
    /// thread.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::BecomeUser`] if the kernel refused, for example because the user
    /// namespace lacks this user.
    pub fn switch(self) -> Result<(), InterceptionError> {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        let switch = || -> io::Result<()> {
            reduce_bounding_set(KeptCapabilities::Nothing)?;
            // Drop the supplementary groups of root.
            setgroups(&[])?;
            setresgid(gid, gid, gid)?;
            setresuid(uid, uid, uid)?;
            announce_change_of_user(false);
            reduce_capabilities(KeptCapabilities::Nothing)?;
            // The kernel resets the flag to fs.suid_dumpable when the user changes (proc(5)).
            prctl::set_dumpable(false)?;
            Ok(())
        };
        switch().map_err(|source| InterceptionError::BecomeUser { user: self, source })
    }
}

/// Lets `user` own the files and sockets that the calling thread opens from now on.
pub(crate) fn own_files_as(user: ProxyUser) {
    setfsgid(Gid::from_raw(user.gid));
    setfsuid(Uid::from_raw(user.uid));
}

/// Opens a socket or file that `user` owns, for rules that match the owner of a packet's socket
/// (`xt_owner`: `f_cred->fsuid`). Affects only the calling thread.
pub(crate) fn as_user<T>(user: Option<ProxyUser>, open: impl FnOnce() -> T) -> T {
    let Some(ProxyUser { uid, gid }) = user else { return open() };
    let (own_uid, own_gid) = (setfsuid(Uid::from_raw(uid)), setfsgid(Gid::from_raw(gid)));
    let opened = open();
    setfsgid(own_gid);
    setfsuid(own_uid);
    opened
}
