//! The names of a pod that could not be resolved recently, for `underpass status`.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// The maximum number of names of one pod. A new one displaces the one whose last failure is the
/// oldest.
const MAX_NAMES: usize = 32;

/// The names of one pod that could not be resolved recently.
#[derive(Debug, Default)]
pub(crate) struct FailedNames(Mutex<VecDeque<FailedName>>);

/// A name that could not be resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FailedName {
    pub(crate) name: String,
    /// The type of the record.
    pub(crate) kind: &'static str,
    pub(crate) reason: &'static str,
    pub(crate) error: Option<String>,
    pub(crate) hint: &'static str,
    /// The number of failed queries since the name is listed.
    pub(crate) count: u64,
    pub(crate) last: Instant,
}

impl FailedNames {
    /// Lists a name that has just failed, or counts it again.
    pub(super) fn add(&self, failed: FailedName) {
        let mut names = self.lock();
        let is_same = |other: &FailedName| {
            (&other.name, other.kind, other.reason) == (&failed.name, failed.kind, failed.reason)
        };
        let known = names.iter().position(is_same).and_then(|index| names.remove(index));
        let count = failed.count + known.map_or(0, |known| known.count);
        if names.len() >= MAX_NAMES {
            names.pop_front();
        }
        names.push_back(FailedName { count, ..failed });
    }

    /// The names that failed within this time, the most recent first.
    pub(crate) fn since(&self, now: Instant, within: Duration) -> Vec<FailedName> {
        let mut names = self.lock();
        names.retain(|failed| now.saturating_duration_since(failed.last) < within);
        names.iter().rev().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<FailedName>> {
        // No code panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn failed(name: &str) -> FailedName {
        FailedName {
            name: name.to_owned(),
            kind: "A",
            reason: "upstream",
            error: None,
            hint: "check the servers",
            count: 1,
            last: Instant::now(),
        }
    }

    fn listed(names: &FailedNames) -> Vec<(String, u64)> {
        let since = names.since(Instant::now(), MINUTE);
        since.into_iter().map(|failed| (failed.name, failed.count)).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn failed_name_is_counted_moved_to_the_front_and_forgotten() {
        let names = FailedNames::default();
        ["a", "b", "a"].iter().for_each(|name| names.add(failed(name)));
        assert_eq!(listed(&names), [("a".to_owned(), 2), ("b".to_owned(), 1)]);
        tokio::time::advance(MINUTE).await;
        assert_eq!(listed(&names), []);
    }

    #[tokio::test(start_paused = true)]
    async fn names_of_a_pod_are_bounded() {
        let names = FailedNames::default();
        (0..MAX_NAMES + 10).for_each(|number| names.add(failed(&number.to_string())));
        let listed = listed(&names);
        assert_eq!(listed.len(), MAX_NAMES);
        assert_eq!(listed[0].0, (MAX_NAMES + 9).to_string(), "the newest one stays");
    }
}
