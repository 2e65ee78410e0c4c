//! Counts a peer's activity on a connection: useful traffic, refused requests, the unfinished
//! frame, and the first exceeded limit.
//!
//! Streams update the counters, and the connection's task reads them. `inspect` checks frames,
//! `server` checks requests.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use crate::tunnel::inspect::{TunnelLimit, UnfinishedFrame};

/// Useful data is counted in units of this many bytes.
const USEFUL_UNIT: usize = 4 << 10;

/// The counters of one connection.
#[derive(Debug, Default)]
pub(crate) struct PeerActivity {
    useful: AtomicU64,
    refused: AtomicU64,
    /// Zero if no frame is unfinished. Otherwise (time + 1) << 1, with bit 0 set for a DATA frame.
    unfinished: AtomicU64,
    exceeded: OnceLock<TunnelLimit>,
    /// The cost of the small DATA frames that were sent, in the accounting of the peer's h2. An
    /// upper bound.
    small_frame_debt: AtomicU64,
    /// True if the peer accepts as many small frames as underpass does.
    accepts_small_frames: AtomicBool,
}

impl PeerActivity {
    /// Counts data that an application sent or received, or a request to the peer.
    pub(crate) fn count_useful(&self, bytes: usize) {
        self.useful.fetch_add(1 + (bytes / USEFUL_UNIT) as u64, Relaxed);
    }

    pub(crate) fn useful(&self) -> u64 {
        self.useful.load(Relaxed)
    }

    /// Counts a request of the peer that was denied or malformed.
    pub(crate) fn count_refused(&self) {
        self.refused.fetch_add(1, Relaxed);
    }

    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Relaxed)
    }

    pub(crate) fn set_unfinished(&self, unfinished: Option<UnfinishedFrame>) {
        let encode = |UnfinishedFrame { since, data }| ((since + 1) << 1) | u64::from(data);
        self.unfinished.store(unfinished.map_or(0, encode), Relaxed);
    }

    pub(crate) fn unfinished(&self) -> Option<UnfinishedFrame> {
        let encoded = self.unfinished.load(Relaxed);
        let since = (encoded >> 1).checked_sub(1)?;
        Some(UnfinishedFrame { since, data: encoded & 1 == 1 })
    }

    pub(crate) fn small_frame_debt(&self) -> u64 {
        self.small_frame_debt.load(Relaxed)
    }

    pub(crate) fn add_small_frame_debt(&self, cost: u64) {
        self.small_frame_debt.fetch_add(cost, Relaxed);
    }

    pub(crate) fn reduce_small_frame_debt(&self, cost: u64) {
        // Load and store may be separate: all streams of a connection run on one thread.
        self.small_frame_debt.store(self.small_frame_debt().saturating_sub(cost), Relaxed);
    }

    pub(crate) fn accepts_small_frames(&self) -> bool {
        self.accepts_small_frames.load(Relaxed)
    }

    pub(crate) fn set_accepts_small_frames(&self) {
        self.accepts_small_frames.store(true, Relaxed);
    }

    /// Records the limit that the peer exceeded. Keeps only the first one.
    pub(crate) fn exceed(&self, limit: TunnelLimit) {
        let _first = self.exceeded.set(limit);
    }

    pub(crate) fn exceeded(&self) -> Option<TunnelLimit> {
        self.exceeded.get().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unfinished_frame_is_stored_and_read_unchanged() {
        let activity = PeerActivity::default();
        assert_eq!(activity.unfinished(), None);
        for since in [0, 1, 1 << 40] {
            for data in [false, true] {
                let unfinished = Some(UnfinishedFrame { since, data });
                activity.set_unfinished(unfinished);
                assert_eq!(activity.unfinished(), unfinished);
            }
        }
        activity.set_unfinished(None);
        assert_eq!(activity.unfinished(), None);
    }
}
