//! The sockets of the proxy: listeners, connections with marks and original sources, their handover
//! to another process, and splicing between them; and Unix sockets that pass descriptors.

mod descriptors;
pub(crate) mod handover;
pub(crate) mod listener;
pub(crate) mod local;
pub(crate) mod pacing;
pub(crate) mod peer;
pub(crate) mod seqpacket;
pub(crate) mod socket;
pub(crate) mod splice;

use std::net::SocketAddr;

/// The address without the IPv4-mapped form that dual-stack sockets give.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
            Some(v4) => SocketAddr::from((v4, v6.port())),
            None => address,
        },
        SocketAddr::V4(_) => address,
    }
}
