//! Makes this process one of another user without any privilege, and checks whether a new process
//! can do that.

use std::fs;
use std::io;

use caps::Capability;
use nix::sys::prctl;
use nix::sys::signal::Signal;
use thiserror::Error;

use crate::error::InterceptionError;
use crate::process::privileges::{MissingCapabilities, ProxyUser, confine_process};

/// Why a new process cannot change to another user.
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

const UID_MAP: &str = "/proc/self/uid_map";
const GID_MAP: &str = "/proc/self/gid_map";
const SETGROUPS: &str = "/proc/self/setgroups";

impl ProxyUser {
    /// Whether a new process can become this user.
    ///
    /// # Errors
    ///
    /// The reason why it cannot.
    pub fn check_separation(self) -> Result<(), SeparationError> {
        let missing = MissingCapabilities::of(&[Capability::CAP_SETUID, Capability::CAP_SETGID]);
        if !missing.is_empty() {
            return Err(SeparationError::Capabilities(missing));
        }
        for (file, kind, id) in [(UID_MAP, "user", self.uid), (GID_MAP, "group", self.gid)] {
            let map =
                fs::read_to_string(file).map_err(|error| SeparationError::Proc(file, error))?;
            if !is_mapped(&map, id) {
                return Err(SeparationError::Unmapped(kind, id));
            }
        }
        let setgroups = fs::read_to_string(SETGROUPS);
        let setgroups = setgroups.map_err(|error| SeparationError::Proc(SETGROUPS, error))?;
        if setgroups.trim() == "deny" {
            return Err(SeparationError::Groups);
        }
        Ok(())
    }

    /// Becomes this user without any capability. The kernel kills this process when the thread that
    /// started it ends, if that thread has the capability KILL. Call it while there is one
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

/// Whether a map of ids (user_namespaces(7)) has `id`: each line is the first id inside, the first
/// one outside, and their number.
fn is_mapped(map: &str, id: u32) -> bool {
    map.lines().any(|line| {
        let numbers: Vec<u32> =
            line.split_whitespace().filter_map(|one| one.parse().ok()).collect();
        let [first, _, count] = numbers[..] else { return false };
        id.checked_sub(first).is_some_and(|offset| offset < count)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_ids_in_map_of_user_namespace() {
        let all = "         0          0 4294967295\n";
        assert!(is_mapped(all, 0) && is_mapped(all, 15008) && !is_mapped(all, u32::MAX));
        let one = "         0       1000          1\n";
        assert!(is_mapped(one, 0) && !is_mapped(one, 1) && !is_mapped(one, 15008));
        let two = "0 1000 1\n1 100000 65536\n";
        assert!(is_mapped(two, 15008) && !is_mapped(two, 65537));
        assert!(!is_mapped("", 0) && !is_mapped("0 0", 0) && !is_mapped("a b c", 0));
    }
}
