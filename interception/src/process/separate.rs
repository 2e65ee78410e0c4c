//! Changes this process to another user without any privilege, and checks whether a new process can
//! do that.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;

use caps::Capability;
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::geteuid;
use thiserror::Error;

use crate::error::InterceptionError;
use crate::process::privileges::{
    KeptCapabilities, MissingCapabilities, ProxyUser, confine_process, reduce_capabilities,
};
use crate::process::user::own_files_as;
use crate::process::user_ids::UserIds;

/// The reason why a new process cannot change to another user.
#[derive(Debug, Error)]
pub enum SeparationError {
    /// Capabilities are missing.
    #[error("missing capabilities: {0}")]
    Capabilities(MissingCapabilities),
    /// It is the user of this process.
    #[error("this process has the user {0} too")]
    SameUser(u32),
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
        if geteuid().as_raw() == self.uid {
            return Err(SeparationError::SameUser(self.uid));
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

    /// The first of these files that this user is not permitted to read.
    ///
    /// The check keeps the supplementary groups of this process, which the proxy process does not
    /// have: a file that only they may read passes, and the proxy process then fails to start.
    ///
    /// # Errors
    ///
    /// The kernel rejected the operation.
    pub fn first_unreadable(self, files: &[PathBuf]) -> io::Result<Option<&Path>> {
        let is_forbidden = |file: &&PathBuf| {
            File::open(file).is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
        };
        let find = || -> io::Result<Option<&Path>> {
            // Both calls affect only this thread.
            own_files_as(self);
            reduce_capabilities(KeptCapabilities::Nothing)?;
            Ok(files.iter().find(is_forbidden).map(PathBuf::as_path))
        };
        thread::scope(|scope| {
            let thread = thread::Builder::new().name("file access".to_owned());
            let found = thread.spawn_scoped(scope, find)?.join();
            found.unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
        })
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
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn file_of_another_user_without_permissions_is_unreadable() {
        let files = ["open", "closed"].map(|name| {
            let name = format!("underpass-{name}-{}", std::process::id());
            std::env::temp_dir().join(name)
        });
        for (file, mode) in files.iter().zip([0o604, 0o600]) {
            fs::write(file, "").unwrap();
            fs::set_permissions(file, fs::Permissions::from_mode(mode)).unwrap();
        }
        let user = ProxyUser { uid: 15008, gid: 15008 };
        let absent = PathBuf::from("/nonexistent/file");
        let unreadable =
            |files: &[PathBuf]| user.first_unreadable(files).unwrap().map(Path::to_path_buf);
        let [open, closed] = files.clone();
        let (found, none) = (
            unreadable(&[absent.clone(), open.clone(), closed.clone()]),
            unreadable(&[absent, open]),
        );
        // Still permitted on this thread.
        let own = File::open(&closed);
        files.iter().for_each(|file| fs::remove_file(file).unwrap());
        own.unwrap();
        assert_eq!(none, None);
        // An unprivileged test cannot change the user of its file accesses.
        if geteuid().is_root() {
            assert_eq!(found, Some(closed));
        }
    }

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
