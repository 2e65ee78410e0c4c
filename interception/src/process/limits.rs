//! Raises process limits for a proxy with many connections.

use std::io;

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the soft limit of open files to the hard limit. Returns the new limit.
///
/// Each proxied connection needs two descriptors. The soft limit is low only for programs that use
/// `select`.
///
/// # Errors
///
/// The kernel rejected reading or changing the limit.
pub fn raise_open_files() -> io::Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}

/// Returns true if a system call failed because the process (EMFILE) or the system (ENFILE) reached
/// its limit of open files.
#[must_use]
pub fn is_out_of_files(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EMFILE | Errno::ENFILE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raises_soft_limit_to_hard_limit() {
        let raised = raise_open_files().expect("the limit is raised");
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("the limit is read");
        assert_eq!((soft, hard), (raised, raised));
    }
}
