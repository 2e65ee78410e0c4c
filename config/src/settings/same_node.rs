//! The setting that decides how two pods of one process are connected.

use super::Word;

/// The path of a connection to another pod of the same process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SameNode {
    /// By a tunnel, like a connection to any other pod.
    Tunnel,
    /// Inside the process, after the same policy decisions.
    Direct,
}

impl Word for SameNode {
    const WORDS: &'static [(&'static str, Self)] =
        &[("tunnel", Self::Tunnel), ("direct", Self::Direct)];
}
