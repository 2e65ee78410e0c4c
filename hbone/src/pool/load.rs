//! The load of a tunnel, from which the pool decides whether a stream fits and another dial pays.

use tokio::time::Instant;

/// Rate above which new streams use another tunnel: a quarter of a 1 Gbit/s link.
pub(super) const BUSY_BYTES_PER_SECOND: u64 = 32 << 20;

/// The load of a tunnel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    /// Whether it takes new streams: it is not closing, and both certificates are valid.
    pub(super) usable: bool,
    /// Number of reserved streams.
    pub(super) streams: usize,
    /// Time since there are none.
    pub(super) idle_since: Option<Instant>,
    /// Maximum that the peer allows, if it has set one.
    pub(super) allowed: Option<usize>,
    /// Data rate of both directions.
    pub(super) bytes_per_second: u64,
}

impl Load {
    /// The stream limit of the tunnel. Before the peer's SETTINGS arrive, the limit in its other
    /// tunnels applies. At least 1, so that a peer that allows none costs a reply timeout instead
    /// of endless dials.
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

    /// Whether the next stream justifies another dial. At half of the limit, the other half serves
    /// streams that arrive during the dial.
    pub(super) fn is_crowded(&self, limit: usize) -> bool {
        self.is_busy() || self.streams >= limit.div_ceil(2)
    }
}
