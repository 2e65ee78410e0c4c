//! Turns off the pacing of connections within the host and to near peers.
//!
//! A congestion control like BBR paces: it sends each segment from a timer. In bulk this costs a
//! quarter of the CPU time. Within a host no congestion exists, and over a short distance any
//! congestion control recovers from a loss at once. Elsewhere the choice of the administrator
//! (`net.ipv4.tcp_congestion_control`) remains. Without such a choice nothing is changed.
//!
//! The kernel starts pacing when a connection is established, and does not stop it when the
//! congestion control changes (`bbr_init`, net/ipv4/tcp_bbr.c). A connection therefore starts
//! without, and begins to pace once it turns out to be long.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use socket2::SockRef;
use underpass_config::PacedConnections;

/// The default of new sockets in the reading thread's namespace.
const DEFAULT: &str = "/proc/sys/net/ipv4/tcp_congestion_control";

/// The first one that is available and allowed (`net.ipv4.tcp_allowed_congestion_control`) is used.
const UNPACED: [&[u8]; 2] = [b"cubic", b"reno"];

/// A peer that answers within this time is near: usually in the same region. A busy peer or proxy
/// takes longer and does not count as near, which is harmless.
const NEAR: Duration = Duration::from_millis(5);

/// A congestion control that paces, and the connections that use it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pacing {
    name: Arc<str>,
    connections: PacedConnections,
}

impl Pacing {
    /// The namespace's default, if it paces.
    #[must_use]
    pub fn of_namespace(connections: PacedConnections) -> Option<Self> {
        let name = fs::read_to_string(DEFAULT).ok()?;
        let name = name.trim();
        paces(name).then(|| Self { name: name.into(), connections })
    }

    /// The namespace's default, as if it paced.
    #[cfg(test)]
    pub(super) fn testing(connections: PacedConnections) -> Self {
        let name = fs::read_to_string(DEFAULT).expect("a default");
        Self { name: name.trim().into(), connections }
    }

    /// Whether the distance of a peer decides whether its connection paces.
    pub(super) fn depends_on_distance(&self) -> bool {
        self.connections == PacedConnections::Distant
    }

    /// Sets how the connections of `listener` start. Another process may have set the opposite.
    pub(super) fn prepare(&self, listener: &impl AsFd, unpaced: bool) {
        if unpaced && self.depends_on_distance() {
            self.postpone(listener);
        } else {
            self.begin(listener);
        }
    }

    /// Lets `socket` start without pacing, unless all connections pace.
    pub(super) fn postpone(&self, socket: &impl AsFd) {
        if !self.depends_on_distance() {
            return;
        }
        let socket = SockRef::from(socket);
        // Fails only if an administrator forbids all of them: then it paces.
        let _unpaced = UNPACED.iter().any(|name| socket.set_tcp_congestion(name).is_ok());
    }

    /// Starts pacing unless the peer has answered within the time of a near one.
    pub(super) fn decide(&self, socket: &impl AsFd, answered: Duration) {
        if answered >= NEAR {
            self.begin(socket);
        }
    }

    fn begin(&self, socket: &impl AsFd) {
        // Fails only for a connection that has ended.
        let _paced = SockRef::from(socket).set_tcp_congestion(self.name.as_bytes());
    }
}

/// A connection whose distance is still unknown.
#[derive(Debug)]
pub struct UndecidedPacing {
    pacing: Pacing,
    socket: OwnedFd,
}

impl UndecidedPacing {
    pub(super) fn new(pacing: Pacing, socket: &impl AsFd) -> io::Result<Self> {
        Ok(Self { pacing, socket: socket.as_fd().try_clone_to_owned()? })
    }

    /// The peer has answered, after this time.
    pub fn decide(self, answered: Duration) {
        self.pacing.decide(&self.socket, answered);
    }
}

fn paces(congestion_control: &str) -> bool {
    congestion_control.starts_with("bbr")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_bbr_paces() {
        assert!(["bbr", "bbr2"].into_iter().all(paces));
        assert!(!["cubic", "reno", "dctcp", ""].into_iter().any(paces));
    }
}
