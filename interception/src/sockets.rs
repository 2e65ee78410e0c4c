//! The sockets of the proxy: listeners, connections with marks and original sources, and their handover to another process.

pub(crate) mod handover;
pub(crate) mod listener;
pub(crate) mod local;
pub(crate) mod socket;
