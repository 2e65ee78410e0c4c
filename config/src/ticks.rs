//! Periodic checks at common instants, so that any number of them wakes an idle process as often as
//! one.

use std::sync::OnceLock;
use std::time::Duration;

use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

/// An interval that ticks at the multiples of `period` since the first call in this process.
#[must_use]
pub fn interval_at_multiples(period: Duration) -> Interval {
    let mut interval = interval_at(next_multiple(period), period);
    // After a delay, continue at the next multiple.
    interval.set_missed_tick_behavior(MissedTickBehavior::Skip);
    interval
}

/// The next multiple of `period` since the first call in this process.
#[must_use]
pub fn next_multiple(period: Duration) -> Instant {
    static FIRST: OnceLock<Instant> = OnceLock::new();
    let now = Instant::now();
    let passed = now.saturating_duration_since(*FIRST.get_or_init(|| now));
    let since_multiple = passed.as_nanos() % period.as_nanos().max(1);
    now + (period - Duration::from_nanos(u64::try_from(since_multiple).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use tokio::time::{advance, sleep_until};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn checks_with_different_periods_tick_together() {
        const PERIOD: Duration = Duration::from_secs(5);
        let mut first = interval_at_multiples(PERIOD);
        advance(Duration::from_millis(1700)).await;
        let mut second = interval_at_multiples(PERIOD);
        for _ in 0..3 {
            assert_eq!(first.tick().await, second.tick().await);
        }
        let long = next_multiple(PERIOD * 6);
        assert!(long.duration_since(Instant::now()) <= PERIOD * 6);
        while first.tick().await < long {}
        sleep_until(long).await;
        assert_eq!(Instant::now(), long);
    }
}
