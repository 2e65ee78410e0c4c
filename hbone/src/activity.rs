//! Counters of a peer's behaviour, shared by the parts of one connection: useful traffic, refused
//! requests, the unfinished frame, and the exceeded limit.
//!
//! Not here: judging frames (`inspect.rs`) and requests (`server.rs`).

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use crate::inspect::{TunnelLimit, Unfinished};

/// A chunk of data is useful traffic, and so is each further one of these parts of it, in bytes.
const PART: usize = 4 << 10;

/// Counted by the streams and read by the task that drives the connection.
#[derive(Debug, Default)]
pub(crate) struct PeerActivity {
    useful: AtomicU64,
    refused: AtomicU64,
    /// 0 if no frame is unfinished; otherwise (time + 1) << 1, with bit 0 set for a DATA frame.
    unfinished: AtomicU64,
    exceeded: OnceLock<TunnelLimit>,
    /// What our small DATA frames cost the peer, as h2 counts it, for all that we know.
    owed: AtomicU64,
    /// Whether the peer accepts as many small frames as we do.
    accepts_small_frames: AtomicBool,
}

impl PeerActivity {
    /// Counts data that an application sent or received, or a request of ours.
    pub(crate) fn count_useful(&self, bytes: usize) {
        self.useful.fetch_add(1 + (bytes / PART) as u64, Relaxed);
    }

    pub(crate) fn useful(&self) -> u64 {
        self.useful.load(Relaxed)
    }

    /// Counts a request of the peer that was not allowed, or was none.
    pub(crate) fn count_refused(&self) {
        self.refused.fetch_add(1, Relaxed);
    }

    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Relaxed)
    }

    pub(crate) fn note_unfinished(&self, unfinished: Option<Unfinished>) {
        let encode = |Unfinished { since, data }| ((since + 1) << 1) | u64::from(data);
        self.unfinished.store(unfinished.map_or(0, encode), Relaxed);
    }

    pub(crate) fn unfinished(&self) -> Option<Unfinished> {
        let encoded = self.unfinished.load(Relaxed);
        let since = (encoded >> 1).checked_sub(1)?;
        Some(Unfinished { since, data: encoded & 1 == 1 })
    }

    pub(crate) fn owed(&self) -> u64 {
        self.owed.load(Relaxed)
    }

    pub(crate) fn owe(&self, cost: u64) {
        self.owed.fetch_add(cost, Relaxed);
    }

    pub(crate) fn owe_less(&self, cost: u64) {
        // All streams of a connection are served by one thread: nothing is lost between the two.
        self.owed.store(self.owed().saturating_sub(cost), Relaxed);
    }

    pub(crate) fn accepts_small_frames(&self) -> bool {
        self.accepts_small_frames.load(Relaxed)
    }

    pub(crate) fn set_accepts_small_frames(&self) {
        self.accepts_small_frames.store(true, Relaxed);
    }

    /// Notes which limit the peer exceeded. The first one stays.
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
    fn unfinished_frame_is_read_as_it_was_noted() {
        let activity = PeerActivity::default();
        assert_eq!(activity.unfinished(), None);
        for since in [0, 1, 1 << 40] {
            for data in [false, true] {
                let unfinished = Some(Unfinished { since, data });
                activity.note_unfinished(unfinished);
                assert_eq!(activity.unfinished(), unfinished);
            }
        }
        activity.note_unfinished(None);
        assert_eq!(activity.unfinished(), None);
    }
}
