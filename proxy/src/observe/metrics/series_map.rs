//! A bounded map of series by their labels, which peers choose in part. A series expires after a
//! time without counts and users. Beyond the limit, further label sets share overflow series.
//!
//! The map is divided into shards, so that a scrape of many series locks out a worker only for a
//! fraction of its time.

use std::collections::HashMap;
use std::hash::BuildHasher as _;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use foldhash::fast::RandomState;
use tokio::time::Instant;

const SHARDS: usize = 32;
/// The minimum interval of searches for expired series in a full map. Each search visits all
/// series.
const EXPIRY_INTERVAL: Duration = Duration::from_secs(1);

/// A series of a map.
pub(super) trait Counted {
    /// The number of counted events. If it has not changed, nothing was counted.
    fn events(&self) -> u64;
}

/// A map of series by their labels in Prometheus' text format.
#[derive(Debug)]
pub(super) struct SeriesMap<S> {
    limit: usize,
    /// The time without counts after which a series expires.
    idle: Duration,
    shards: [Shard<S>; SHARDS],
    hasher: RandomState,
    /// The number of series in all shards.
    count: AtomicUsize,
    /// The overflow series. They do not expire.
    overflow: Mutex<HashMap<Arc<str>, Arc<S>>>,
    /// The time of the last search for expired series because the map was full.
    searched_at: Mutex<Option<Instant>>,
    /// Whether the log has reported that the limit is reached.
    is_reported: AtomicBool,
}

/// Locked by a worker whose cache lacks a series, and by a scrape.
type Shard<S> = Mutex<HashMap<Arc<str>, Entry<S>>>;

#[derive(Debug)]
struct Entry<S> {
    series: Arc<S>,
    /// The last seen value of [`Counted::events`].
    events: u64,
    changed_at: Instant,
}

impl<S: Counted> SeriesMap<S> {
    pub(super) fn new(limit: usize, idle: Duration) -> Self {
        Self {
            limit,
            idle,
            shards: std::array::from_fn(|_| Mutex::default()),
            hasher: RandomState::default(),
            count: AtomicUsize::new(0),
            overflow: Mutex::default(),
            searched_at: Mutex::default(),
            is_reported: AtomicBool::new(false),
        }
    }

    /// The series with these labels, created by `new` if it is missing; `None` if there are too
    /// many.
    pub(super) fn get(&self, labels: String, new: impl FnOnce(Arc<str>) -> S) -> Option<Arc<S>> {
        let shard = self.shard(&labels);
        if let Some(entry) = lock(shard).get(&*labels) {
            return Some(entry.series.clone());
        }
        let now = Instant::now();
        if self.is_full() {
            self.make_room(now);
        }
        let mut shard = lock(shard);
        // Another worker may have registered it meanwhile.
        if let Some(entry) = shard.get(&*labels) {
            return Some(entry.series.clone());
        }
        if self.count.fetch_add(1, Relaxed) >= self.limit {
            self.count.fetch_sub(1, Relaxed);
            self.report_limit();
            return None;
        }
        self.is_reported.store(false, Relaxed);
        let labels: Arc<str> = labels.into();
        let series = Arc::new(new(labels.clone()));
        shard.insert(labels, Entry { series: series.clone(), events: 0, changed_at: now });
        Some(series)
    }

    /// The overflow series with these labels.
    pub(super) fn overflow(&self, labels: String, new: impl FnOnce(Arc<str>) -> S) -> Arc<S> {
        let labels: Arc<str> = labels.into();
        let create = || Arc::new(new(labels.clone()));
        lock(&self.overflow).entry(labels.clone()).or_insert_with(create).clone()
    }

    /// All unexpired series and the overflow series.
    pub(super) fn all(&self) -> Vec<Arc<S>> {
        let now = Instant::now();
        let mut all = Vec::with_capacity(self.count.load(Relaxed));
        for shard in &self.shards {
            let mut shard = lock(shard);
            self.expire(&mut shard, now);
            all.extend(shard.values().map(|entry| entry.series.clone()));
        }
        all.extend(lock(&self.overflow).values().cloned());
        // Rendering reads each series several times: the order of their addresses is faster than
        // that of their hashes.
        all.sort_unstable_by_key(|series| Arc::as_ptr(series).addr());
        all
    }

    fn shard(&self, labels: &str) -> &Shard<S> {
        let index = usize::try_from(self.hasher.hash_one(labels) % SHARDS as u64);
        let [first, ..] = &self.shards;
        index.ok().and_then(|index| self.shards.get(index)).unwrap_or(first)
    }

    fn is_full(&self) -> bool {
        self.count.load(Relaxed) >= self.limit
    }

    /// Removes expired series, unless it was done a short time ago.
    fn make_room(&self, now: Instant) {
        let mut searched_at = lock(&self.searched_at);
        if searched_at.is_some_and(|at| now < at + EXPIRY_INTERVAL) {
            return;
        }
        *searched_at = Some(now);
        // Released before the search, so that other workers do not wait for it.
        drop(searched_at);
        self.shards.iter().for_each(|shard| self.expire(&mut lock(shard), now));
    }

    /// Removes the series that have counted nothing for the idle time and have no user.
    fn expire(&self, shard: &mut HashMap<Arc<str>, Entry<S>>, now: Instant) {
        let mut expired = Vec::new();
        for (labels, entry) in shard.iter_mut() {
            let events = entry.series.events();
            if events != entry.events {
                (entry.events, entry.changed_at) = (events, now);
            } else if now.duration_since(entry.changed_at) >= self.idle
                && Arc::strong_count(&entry.series) == 1
            {
                expired.push(labels.clone());
            }
        }
        for labels in expired {
            let Some(Entry { series, events, .. }) = shard.remove(&labels) else { continue };
            // Fails if a worker has found the series in its cache meanwhile. Otherwise no worker
            // can find it later.
            let kept = match Arc::try_unwrap(series) {
                Ok(series) if series.events() == events => {
                    self.count.fetch_sub(1, Relaxed);
                    continue;
                }
                Ok(series) => Arc::new(series),
                Err(series) => series,
            };
            shard.insert(labels, Entry { series: kept, events, changed_at: now });
        }
    }

    fn report_limit(&self) {
        if !self.is_reported.swap(true, Relaxed) {
            tracing::warn!(
                limit = self.limit,
                hint = "metrics.label_sets",
                "too many metric series: connections with other labels are counted as overflow"
            );
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code panics while it holds a lock.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
