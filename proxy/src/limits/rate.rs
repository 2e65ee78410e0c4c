//! Limits a rate by a token bucket: of accepted connections, of queries to DNS servers, and of
//! lookups on demand.

use std::time::Duration;

use tokio::time::Instant;

/// The bucket holds the tokens of one tenth of a second, because connections and queries arrive in
/// bursts.
const BURST: u32 = 10;

/// The token bucket of one listener, or of the queries or lookups of one pod.
#[derive(Debug)]
pub(crate) struct Rate {
    interval: Duration,
    /// The maximum time by which a token may be taken before it is due.
    early: Duration,
    /// The time of the next token at an even rate.
    due: Instant,
}

impl Rate {
    pub(crate) fn new(per_second: u32) -> Self {
        let interval = Duration::from_secs(1) / per_second.max(1);
        let burst = (per_second / BURST).max(1);
        Self { interval, early: interval * (burst - 1), due: Instant::now() }
    }

    /// Takes a token. If it was the last one, returns the time of the next one.
    pub(crate) fn take(&mut self) -> Option<Instant> {
        let now = Instant::now();
        self.due = self.due.max(now) + self.interval;
        self.next_after(now)
    }

    /// Takes a token; `false` if there is none.
    pub(crate) fn try_take(&mut self) -> bool {
        self.reserve(1, Duration::ZERO).is_some()
    }

    /// Takes `count` tokens if there is one within `wait`, the others in advance. Returns the time
    /// of the first one.
    pub(crate) fn reserve(&mut self, count: u32, wait: Duration) -> Option<Instant> {
        let now = Instant::now();
        let first = self.next_after(now).unwrap_or(now);
        let is_near = first <= now + wait;
        if is_near {
            self.due = self.due.max(now) + self.interval * count;
        }
        is_near.then_some(first)
    }

    /// The time of the next token; `None` if there is one at `now`.
    fn next_after(&self, now: Instant) -> Option<Instant> {
        self.due.checked_sub(self.early).filter(|next| *next > now)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{advance, sleep_until};

    use super::*;

    /// The time needed to accept `count` connections that are already waiting.
    async fn time(rate: &mut Rate, count: usize) -> Duration {
        let start = Instant::now();
        let mut taken = start;
        for _ in 0..count {
            taken = Instant::now();
            if let Some(next) = rate.take() {
                sleep_until(next).await;
            }
        }
        taken - start
    }

    #[tokio::test(start_paused = true)]
    async fn rate_limit_admits_burst_at_once_and_rest_at_rate() {
        let mut rate = Rate::new(100);
        assert_eq!(time(&mut rate, 10).await, Duration::ZERO);
        // The first connection is due at once.
        let elapsed = time(&mut rate, 1001).await;
        assert!(
            elapsed >= Duration::from_secs(10) && elapsed < Duration::from_secs(11),
            "{elapsed:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn idle_time_restores_only_one_burst() {
        let mut rate = Rate::new(100);
        advance(Duration::from_secs(3600)).await;
        let elapsed = time(&mut rate, 20).await;
        assert!(elapsed >= Duration::from_millis(100), "{elapsed:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn low_rate_limit_admits_one_connection_at_a_time() {
        let elapsed = time(&mut Rate::new(1), 4).await;
        assert!(
            elapsed >= Duration::from_secs(3) && elapsed < Duration::from_secs(4),
            "{elapsed:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn reservation_in_advance_delays_later_ones() {
        let (mut rate, now) = (Rate::new(100), Instant::now());
        let wait = Duration::from_secs(1);
        assert_eq!(rate.reserve(109, wait), Some(now));
        assert_eq!(rate.reserve(1, wait), Some(now + wait), "the last one of this second");
        assert_eq!(rate.reserve(1, wait), None);
        assert!(!rate.try_take());
        advance(wait).await;
        assert_eq!(rate.reserve(1, Duration::ZERO), None, "that one is taken");
        assert_eq!(rate.reserve(1, wait), Some(now + wait + rate.interval));
    }

    #[tokio::test(start_paused = true)]
    async fn delayed_timer_does_not_lower_rate() {
        let mut rate = Rate::new(10_000);
        // tokio's timer has a resolution of 1 ms, which is ten tokens.
        let elapsed = time(&mut rate, 11_000).await;
        assert!(
            elapsed >= Duration::from_secs(1) && elapsed < Duration::from_millis(1100),
            "{elapsed:?}"
        );
    }
}
