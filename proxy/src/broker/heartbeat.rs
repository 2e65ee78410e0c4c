//! Detects a proxy process that hangs: its control thread or one of its workers does not answer.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::error::chain;
use crate::node::pod_error::PodError;

/// The interval of the checks, and the timeout of each.
pub(super) const INTERVAL: Duration = Duration::from_secs(10);
/// The number of consecutive failed checks after which the process counts as hung. A period in
/// which both processes were stopped fails one check, however long it was.
const MAX_FAILURES: u32 = 3;

/// Returns once the proxy process hangs.
pub(super) async fn hangs<F>(mut check: impl FnMut() -> F)
where
    F: Future<Output = Result<(), PodError>>,
{
    let mut failures = 0;
    while failures < MAX_FAILURES {
        let next = Instant::now() + INTERVAL;
        match check().await {
            Ok(()) => failures = 0,
            Err(error) => {
                failures += 1;
                tracing::warn!(
                    error = chain(&error),
                    failures,
                    "the proxy process does not answer"
                );
            }
        }
        sleep_until(next).await;
    }
    tracing::error!(
        hint = "report this defect of underpass; the rules stay, and connections are refused until underpass runs again",
        "the proxy process hangs: ending it"
    );
}

#[cfg(test)]
mod tests {
    use std::future::ready;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn process_hangs_after_three_consecutive_failures() {
        let (began, mut checks) = (Instant::now(), 0);
        let fails = [false, true, true, false, true, true, true];
        hangs(|| {
            let fails = fails[checks];
            checks += 1;
            let error = || PodError::ProxyProcess("no answer".to_owned());
            ready(if fails { Err(error()) } else { Ok(()) })
        })
        .await;
        assert_eq!((checks, began.elapsed()), (fails.len(), INTERVAL * 7));
    }

    #[tokio::test(start_paused = true)]
    async fn one_long_stop_of_both_processes_fails_one_check() {
        let mut checks = 0;
        let checking = hangs(|| {
            checks += 1;
            let error = || PodError::ProxyProcess("no answer within 10s".to_owned());
            // The timers of the stopped broker are due at once when it continues.
            let (stopped, outcome) = match checks {
                2 => (INTERVAL * 100, Err(error())),
                _ => (Duration::ZERO, Ok(())),
            };
            async move {
                tokio::time::advance(stopped).await;
                outcome
            }
        });
        tokio::time::timeout(INTERVAL * 1000, checking).await.expect_err("it does not hang");
        assert!(checks > 800);
    }
}
