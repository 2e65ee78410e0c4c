//! Measures the traffic of a tunnel: the total, and the mean rate of the last second.

use std::sync::atomic::{AtomicU64, Ordering};

/// The memory in bytes that h2 needs for each unread DATA frame besides its payload.
const FRAME_COST: usize = 256;

/// The bytes of both directions. Counting costs one addition per read or write; the mean is updated
/// when data arrives. Times are milliseconds since the connection opened.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    pub(super) bytes: AtomicU64,
    /// The start of the current interval, and the value of `bytes` at that time.
    since: AtomicU64,
    bytes_before: AtomicU64,
    /// The mean rate of the previous interval, in bytes per second.
    mean: AtomicU64,
    receive_cost: AtomicU64,
}

impl Traffic {
    /// The length of an interval in milliseconds. Long enough to smooth bursts, short enough to
    /// detect a bulk transfer soon.
    const INTERVAL: u64 = 1000;

    pub(super) fn count(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn record_receipt(&self, now: u64) {
        let interval = now.saturating_sub(self.since.load(Ordering::Relaxed));
        if interval >= Self::INTERVAL {
            self.mean.store(self.mean_of(interval), Ordering::Relaxed);
            self.since.store(now, Ordering::Relaxed);
            self.bytes_before.store(self.bytes.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    pub(super) fn mean(&self, now: u64) -> u64 {
        match now.saturating_sub(self.since.load(Ordering::Relaxed)) {
            interval if interval >= Self::INTERVAL => self.mean_of(interval),
            _ => self.mean.load(Ordering::Relaxed),
        }
    }

    /// Counts a read of `bytes` in which `frames` DATA frames started. Returns the cost of the
    /// read.
    pub(super) fn count_received(&self, bytes: usize, frames: usize) -> usize {
        self.count(bytes);
        let cost = bytes + frames * FRAME_COST;
        // Load and store may be separate: one task reads a connection.
        self.receive_cost.store(self.receive_cost() + cost as u64, Ordering::Relaxed);
        cost
    }

    /// The cost of all received data in bytes: its length, and h2's memory for each DATA frame.
    pub(super) fn receive_cost(&self) -> u64 {
        self.receive_cost.load(Ordering::Relaxed)
    }

    fn mean_of(&self, interval: u64) -> u64 {
        let bytes = self.bytes.load(Ordering::Relaxed);
        bytes.saturating_sub(self.bytes_before.load(Ordering::Relaxed)).saturating_mul(1000)
            / interval.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_rate_follows_traffic() {
        let traffic = Traffic::default();
        let second = |now: u64, bytes: usize| {
            traffic.count(bytes);
            traffic.record_receipt(now * 1000);
            traffic.mean(now * 1000)
        };
        assert_eq!([second(1, 5000), second(2, 7000), second(3, 0)], [5000, 7000, 0]);
        assert_eq!(second(600, 0), 0);
        assert_eq!(second(601, 9000), 9000, "quiet minutes before do not count");
    }

    #[test]
    fn mean_rate_decays_without_traffic() {
        let traffic = Traffic::default();
        traffic.count(8000);
        assert_eq!([500, 1000, 2000, 8000].map(|now| traffic.mean(now)), [0, 8000, 4000, 1000]);
    }
}
