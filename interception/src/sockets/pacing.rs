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

/// The default of new sockets in the reading thread's namespace.
const DEFAULT: &str = "/proc/sys/net/ipv4/tcp_congestion_control";

/// The first one that is available and allowed (`net.ipv4.tcp_allowed_congestion_control`) is used.
const UNPACED: [&[u8]; 2] = [b"cubic", b"reno"];

/// A peer that answers within this time is near: usually in the same region. A busy peer or proxy
/// takes longer and does not count as near, which is harmless.
const NEAR: Duration = Duration::from_millis(5);

/// A congestion control that paces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pacing(Arc<str>);

impl Pacing {
    /// The namespace's default, if it paces.
    #[must_use]
    pub fn of_namespace() -> Option<Self> {
        let name = fs::read_to_string(DEFAULT).ok()?;
        Self::named(name.trim())
    }

    /// The namespace's default, as if it paced.
    #[cfg(test)]
    pub(super) fn testing() -> Self {
        let name = fs::read_to_string(DEFAULT).expect("a default");
        Self(name.trim().into())
    }

    fn named(name: &str) -> Option<Self> {
        name.starts_with("bbr").then(|| Self(name.into()))
    }

    /// Lets `socket`, and what a listener accepts, start without pacing.
    pub(super) fn postpone(&self, socket: &impl AsFd) {
        let socket = SockRef::from(socket);
        // Fails only if an administrator forbids all of them: then it paces.
        let _unpaced = UNPACED.iter().any(|name| socket.set_tcp_congestion(name).is_ok());
    }

    /// Starts pacing unless the peer has answered within the time of a near one.
    pub(super) fn decide(&self, socket: &impl AsFd, answered: Duration) {
        if answered >= NEAR {
            // Fails only for a connection that has ended.
            let _paced = SockRef::from(socket).set_tcp_congestion(self.0.as_bytes());
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_bbr_paces() {
        assert_eq!(Pacing::named("bbr"), Some(Pacing("bbr".into())));
        assert_eq!(Pacing::named("bbr2"), Some(Pacing("bbr2".into())));
        for unpaced in ["cubic", "reno", "dctcp", ""] {
            assert_eq!(Pacing::named(unpaced), None);
        }
    }
}
