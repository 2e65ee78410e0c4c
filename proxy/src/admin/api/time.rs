//! The text of points in time.

use std::time::SystemTime;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// The time in UTC as RFC 3339, in whole seconds: `2026-11-30T18:00:00Z`.
pub(crate) fn rfc3339(time: SystemTime) -> String {
    let time = OffsetDateTime::from(time);
    let in_seconds = time.replace_nanosecond(0).unwrap_or(time);
    // Fails for years that the format cannot express.
    in_seconds.format(&Rfc3339).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn time_is_written_in_utc_and_whole_seconds() {
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(1_764_528_000_999);
        assert_eq!(rfc3339(time), "2025-11-30T18:40:00Z");
    }
}
