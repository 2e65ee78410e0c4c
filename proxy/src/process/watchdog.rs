//! Reports to the supervisor that the data path works (`WatchdogSec=` of systemd,
//! `sd_watchdog_enabled(3)`). Without a report in time the supervisor ends the process.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};

use crate::process::notify;
use crate::process::supervise::{Task, restarting};

/// Starts to report each successful check; `None` if the supervisor expects no reports.
pub(crate) fn start<F>(check: impl Fn() -> F + Send + Sync + 'static) -> Option<Task>
where
    F: Future<Output = Result<(), String>> + Send + 'static,
{
    let period = period()?;
    let check = Arc::new(check);
    Some(restarting("reports to the watchdog", move || {
        let check = check.clone();
        async move { report(period, &*check, notify::alive).await }
    }))
}

/// The time within which the supervisor expects a report.
#[expect(
    clippy::disallowed_methods,
    reason = "the protocol is an environment variable, not a setting"
)]
fn period() -> Option<Duration> {
    let microseconds = std::env::var("WATCHDOG_USEC").ok()?.parse().ok()?;
    // Without WATCHDOG_PID the period is for any process of the service.
    let pid = std::env::var("WATCHDOG_PID").ok();
    let is_for_this = pid.is_none_or(|pid| pid == std::process::id().to_string());
    (is_for_this && microseconds > 0).then(|| Duration::from_micros(microseconds))
}

/// Calls `alive` twice in each period in which `check` succeeds.
async fn report<F>(period: Duration, check: impl Fn() -> F, alive: impl Fn())
where
    F: Future<Output = Result<(), String>>,
{
    let mut ticks = interval(period / 2);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        match check().await {
            Ok(()) => alive(),
            Err(error) => {
                tracing::warn!(error, "no report to the supervisor's watchdog");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::ready;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn reports_twice_in_each_period_while_the_check_succeeds() {
        let (works, reports) = (Cell::new(true), Cell::new(0));
        let check = || ready(if works.get() { Ok(()) } else { Err("hangs".to_owned()) });
        let second = Duration::from_secs(1);
        let mut reporting = Box::pin(report(2 * second, check, || reports.set(reports.get() + 1)));
        timeout(9 * second + second / 2, &mut reporting).await.unwrap_err();
        assert_eq!(reports.get(), 10);
        works.set(false);
        timeout(10 * second, &mut reporting).await.unwrap_err();
        assert_eq!(reports.get(), 10);
        works.set(true);
        timeout(second, &mut reporting).await.unwrap_err();
        assert_eq!(reports.get(), 11);
    }
}
