//! The load of a tunnel. It decides whether another stream fits, and whether another dial is
//! useful.

use tokio::time::Instant;

/// The data rate above which new streams use another tunnel: a quarter of a 1 Gbit/s link.
pub(super) const BUSY_BYTES_PER_SECOND: u64 = 32 << 20;

/// The load of a tunnel.
#[derive(Debug, Clone, Copy)]
pub(super) struct TunnelLoad {
    /// True if the tunnel takes new streams: it is not closing, and both certificates are valid.
    pub(super) usable: bool,
    pub(super) streams: usize,
    /// The time at which the last stream ended. `None` while there are streams.
    pub(super) idle_since: Option<Instant>,
    /// The maximum number of streams that the peer allows. `None` until the peer sets one.
    pub(super) allowed: Option<usize>,
    /// The data rate of both directions together.
    pub(super) bytes_per_second: u64,
}

impl TunnelLoad {
    /// The stream limit of the tunnel. `of_other_tunnels` is the limit that the peer set in other
    /// tunnels; it applies until this tunnel receives SETTINGS. At least 1: a peer that allows no
    /// stream costs a reply timeout instead of endless dials.
    pub(super) fn limit(
        &self,
        streams_per_tunnel: usize,
        of_other_tunnels: Option<usize>,
    ) -> usize {
        let allowed = self.allowed.or(of_other_tunnels).unwrap_or(usize::MAX);
        streams_per_tunnel.min(allowed).max(1)
    }

    pub(super) fn is_busy(&self) -> bool {
        self.bytes_per_second >= BUSY_BYTES_PER_SECOND
    }

    /// Returns true if the next stream justifies another dial. At half of the limit: the other half
    /// serves streams that arrive during the dial.
    pub(super) fn is_crowded(&self, limit: usize) -> bool {
        self.is_busy() || self.streams >= limit.div_ceil(2)
    }
}
