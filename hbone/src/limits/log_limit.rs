//! Limits log lines that peers can cause, so that many refusals do not flood the log.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::{Instant, sleep_until};

use crate::task::log_panic;

/// The number of lines with the same reason that are logged per [`WINDOW`].
const MAX_LINES: u32 = 10;
const WINDOW: Duration = Duration::from_secs(1);

/// A limit for log lines of one kind, such as failed handshakes.
///
/// Logs the first ten lines of each reason per second. Counts the others, and logs their number at
/// the end of the second.
#[derive(Debug)]
pub struct LogLimit {
    kind: &'static str,
    windows: Mutex<Vec<Window>>,
}

#[derive(Debug)]
struct Window {
    reason: &'static str,
    begun: Instant,
    lines: u32,
    suppressed: u64,
}

impl LogLimit {
    /// Creates a limit. The line that reports suppressed lines contains `kind`.
    pub const fn new(kind: &'static str) -> Self {
        Self { kind, windows: Mutex::new(Vec::new()) }
    }

    /// Returns true if a line with this reason may be logged now. Otherwise it is counted.
    pub fn admit(&'static self, reason: &'static str) -> bool {
        let now = Instant::now();
        let (lines, earlier) = self.count(reason, now);
        self.report(reason, earlier);
        // Without a tokio runtime, no timer can report: the next line reports the count.
        if lines == MAX_LINES + 1
            && let Ok(runtime) = Handle::try_current()
        {
            let report = async move {
                sleep_until(now + WINDOW).await;
                self.report(reason, self.take_suppressed(reason));
            };
            runtime.spawn(log_panic("report of suppressed log lines", report));
        }
        lines <= MAX_LINES
    }

    /// Counts a line. Returns its number in this second, and the number of suppressed lines to
    /// report.
    fn count(&self, reason: &'static str, now: Instant) -> (u32, u64) {
        let mut windows = self.windows();
        let Some(window) = windows.iter_mut().find(|window| window.reason == reason) else {
            windows.push(Window { reason, begun: now, lines: 1, suppressed: 0 });
            return (1, 0);
        };
        let mut earlier = 0;
        if now.duration_since(window.begun) >= WINDOW {
            earlier = window.suppressed;
            *window = Window { reason, begun: now, lines: 0, suppressed: 0 };
        }
        window.lines = window.lines.saturating_add(1);
        if window.lines > MAX_LINES {
            window.suppressed += 1;
        }
        (window.lines, earlier)
    }

    fn take_suppressed(&self, reason: &str) -> u64 {
        let mut windows = self.windows();
        let window = windows.iter_mut().find(|window| window.reason == reason);
        window.map(|window| std::mem::take(&mut window.suppressed)).unwrap_or_default()
    }

    fn report(&self, reason: &str, suppressed: u64) {
        if suppressed > 0 {
            tracing::warn!(kind = self.kind, reason, suppressed, "similar log lines suppressed");
        }
    }

    fn windows(&self) -> MutexGuard<'_, Vec<Window>> {
        // No code panics while it holds the lock.
        self.windows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{advance, sleep};

    use super::*;

    fn admitted(limit: &'static LogLimit, reason: &'static str, lines: u32) -> usize {
        (0..lines).filter(|_| limit.admit(reason)).count()
    }

    fn suppressed(limit: &LogLimit) -> u64 {
        limit.windows().iter().map(|window| window.suppressed).sum()
    }

    #[tokio::test(start_paused = true)]
    async fn admits_ten_lines_of_a_reason_in_a_second() {
        static LIMIT: LogLimit = LogLimit::new("test");
        assert_eq!(admitted(&LIMIT, "one", 1000), 10);
        assert_eq!(admitted(&LIMIT, "other", 5), 5);
        advance(Duration::from_millis(999)).await;
        assert!(!LIMIT.admit("one"));
        advance(Duration::from_millis(1)).await;
        assert_eq!(admitted(&LIMIT, "one", 1000), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn reports_suppressed_lines_when_the_second_is_over() {
        static LIMIT: LogLimit = LogLimit::new("test");
        admitted(&LIMIT, "one", 1000);
        assert_eq!(suppressed(&LIMIT), 990);
        sleep(WINDOW + Duration::from_millis(1)).await;
        assert_eq!(suppressed(&LIMIT), 0, "reported without another line");
    }

    #[test]
    fn limits_lines_without_runtime() {
        static LIMIT: LogLimit = LogLimit::new("test");
        assert_eq!(admitted(&LIMIT, "one", 11), 10);
    }
}
