//! The wait before the next attempt of something that failed: it doubles up to a maximum, with
//! jitter so that the nodes of a cluster do not retry at the same moment.

use std::time::Duration;

/// Each wait is shortened by up to this percentage.
const JITTER_PERCENT: u32 = 25;

/// The waits of one series of failures.
#[derive(Debug)]
pub(crate) struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    /// Waits from `first` up to `longest`.
    pub(crate) fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, next: first }
    }

    /// The wait after one more failure.
    pub(crate) fn next(&mut self) -> Duration {
        let wait = self.next;
        self.next = wait.saturating_mul(2).min(self.longest);
        (wait / 100).saturating_mul(100 - fastrand::u32(0..=JITTER_PERCENT))
    }

    /// Starts a new series after a success.
    pub(crate) fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_maximum_and_restart_after_success() {
        let (first, longest) = (Duration::from_millis(10), Duration::from_secs(15));
        let mut backoff = Backoff::new(first, longest);
        for failures in 0..40 {
            let full = first.saturating_mul(2_u32.saturating_pow(failures)).min(longest);
            let wait = backoff.next();
            assert!(wait <= full && wait >= full * 3 / 4, "{wait:?} instead of {full:?}");
        }
        backoff.reset();
        assert!(backoff.next() <= first);
    }
}
