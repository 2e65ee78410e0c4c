//! Schedules certificate requests: renewal at half of the remaining validity, and retries with
//! back-off.
//!
//! Times are wall-clock times, like those in certificates: tokio's clock stops while a machine is
//! suspended.

use std::time::{Duration, SystemTime};

use tokio::time::{Instant, sleep_until};
use underpass_config::next_multiple;

use crate::clock;

/// The minimum interval between requests, however short the validity.
const MIN_INTERVAL: Duration = Duration::from_secs(1);
/// The delay after the first failure. Each further failure doubles it.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(150);
/// The longest delay while there is no valid certificate and connections wait for one.
const LAST_RETRY_WITHOUT: Duration = Duration::from_secs(15);

/// The jitter of a renewal: proxies that start together do not renew together.
const RENEWAL_JITTER: f64 = 0.1;
const RETRY_JITTER: f64 = 0.2;

/// The interval at which timers read the wall clock again, since it may be set.
const CLOCK_CHECK_INTERVAL: Duration = Duration::from_secs(60);

/// The time of the next certificate request.
#[derive(Debug)]
pub(crate) struct Schedule {
    due: NextRequest,
    failures: u32,
    /// The expiry of the last certificate.
    expires: Option<SystemTime>,
}

#[derive(Debug, Clone, Copy)]
enum NextRequest {
    Renewal(SystemTime),
    Retry(Instant),
}

impl Schedule {
    /// Creates a schedule whose first request is due now.
    pub(crate) fn new() -> Self {
        Self { due: NextRequest::Retry(Instant::now()), failures: 0, expires: None }
    }

    /// Waits until the request is due. Cancel-safe.
    pub(crate) async fn due(&self) {
        match self.due {
            NextRequest::Renewal(time) => reached(time).await,
            NextRequest::Retry(instant) => sleep_until(instant).await,
        }
    }

    /// Records a new certificate, which is valid until `expires`.
    pub(crate) fn succeeded(&mut self, expires: SystemTime) {
        let now = clock::now();
        let left = expires.duration_since(now).unwrap_or_default();
        self.due = NextRequest::Renewal(now + renew_after(left, random()));
        self.failures = 0;
        self.expires = Some(expires);
    }

    pub(crate) fn failed(&mut self) {
        let is_valid = self.expires.is_some_and(|expires| expires > clock::now());
        let longest = if is_valid { LAST_RETRY } else { LAST_RETRY_WITHOUT };
        self.due =
            NextRequest::Retry(Instant::now() + retry_after(self.failures, longest, random()));
        self.failures = self.failures.saturating_add(1);
    }
}

/// Waits until the wall clock reaches `time`, even if it is set or the machine suspends.
/// Cancel-safe.
pub(crate) async fn reached(time: SystemTime) {
    loop {
        let now = clock::now();
        let left = time.duration_since(now).unwrap_or_default();
        if left.is_zero() {
            return;
        }
        let due = Instant::now() + left.min(CLOCK_CHECK_INTERVAL);
        sleep_until(next_multiple(CLOCK_CHECK_INTERVAL).min(due)).await;
    }
}

/// The delay before renewing a certificate that is valid for another `left`. `chance`, from -1 to
/// 1, scales the jitter.
fn renew_after(left: Duration, chance: f64) -> Duration {
    (left / 2).mul_f64(1.0 + RENEWAL_JITTER * chance).max(MIN_INTERVAL)
}

/// The delay after `failures` earlier consecutive failures, at most `longest` before jitter.
/// `chance`, from -1 to 1, scales the jitter.
fn retry_after(failures: u32, longest: Duration, chance: f64) -> Duration {
    let doubled = FIRST_RETRY.saturating_mul(2_u32.saturating_pow(failures));
    doubled.min(longest).mul_f64(1.0 + RETRY_JITTER * chance)
}

fn random() -> f64 {
    fastrand::f64() * 2.0 - 1.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn renewal_is_at_half_of_validity_with_jitter() {
        assert_eq!(renew_after(24 * HOUR, 0.0), 12 * HOUR);
        assert_eq!(renew_after(20 * HOUR, -1.0), 9 * HOUR);
        assert_eq!(renew_after(20 * HOUR, 1.0), 11 * HOUR);
    }

    #[test]
    fn renewal_interval_has_a_minimum() {
        for left in [Duration::ZERO, Duration::from_millis(1), MIN_INTERVAL] {
            assert_eq!(renew_after(left, -1.0), MIN_INTERVAL, "{left:?}");
        }
    }

    #[test]
    fn failures_double_the_pause_up_to_its_maximum() {
        let pauses =
            [0, 1, 2, 6, 7, 8, 40, u32::MAX].map(|failures| retry_after(failures, LAST_RETRY, 0.0));
        let seconds: Vec<u64> = pauses.iter().map(Duration::as_secs).collect();
        assert_eq!(seconds, [1, 2, 4, 64, 128, 150, 150, 150]);
        assert_eq!(retry_after(8, LAST_RETRY, 1.0), Duration::from_secs(180));
        assert_eq!(retry_after(0, LAST_RETRY, -1.0), Duration::from_millis(800));
    }

    #[tokio::test(start_paused = true)]
    async fn retries_sooner_without_valid_certificate() {
        let mut schedule = Schedule::new();
        let pause_of = async |schedule: &mut Schedule| {
            schedule.failures = 20;
            let start = Instant::now();
            schedule.failed();
            schedule.due().await;
            start.elapsed().as_secs()
        };
        assert!((12..=18).contains(&pause_of(&mut schedule).await));
        schedule.succeeded(clock::now() + HOUR);
        assert!((120..=180).contains(&pause_of(&mut schedule).await));
    }

    #[test]
    fn jitter_is_within_bounds() {
        let drawn: Vec<f64> = (0..1000).map(|_| random()).collect();
        assert!(drawn.iter().all(|chance| (-1.0..=1.0).contains(chance)));
        assert!(drawn.iter().any(|c| *c < -0.5) && drawn.iter().any(|c| *c > 0.5));
    }

    #[tokio::test(start_paused = true)]
    async fn schedule_waits_only_for_future_times() {
        let start = Instant::now();
        let mut schedule = Schedule::new();
        schedule.due().await;
        assert_eq!(start.elapsed(), Duration::ZERO);
        schedule.failed();
        schedule.failed();
        schedule.due().await;
        assert!((1600..=2401).contains(&start.elapsed().as_millis()), "{:?}", start.elapsed());
        let start = Instant::now();
        schedule.succeeded(clock::now() + HOUR);
        schedule.due().await;
        let minutes = start.elapsed().as_secs_f64() / 60.0;
        assert!((27.0..=33.1).contains(&minutes), "{minutes}");
        schedule.failed();
        let start = Instant::now();
        schedule.due().await;
        assert!(start.elapsed() <= Duration::from_millis(1201));
    }
}
