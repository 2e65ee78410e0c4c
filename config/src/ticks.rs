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
    multiple_after(now, *FIRST.get_or_init(|| now), period)
}

/// The first instant after `now` that is a multiple of `period` away from `origin`, which may be
/// later than `now`: another thread may have made the first call meanwhile.
fn multiple_after(now: Instant, origin: Instant, period: Duration) -> Instant {
    let wait = match now.checked_duration_since(origin) {
        Some(passed) => period - remainder(passed, period),
        None => remainder(origin - now, period),
    };
    now + if wait.is_zero() { period } else { wait }
}

fn remainder(time: Duration, period: Duration) -> Duration {
    let remainder = time.as_nanos() % period.as_nanos().max(1);
    Duration::from_nanos(u64::try_from(remainder).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use tokio::time::{advance, sleep_until};

    use super::*;

    #[test]
    fn multiple_is_aligned_before_and_after_origin() {
        const PERIOD: Duration = Duration::from_secs(5);
        let origin = Instant::now() + PERIOD * 4;
        for millis in [1, 4_999, 5_000, 5_001, 12_000, 20_000, 20_001, 25_000, 31_234] {
            let now = origin - PERIOD * 4 + Duration::from_millis(millis);
            let next = multiple_after(now, origin, PERIOD);
            assert!(next > now && next <= now + PERIOD, "{millis}");
            let distance = next.max(origin) - next.min(origin);
            assert!(remainder(distance, PERIOD).is_zero(), "{millis}: {distance:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn checks_with_different_periods_tick_together() {
        const PERIOD: Duration = Duration::from_secs(5);
        // Tokio's timers fire at whole milliseconds of the runtime.
        const TIMER_RESOLUTION: Duration = Duration::from_millis(1);
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
        assert!(Instant::now().duration_since(long) < TIMER_RESOLUTION);
    }
}
