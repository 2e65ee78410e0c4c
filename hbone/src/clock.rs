//! The wall clock, which in tests follows tokio's paused time.
//!
//! Not here: waiting, which needs no wall clock.

use std::time::SystemTime;

use rustls::time_provider::TimeProvider;
use rustls_pki_types::UnixTime;

/// What time it is.
#[cfg(not(test))]
pub(crate) fn now() -> SystemTime {
    SystemTime::now()
}

/// What time it is: a fixed start, and what has passed since on tokio's clock.
#[cfg(test)]
#[expect(clippy::disallowed_types, reason = "a start that no test's paused clock has moved")]
pub(crate) fn now() -> SystemTime {
    use std::sync::LazyLock;
    use std::time::Instant;

    static START: LazyLock<(SystemTime, Instant)> =
        LazyLock::new(|| (SystemTime::now(), Instant::now()));
    let (wall, start) = *START;
    let instant = tokio::time::Instant::now().into_std();
    // A runtime that was paused before the first call is behind the start.
    wall + instant.saturating_duration_since(start) - start.saturating_duration_since(instant)
}

/// The same as the certificate libraries count it. Before 1970 counts as 1970: nothing is valid so early.
pub(crate) fn unix(time: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}

/// Lets rustls live by [`now`].
#[derive(Debug)]
pub(crate) struct WallClock;

impl TimeProvider for WallClock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(unix(now()))
    }
}
