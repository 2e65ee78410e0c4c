//! Counts of the last minutes.

use std::time::Duration;

use tokio::time::Instant;

/// The number of minutes that are counted, the current one included.
pub(crate) const MINUTES: usize = 5;
const MINUTE: Duration = Duration::from_secs(60);

/// A count for each of the last [`MINUTES`] minutes.
#[derive(Debug)]
pub(crate) struct Minutes {
    /// The count of the current minute is the first one.
    counts: [u64; MINUTES],
    /// The start of the current minute.
    began: Instant,
}

impl Minutes {
    pub(crate) fn new(now: Instant) -> Self {
        Self { counts: [0; MINUTES], began: now }
    }

    pub(crate) fn add(&mut self, now: Instant) {
        self.advance(now);
        if let Some(current) = self.counts.first_mut() {
            *current += 1;
        }
    }

    /// The count of all minutes.
    pub(crate) fn total(&mut self, now: Instant) -> u64 {
        self.advance(now);
        self.counts.iter().sum()
    }

    fn advance(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.began).as_secs() / MINUTE.as_secs();
        let shift = usize::try_from(passed).unwrap_or(MINUTES).min(MINUTES);
        self.counts.rotate_right(shift);
        self.counts.iter_mut().take(shift).for_each(|count| *count = 0);
        self.began += MINUTE.saturating_mul(u32::try_from(passed).unwrap_or(u32::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn counts_expire_minute_by_minute() {
        let start = Instant::now();
        let mut minutes = Minutes::new(start);
        minutes.add(start);
        minutes.add(start + MINUTE * 3 / 2);
        minutes.add(start + MINUTE * 3 / 2);
        assert_eq!(minutes.total(start + MINUTE * 4), 3);
        assert_eq!(minutes.total(start + MINUTE * 5), 2, "the first minute has expired");
        assert_eq!(minutes.total(start + MINUTE * 6), 0);
        assert_eq!(minutes.total(start + MINUTE * 1_000_000), 0);
        minutes.add(start + MINUTE * 1_000_000);
        assert_eq!(minutes.total(start + MINUTE * 1_000_001), 1);
    }
}
