//! How fast: a token bucket that holds what comes in a tenth of a second.

use std::time::Duration;

use tokio::time::Instant;

/// What the bucket holds is what comes in this part of a second: connections come in bunches.
const BURST: u32 = 10;

/// One listener's bucket.
#[derive(Debug)]
pub(crate) struct Rate {
    interval: Duration,
    /// How much earlier than its time a connection may come.
    early: Duration,
    /// The time of the next one, if all came at the same distance.
    due: Instant,
}

impl Rate {
    pub(crate) fn new(per_second: u32) -> Self {
        let interval = Duration::from_secs(1) / per_second.max(1);
        let burst = (per_second / BURST).max(1);
        Self { interval, early: interval * (burst - 1), due: Instant::now() }
    }

    /// Takes a token. If it was the last one: when there is another.
    pub(crate) fn take(&mut self) -> Option<Instant> {
        let now = Instant::now();
        self.due = self.due.max(now) + self.interval;
        self.due.checked_sub(self.early).filter(|next| *next > now)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{advance, sleep_until};

    use super::*;

    /// How long `count` connections take that are there from the beginning.
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
    async fn a_burst_comes_at_once_and_the_rest_at_the_rate() {
        let mut rate = Rate::new(100);
        assert_eq!(time(&mut rate, 10).await, Duration::ZERO);
        // The one whose turn it is now is the first of these.
        let took = time(&mut rate, 1001).await;
        assert!(took >= Duration::from_secs(10) && took < Duration::from_secs(11), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_rest_there_is_one_burst_and_no_more() {
        let mut rate = Rate::new(100);
        advance(Duration::from_secs(3600)).await;
        let took = time(&mut rate, 20).await;
        assert!(took >= Duration::from_millis(100), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_low_rate_still_lets_one_through_at_a_time() {
        let took = time(&mut Rate::new(1), 4).await;
        assert!(took >= Duration::from_secs(3) && took < Duration::from_secs(4), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_timer_that_wakes_late_does_not_lower_the_rate() {
        let mut rate = Rate::new(10_000);
        // tokio's timer has milliseconds, ten tokens each.
        let took = time(&mut rate, 11_000).await;
        assert!(took >= Duration::from_secs(1) && took < Duration::from_millis(1100), "{took:?}");
    }
}
