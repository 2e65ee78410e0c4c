//! The names of a pod that could not be resolved recently, for `underpass status`.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::name::DomainName;

/// The maximum number of names of one pod. A new one displaces the one whose last failure is the
/// oldest.
const MAX_NAMES: usize = 32;

/// How long the text of a cause stands for later failures of the name: to make it costs more than
/// the rest of a failed query.
const EXPLAIN_INTERVAL: Duration = Duration::from_secs(1);

/// The names of one pod that could not be resolved recently.
#[derive(Debug, Default)]
pub(crate) struct FailedNames(Mutex<VecDeque<FailedName>>);

/// A name that could not be resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FailedName {
    pub(crate) name: DomainName,
    /// The type of the record.
    pub(crate) kind: &'static str,
    pub(crate) reason: &'static str,
    /// The cause of a failure within [`EXPLAIN_INTERVAL`] before the last one.
    pub(crate) error: Option<String>,
    /// The time of that failure.
    pub(super) explained: Instant,
    pub(crate) hint: &'static str,
    /// The number of failed queries since the name is listed.
    pub(crate) count: u64,
    pub(crate) last: Instant,
}

impl FailedNames {
    /// Lists a name that has just failed, or counts it again. `error` returns the text of its
    /// cause.
    pub(super) fn add(&self, failed: FailedName, error: impl FnOnce() -> Option<String>) {
        let mut names = self.lock();
        let is_same = |other: &FailedName| {
            (&other.name, other.kind, other.reason) == (&failed.name, failed.kind, failed.reason)
        };
        let known = names.iter().position(is_same).and_then(|index| names.remove(index));
        let count = failed.count + known.as_ref().map_or(0, |known| known.count);
        let is_recent =
            |known: &FailedName| failed.last.duration_since(known.explained) < EXPLAIN_INTERVAL;
        let (error, explained) = match known.filter(is_recent) {
            Some(known) => (known.error, known.explained),
            None => (error(), failed.last),
        };
        if names.len() >= MAX_NAMES {
            names.pop_front();
        }
        names.push_back(FailedName { count, error, explained, ..failed });
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
        let now = Instant::now();
        FailedName {
            name: DomainName::of_labels([name.as_bytes()].into_iter()),
            kind: "A",
            reason: "upstream",
            error: None,
            explained: now,
            hint: "check the servers",
            count: 1,
            last: now,
        }
    }

    fn add(names: &FailedNames, name: &str) {
        names.add(failed(name), || None);
    }

    fn listed(names: &FailedNames) -> Vec<(String, u64)> {
        let since = names.since(Instant::now(), MINUTE);
        since.into_iter().map(|failed| (failed.name.to_string(), failed.count)).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn failed_name_is_counted_moved_to_the_front_and_forgotten() {
        let names = FailedNames::default();
        ["a", "b", "a"].iter().for_each(|name| add(&names, name));
        assert_eq!(listed(&names), [("a".to_owned(), 2), ("b".to_owned(), 1)]);
        tokio::time::advance(MINUTE).await;
        assert_eq!(listed(&names), []);
    }

    #[tokio::test(start_paused = true)]
    async fn cause_is_renewed_each_second() {
        let names = FailedNames::default();
        let error = || names.since(Instant::now(), MINUTE)[0].error.clone();
        for (cause, expected) in [("first", "first"), ("second", "first")] {
            names.add(failed("a"), || Some(cause.to_owned()));
            assert_eq!(error().as_deref(), Some(expected));
        }
        tokio::time::advance(EXPLAIN_INTERVAL).await;
        names.add(failed("a"), || Some("third".to_owned()));
        assert_eq!(error().as_deref(), Some("third"));
        assert_eq!(listed(&names), [("a".to_owned(), 3)]);
    }

    #[tokio::test(start_paused = true)]
    async fn names_of_a_pod_are_bounded() {
        let names = FailedNames::default();
        (0..MAX_NAMES + 10).for_each(|number| add(&names, &number.to_string()));
        let listed = listed(&names);
        assert_eq!(listed.len(), MAX_NAMES);
        assert_eq!(listed[0].0, (MAX_NAMES + 9).to_string(), "the newest one stays");
    }
}
