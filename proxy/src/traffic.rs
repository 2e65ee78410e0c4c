//! The data path: from accepting a connection to its last byte.

pub(crate) mod accept;
pub(crate) mod accepted;
pub(crate) mod copy;
pub(crate) mod dial;
pub(crate) mod drain;
pub(crate) mod headers;
pub(crate) mod inbound;
pub(crate) mod inbound_drain;
pub(crate) mod listeners;
pub(crate) mod outbound;
mod own_addresses;
pub(crate) mod proxy_protocol;
