//! The back-off after failures: it doubles up to a maximum. Jitter keeps the nodes of a cluster
//! from retrying at the same moment.

use std::time::Duration;

/// The maximum fraction by which jitter shortens a wait.
const JITTER: f64 = 0.25;

/// The wait after `failures` earlier consecutive failures: from `first` to `longest`, less the
/// jitter. `chance` is from 0 to 1.
pub(crate) fn wait(first: Duration, longest: Duration, failures: u32, chance: f64) -> Duration {
    let doubled = first.saturating_mul(2_u32.saturating_pow(failures));
    doubled.min(longest).mul_f64(1.0 - JITTER * chance)
}

/// The waits during a series of consecutive failures.
#[derive(Debug)]
pub(crate) struct Backoff {
    first: Duration,
    longest: Duration,
    failures: u32,
}

impl Backoff {
    /// Creates a back-off that waits from `first` up to `longest`.
    pub(crate) fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, failures: 0 }
    }

    /// The wait after one more failure.
    pub(crate) fn next(&mut self) -> Duration {
        let wait = wait(self.first, self.longest, self.failures, fastrand::f64());
        self.failures = self.failures.saturating_add(1);
        wait
    }

    /// The wait after an attempt that succeeded for this long and then failed. If that is at least
    /// the longest wait, the attempt ends the series.
    pub(crate) fn next_after(&mut self, lasted: Duration) -> Duration {
        if lasted >= self.longest {
            self.reset();
        }
        self.next()
    }

    /// Ends the series, after a success.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
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

    #[test]
    fn only_attempt_that_lasted_long_ends_series_of_failures() {
        let (first, longest) = (Duration::from_millis(10), Duration::from_secs(15));
        let mut backoff = Backoff::new(first, longest);
        for lasted in [Duration::ZERO, longest - first, longest / 2] {
            backoff.next_after(lasted);
        }
        assert!(backoff.next_after(longest - first) > first * 4);
        assert!(backoff.next_after(longest) <= first);
        assert!(backoff.next_after(Duration::ZERO) > first);
    }
}
