//! The limits of the process that a proxy with many connections has to raise.

use std::io;

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the soft limit of open files to the hard limit, and returns it: each proxied connection
/// needs two.
///
/// The soft limit is low for programs that use `select`, which we do not.
///
/// # Errors
///
/// The kernel refused to read or set the limit.
pub fn raise_open_files() -> io::Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}

/// Whether a system call failed because the process (EMFILE) or the system (ENFILE) has as many
/// open files as it may.
#[must_use]
pub fn is_out_of_files(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EMFILE | Errno::ENFILE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        let raised = raise_open_files().expect("the limit is raised");
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("the limit is read");
        assert_eq!((soft, hard), (raised, raised));
    }
}
