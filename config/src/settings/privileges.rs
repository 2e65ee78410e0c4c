//! The settings of how the privileges of the proxy are separated.

use super::Word;

/// How the privileges of the proxy are separated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrivilegesSettings {
    /// Whether the privileged part is a process of its own.
    pub broker: Broker,
    /// The user and group of the proxy process.
    pub user: u32,
}

/// Whether the privileged part is a process of its own, the broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broker {
    /// Yes, if the proxy process can change its user.
    Auto,
    /// No: one process.
    Off,
}

impl Word for Broker {
    const WORDS: &'static [(&'static str, Self)] = &[("auto", Self::Auto), ("off", Self::Off)];
}
