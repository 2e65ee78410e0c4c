//! The proxy's sockets: listeners, connections with marks and preserved source addresses, their
//! handover to another process or the supervisor, splicing between them, and Unix sockets that pass
//! descriptors.

mod descriptors;
pub(crate) mod handover;
pub(crate) mod listener;
pub(crate) mod listening;
pub(crate) mod local;
pub(crate) mod original_destination;
pub(crate) mod pacing;
pub(crate) mod peer;
pub(crate) mod seqpacket;
pub(crate) mod socket;
pub(crate) mod splice;
pub(crate) mod supervisor;

use std::net::SocketAddr;

/// Converts an IPv4-mapped address, which dual-stack sockets return, to IPv4.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
            Some(v4) => SocketAddr::from((v4, v6.port())),
            None => address,
        },
        SocketAddr::V4(_) => address,
    }
}
