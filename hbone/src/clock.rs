//! The wall clock. In tests it follows tokio's paused clock.

use std::time::SystemTime;

use rustls::time_provider::TimeProvider;
use rustls_pki_types::UnixTime;

#[cfg(not(test))]
pub(crate) fn now() -> SystemTime {
    SystemTime::now()
}

/// The current time in tests: a fixed start plus the elapsed time of tokio's clock.
#[cfg(test)]
#[expect(
    clippy::disallowed_types,
    reason = "the start is the real time, which a test's paused clock does not change"
)]
pub(crate) fn now() -> SystemTime {
    use std::sync::LazyLock;
    use std::time::Instant;

    static START: LazyLock<(SystemTime, Instant)> =
        LazyLock::new(|| (SystemTime::now(), Instant::now()));
    let (wall, start) = *START;
    let instant = tokio::time::Instant::now().into_std();
    // A runtime that was paused before the first call has an earlier instant than `start`.
    wall + instant.saturating_duration_since(start) - start.saturating_duration_since(instant)
}

/// Converts to the time type of rustls. Times before 1970 become 1970.
pub(crate) fn unix(time: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}

/// The wall clock for rustls.
#[derive(Debug)]
pub(crate) struct WallClock;

impl TimeProvider for WallClock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(unix(now()))
    }
}
