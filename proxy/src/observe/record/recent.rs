//! The recent connections of one worker: the last ones that ended or failed, the counts of
//! failures by reason, and the subscribers that receive each connection.
//!
//! Successful and failed connections have separate lists, so that a busy service does not displace
//! the failures.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use foldhash::fast::RandomState;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::time::Instant;

use super::minutes::Minutes;
use super::{EndedConnection, TrackedConnection};
use crate::observe::pod_name::PodName;

/// The maximum number of entries in each of the two lists, of all workers together. An entry needs
/// about half a KiB.
const MAX_ENTRIES: usize = 512;
/// The minimum of one worker.
const MIN_ENTRIES: usize = 32;
/// The maximum number of pairs of a pod and a reason. Further ones are not counted until others
/// have expired.
const MAX_COUNTS: usize = 4096;

/// The recent connections of one worker. Only the worker's thread locks it.
#[derive(Debug)]
pub(crate) struct RecentConnections {
    /// The maximum number of entries in each list.
    capacity: usize,
    /// Whether there are subscribers: an opened connection then locks the lists.
    is_followed: AtomicBool,
    lists: Mutex<Lists>,
}

#[derive(Debug, Default)]
struct Lists {
    completed: VecDeque<Arc<EndedConnection>>,
    failed: VecDeque<Arc<EndedConnection>>,
    failures: HashMap<(Arc<PodName>, &'static str), Minutes, RandomState>,
    subscribers: Vec<Subscriber>,
}

/// A connection that was opened or has ended, for subscribers.
#[derive(Debug, Clone)]
pub(crate) enum ConnectionEvent {
    Opened(Arc<TrackedConnection>),
    Ended(Arc<EndedConnection>),
}

/// Receives each connection of a worker. Events for which it is too slow are only counted.
#[derive(Debug, Clone)]
pub(crate) struct Subscriber {
    pub(crate) events: mpsc::Sender<ConnectionEvent>,
    /// The number of events that it did not receive.
    pub(crate) missed: Arc<AtomicU64>,
}

/// The number of failed connections of a pod for one reason in the last minutes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FailureCount {
    pub(crate) pod: Arc<PodName>,
    pub(crate) reason: &'static str,
    pub(crate) count: u64,
}

impl Default for RecentConnections {
    fn default() -> Self {
        Self::new(1)
    }
}

impl RecentConnections {
    /// The lists of one of `workers` workers.
    pub(crate) fn new(workers: usize) -> Self {
        let capacity = (MAX_ENTRIES / workers.max(1)).max(MIN_ENTRIES);
        Self { capacity, is_followed: AtomicBool::new(false), lists: Mutex::default() }
    }

    /// Reports an opened connection to the subscribers.
    pub(super) fn opened(&self, connection: &Arc<TrackedConnection>) {
        if self.is_followed.load(Relaxed) {
            self.report(&mut self.lock(), || ConnectionEvent::Opened(connection.clone()));
        }
    }

    /// Lists a connection that has ended or could not be opened, and counts its failure.
    pub(super) fn ended(&self, ended: EndedConnection) {
        let mut lists = self.lock();
        if let Some(reason) = ended.reason() {
            lists.count_failure(&ended.connection.pod, reason.code, ended.at);
        }
        let list = if ended.outcome.is_ok() { &mut lists.completed } else { &mut lists.failed };
        let displaced = if list.len() >= self.capacity { list.pop_front() } else { None };
        let ended = Arc::new(ended);
        list.push_back(ended.clone());
        self.report(&mut lists, || ConnectionEvent::Ended(ended.clone()));
        drop(lists);
        drop(displaced);
    }

    /// Counts a failure without listing it.
    pub(super) fn count_failure(&self, pod: &Arc<PodName>, reason: &'static str, now: Instant) {
        self.lock().count_failure(pod, reason, now);
    }

    /// The listed connections, in no order.
    pub(crate) fn list(&self) -> Vec<Arc<EndedConnection>> {
        let lists = self.lock();
        lists.completed.iter().chain(&lists.failed).cloned().collect()
    }

    /// The listed failures, the newest last.
    pub(crate) fn failed(&self) -> Vec<Arc<EndedConnection>> {
        self.lock().failed.iter().cloned().collect()
    }

