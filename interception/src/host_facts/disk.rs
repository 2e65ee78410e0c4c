//! The free space of a file system, and whether it can be written to.

use std::io;
use std::path::Path;

use rustix::fs::{StatVfsMountFlags, statvfs};

use super::Usage;

/// The state of a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskUsage {
    /// The used and the whole space in bytes. Space that is reserved for root counts as used.
    pub bytes: Usage,
    /// Whether it is mounted read-only.
    pub is_read_only: bool,
}

/// The state of the file system with `path`.
///
/// # Errors
///
/// The path does not exist, or is not accessible.
pub fn disk_usage(path: &Path) -> io::Result<DiskUsage> {
    let status = statvfs(path)?;
    let bytes = |blocks: u64| blocks.saturating_mul(status.f_frsize);
    let (limit, free) = (bytes(status.f_blocks), bytes(status.f_bavail));
    let bytes = Usage { used: limit.saturating_sub(free), limit };
    Ok(DiskUsage { bytes, is_read_only: status.f_flag.contains(StatVfsMountFlags::RDONLY) })
}
