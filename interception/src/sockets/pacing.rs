//! Turns off pacing for connections within the host and to near peers.
//!
//! A congestion control such as BBR paces: it sends each segment from a timer. In bulk transfers
//! this costs a quarter of the CPU time. Within a host there is no congestion, and over a short
//! distance any congestion control recovers from a loss at once. For other connections the
//! administrator's choice (`net.ipv4.tcp_congestion_control`) stays; if it does not pace, nothing
//! is changed.
//!
//! The kernel starts pacing when a connection is established, and does not stop it when the
//! congestion control changes (`bbr_init`, net/ipv4/tcp_bbr.c). Therefore a connection starts
//! without pacing, and paces once its peer turns out to be distant.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use socket2::SockRef;
use underpass_config::PacedConnections;

/// The default congestion control of new sockets, in the namespace of the reading thread.
const DEFAULT_FILE: &str = "/proc/sys/net/ipv4/tcp_congestion_control";

/// Congestion controls without pacing. The first one that is available and allowed
/// (`net.ipv4.tcp_allowed_congestion_control`) is used.
const ALGORITHMS_WITHOUT_PACING: [&[u8]; 2] = [b"cubic", b"reno"];

/// A peer that answers within this time is near: usually in the same region. A busy peer or proxy
/// may take longer and counts as distant, which is harmless.
const MAX_NEAR_ANSWER_TIME: Duration = Duration::from_millis(5);

/// A congestion control that paces, and the connections that use it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pacing {
    name: Arc<str>,
    connections: PacedConnections,
}

impl Pacing {
    /// The namespace's default congestion control. `None` if it does not pace.
    #[must_use]
    pub fn of_namespace(connections: PacedConnections) -> Option<Self> {
        let name = fs::read_to_string(DEFAULT_FILE).ok()?;
        let name = name.trim();
        paces(name).then(|| Self { name: name.into(), connections })
    }

    /// The namespace's default congestion control, treated as if it paces.
    #[cfg(test)]
    pub(super) fn testing(connections: PacedConnections) -> Self {
        let name = fs::read_to_string(DEFAULT_FILE).expect("a default");
        Self { name: name.trim().into(), connections }
    }

    /// Returns true if a connection paces depending on the distance of its peer.
    pub(super) fn depends_on_distance(&self) -> bool {
        self.connections == PacedConnections::Distant
    }

    /// Sets whether the connections of `listener` start with pacing. Another process may have set
    /// the opposite.
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
        // Fails only if the administrator allows none of them: then the connection paces.
        let _unpaced =
            ALGORITHMS_WITHOUT_PACING.iter().any(|name| socket.set_tcp_congestion(name).is_ok());
    }

    /// Starts pacing, unless the peer answered so soon that it is near.
    pub(super) fn decide(&self, socket: &impl AsFd, answered: Duration) {
        if answered >= MAX_NEAR_ANSWER_TIME {
            self.begin(socket);
        }
    }

    fn begin(&self, socket: &impl AsFd) {
        // Fails only for a connection that has ended.
        let _paced = SockRef::from(socket).set_tcp_congestion(self.name.as_bytes());
    }
}

/// A connection to a peer of unknown distance.
#[derive(Debug)]
pub struct UndecidedPacing {
    pacing: Pacing,
    socket: OwnedFd,
}

impl UndecidedPacing {
    pub(super) fn new(pacing: Pacing, socket: &impl AsFd) -> io::Result<Self> {
        Ok(Self { pacing, socket: socket.as_fd().try_clone_to_owned()? })
    }

    /// Decides by the time after which the peer answered.
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
