//! Changes this process to another user without any privilege, and checks whether a new process can
//! do that.

use std::fs;
use std::io;

use caps::Capability;
use nix::sys::prctl;
use nix::sys::signal::Signal;
use thiserror::Error;

use crate::error::InterceptionError;
use crate::process::privileges::{MissingCapabilities, ProxyUser, confine_process};
use crate::process::user_ids::UserIds;

/// The reason why a new process cannot change to another user.
#[derive(Debug, Error)]
pub enum SeparationError {
    /// Capabilities are missing.
    #[error("missing capabilities: {0}")]
    Capabilities(MissingCapabilities),
    /// The user namespace lacks the user or group.
    #[error("this user namespace has no {0} {1}")]
    Unmapped(&'static str, u32),
    /// The user namespace allows no change of groups.
    #[error("this user namespace allows no setgroups")]
    Groups,
    /// /proc is unreadable.
    #[error("cannot read {0}")]
    Proc(&'static str, #[source] io::Error),
}

const SETGROUPS: &str = "/proc/self/setgroups";

impl ProxyUser {
    /// Checks whether a new process can become this user.
    ///
    /// # Errors
    ///
    /// The reason why it cannot.
    pub fn check_separation(self) -> Result<(), SeparationError> {
        let missing = MissingCapabilities::of(&[Capability::CAP_SETUID, Capability::CAP_SETGID]);
        if !missing.is_empty() {
            return Err(SeparationError::Capabilities(missing));
        }
        let (users, groups) = (UserIds::of_users(), UserIds::of_groups());
        for (ids, kind, id) in [(users, "user", self.uid), (groups, "group", self.gid)] {
            check_mapped(&ids, kind, id)?;
        }
        let setgroups = fs::read_to_string(SETGROUPS);
        let setgroups = setgroups.map_err(|error| SeparationError::Proc(SETGROUPS, error))?;
        if setgroups.trim() == "deny" {
            return Err(SeparationError::Groups);
        }
        Ok(())
    }

    /// Becomes this user without any capability. The kernel kills this process when the thread that
    /// started it ends, if that thread has the capability KILL. Call it while the process has one
    /// thread.
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub fn separate(self) -> Result<(), InterceptionError> {
        self.switch()?;
        // A change of the user resets the signal (commit_creds, kernel/cred.c).
        let confine = || -> io::Result<()> {
            confine_process()?;
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            Ok(())
        };
        confine().map_err(|source| InterceptionError::BecomeUser { user: self, source })
    }
}

/// Fails unless the user namespace is known to have this user or group.
fn check_mapped(ids: &UserIds, kind: &'static str, id: u32) -> Result<(), SeparationError> {
    if !ids.is_known() || !ids.contain(id) {
        return Err(SeparationError::Unmapped(kind, id));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn separation_needs_user_that_is_known_to_exist() {
        let check = |map: &str, id| check_mapped(&UserIds::parse(map), "user", id);
        for map in ["", "0 0", "a b c", "0 1000 1\n"] {
            let error = check(map, 15008).unwrap_err();
            assert!(matches!(error, SeparationError::Unmapped("user", 15008)), "{map:?}: {error}");
        }
        check("0 1000 1\n1 100000 65536\n", 15008).unwrap();
    }
}
