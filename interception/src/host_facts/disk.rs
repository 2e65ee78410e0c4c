//! The free space of a file system.

use std::io;
use std::path::Path;

use rustix::fs::statvfs;

use super::Usage;

/// The used and the whole space of the file system with `path`, in bytes. Space that is reserved
/// for root counts as used.
///
/// # Errors
///
/// The path does not exist, or is not accessible.
pub fn disk_usage(path: &Path) -> io::Result<Usage> {
    let status = statvfs(path)?;
    let bytes = |blocks: u64| blocks.saturating_mul(status.f_frsize);
    let (limit, free) = (bytes(status.f_blocks), bytes(status.f_bavail));
    Ok(Usage { used: limit.saturating_sub(free), limit })
}
