//! Points in time in answers: their text, and the seconds until them.

use std::time::{Duration, SystemTime};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// The time in UTC as RFC 3339, in whole seconds: `2026-11-30T18:00:00Z`.
pub(crate) fn rfc3339(time: SystemTime) -> String {
    let time = OffsetDateTime::from(time);
    let in_seconds = time.replace_nanosecond(0).unwrap_or(time);
    // Fails for years that the format cannot express.
    in_seconds.format(&Rfc3339).unwrap_or_default()
}

/// The seconds from `now` to `time`; negative if `time` has passed.
pub(crate) fn seconds_until(now: SystemTime, time: SystemTime) -> i64 {
    let seconds = |duration: Duration| i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
    match time.duration_since(now) {
        Ok(left) => seconds(left),
        Err(passed) => -seconds(passed.duration()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_written_in_utc_and_whole_seconds() {
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(1_764_528_000_999);
        assert_eq!(rfc3339(time), "2025-11-30T18:40:00Z");
    }

    #[test]
    fn seconds_until_a_time_in_the_past_are_negative() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_764_528_000);
        let minute = Duration::from_secs(60);
        assert_eq!(
            [now + minute, now, now - minute].map(|at| seconds_until(now, at)),
            [60, 0, -60]
        );
    }
}
