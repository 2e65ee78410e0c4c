//! Limits the lookups on demand that the queries of a pod cause: an application that asks for
//! random names must not occupy the control plane, which answers other pods too.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::sleep_until;

use crate::limits::Rate;

/// How long a query waits until the control plane may be asked.
const MAX_WAIT: Duration = Duration::from_secs(1);

/// The limit of one pod. `None`: unlimited.
#[derive(Debug)]
pub(super) struct LookupLimit(Option<Mutex<Rate>>);

impl LookupLimit {
    pub(super) fn new(per_second: Option<u32>) -> Self {
        Self(per_second.map(Rate::new).map(Mutex::new))
    }

    /// Waits until `count` lookups are within the limit. Returns false if that takes longer than
    /// [`MAX_WAIT`].
    pub(super) async fn admit(&self, count: usize) -> bool {
        let (Some(rate), 1..) = (&self.0, count) else { return true };
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        // No code panics while it holds the lock.
        let first = rate.lock().unwrap_or_else(PoisonError::into_inner).reserve(count, MAX_WAIT);
        if let Some(first) = first {
            sleep_until(first).await;
        }
        first.is_some()
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn lookups_wait_for_their_turn_and_fail_beyond_it() {
        let (limit, start) = (LookupLimit::new(Some(100)), Instant::now());
        assert!(limit.admit(60).await);
        assert_eq!(start.elapsed(), Duration::ZERO);
        assert!(limit.admit(60).await, "50 in advance");
        let waited = start.elapsed();
        assert!(waited > Duration::from_millis(500) && waited < MAX_WAIT, "{waited:?}");
        assert!(limit.admit(200).await);
        assert!(!limit.admit(1).await);
        assert!(limit.admit(0).await, "known names need no lookup");
        assert!(LookupLimit::new(None).admit(1_000_000).await);
    }
}
