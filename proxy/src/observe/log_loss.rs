//! Counts log lines that could not be written, for the metrics and for `underpass status`.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use crate::observe::metrics;

static LINES: AtomicU64 = AtomicU64::new(0);
/// The time of the last loss, in seconds since 1970.
static LAST: AtomicU64 = AtomicU64::new(0);

/// The log lines that this process has lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LogLoss {
    /// All since the start.
    pub(crate) lines: u64,
    /// The time since the last one.
    pub(crate) ago: Duration,
}

/// Counts lost lines.
pub(crate) fn lost(lines: u64) {
    metrics::log_lines_lost(lines);
    LINES.fetch_add(lines, Relaxed);
    LAST.store(seconds(), Relaxed);
}

/// The lines that were lost; `None` without any.
pub(crate) fn loss() -> Option<LogLoss> {
    let lines = LINES.load(Relaxed);
    let ago = Duration::from_secs(seconds().saturating_sub(LAST.load(Relaxed)));
    (lines > 0).then_some(LogLoss { lines, ago })
}

fn seconds() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}