    /// The number of failures of the last minutes by pod and reason, in no order.
    pub(crate) fn failures(&self, now: Instant) -> Vec<FailureCount> {
        let mut lists = self.lock();
        lists.forget_expired(now);
        let count = |((pod, reason), minutes): (&(Arc<PodName>, &'static str), &mut Minutes)| {
            FailureCount { pod: pod.clone(), reason, count: minutes.total(now) }
        };
        lists.failures.iter_mut().map(count).collect()
    }

    /// Sends each connection that is opened or ends from now on.
    pub(crate) fn subscribe(&self, subscriber: Subscriber) {
        let mut lists = self.lock();
        // Without connections no report removes the subscribers that have left.
        lists.subscribers.retain(|known| !known.events.is_closed());
        lists.subscribers.push(subscriber);
        self.is_followed.store(true, Relaxed);
    }

    fn report(&self, lists: &mut Lists, event: impl Fn() -> ConnectionEvent) {
        if lists.subscribers.is_empty() {
            return;
        }
        lists.subscribers.retain(|subscriber| match subscriber.events.try_send(event()) {
            Ok(()) => true,
            Err(TrySendError::Full(_)) => {
                subscriber.missed.fetch_add(1, Relaxed);
                true
            }
            Err(TrySendError::Closed(_)) => false,
        });
        self.is_followed.store(!lists.subscribers.is_empty(), Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Lists> {
        // No code panics while it holds the lock.
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lists {
    fn count_failure(&mut self, pod: &Arc<PodName>, reason: &'static str, now: Instant) {
        let key = (pod.clone(), reason);
        if self.failures.len() >= MAX_COUNTS && !self.failures.contains_key(&key) {
            self.forget_expired(now);
            if self.failures.len() >= MAX_COUNTS {
                return;
            }
        }
        self.failures.entry(key).or_insert_with(|| Minutes::new(now)).add(now);
    }

    fn forget_expired(&mut self, now: Instant) {
        self.failures.retain(|_, minutes| minutes.total(now) > 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ProxyError;
    use crate::observe::party::{Direction, Party};
    use crate::observe::record::{ConnectionRecord, Facts, WorkerRecords};

    fn facts() -> Facts {
        Facts::new(Direction::Outbound, Party::default(), Party::default())
    }

    fn pod(name: &str) -> Arc<PodName> {
        Arc::new(PodName { namespace: "ns".to_owned(), name: name.to_owned() })
    }

    fn complete(records: &WorkerRecords, pod: &Arc<PodName>) {
        ConnectionRecord::opened(Instant::now(), facts(), records.of_pod(pod)).close(Ok(()));
    }

    fn fail(records: &WorkerRecords, pod: &Arc<PodName>) {
        let failure = facts().failed(ProxyError::Drained);
        ConnectionRecord::failed(Instant::now(), failure, records.of_pod(pod));
    }

    #[tokio::test]
    async fn completed_connections_are_bounded_and_displace_no_failure() {
        let (records, pod) = (WorkerRecords::default(), pod("a"));
        fail(&records, &pod);
        (0..2 * MAX_ENTRIES).for_each(|_| complete(&records, &pod));
        let recent = &records.recent;
        assert_eq!((recent.list().len(), recent.failed().len()), (MAX_ENTRIES + 1, 1));
        (0..2 * MAX_ENTRIES).for_each(|_| fail(&records, &pod));
        assert_eq!(recent.list().len(), 2 * MAX_ENTRIES);
    }

    #[tokio::test(start_paused = true)]
    async fn failures_are_counted_by_pod_and_reason_until_they_expire() {
        let records = WorkerRecords::default();
        let (one, other) = (pod("a"), pod("b"));
        [&one, &other, &one].iter().for_each(|pod| fail(&records, pod));
        complete(&records, &one);
        drop(ConnectionRecord::opened(Instant::now(), facts(), records.of_pod(&one)));
        let counts = || {
            let mut counts = records.recent.failures(Instant::now());
            counts.sort_by(|a, b| (&a.pod, a.reason).cmp(&(&b.pod, b.reason)));
            counts.into_iter().map(|one| (one.pod.name.clone(), one.reason, one.count))
        };
        let expected = [("a", "drained", 2), ("a", "dropped", 1), ("b", "drained", 1)];
        assert!(counts().eq(expected.map(|(pod, reason, count)| (pod.to_owned(), reason, count))));
        tokio::time::advance(std::time::Duration::from_secs(3600)).await;
        assert_eq!(counts().count(), 0);
    }

    #[tokio::test]
    async fn subscriber_receives_events_and_counts_those_it_misses() {
        let (records, pod) = (WorkerRecords::default(), pod("a"));
        let (events, mut receiver) = mpsc::channel(3);
        let missed = Arc::<AtomicU64>::default();
        records.recent.subscribe(Subscriber { events, missed: missed.clone() });
        complete(&records, &pod);
        complete(&records, &pod);
        assert_eq!(missed.load(Relaxed), 1);
        assert!(matches!(receiver.recv().await, Some(ConnectionEvent::Opened(_))));
        assert!(matches!(receiver.recv().await, Some(ConnectionEvent::Ended(_))));
        drop(receiver);
        complete(&records, &pod);
        assert!(!records.recent.is_followed.load(Relaxed), "the subscriber is forgotten");
    }

    #[tokio::test]
    async fn new_subscriber_replaces_those_that_have_left() {
        let records = WorkerRecords::default();
        for _ in 0..3 {
            let (events, _) = mpsc::channel(1);
            records.recent.subscribe(Subscriber { events, missed: Arc::default() });
        }
        assert_eq!(records.recent.lock().subscribers.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn first_byte_is_timed_once() {
        let (records, pod) = (WorkerRecords::default(), pod("a"));
        let accepted = Instant::now();
        let record = ConnectionRecord::opened(accepted, facts(), records.of_pod(&pod));
        assert_eq!(record.connection().first_byte(), None);
        let second = std::time::Duration::from_secs(1);
        tokio::time::advance(second).await;
        record.received(5);
        record.sent(1);
        tokio::time::advance(second).await;
        record.sent(2);
        let connection = record.connection().clone();
        record.close(Ok(()));
        assert_eq!((connection.first_byte(), connection.bytes()), (Some(second), [3, 5]));
    }
}
