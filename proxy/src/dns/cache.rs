//! Responses of servers, as long as their TTLs allow, and longer while no server answers
//! (RFC 8767).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::message::{AD, CD, Query, RD, RecordType};
use super::name::DomainName;
use super::response::StoredResponse;

/// The maximum time that a response is used without asking again: a change of a name with a long
/// TTL becomes visible after this time.
const MAX_FRESH: Duration = Duration::from_mins(5);
/// The maximum time for responses without an answer, so that a new name becomes visible soon.
const MAX_NEGATIVE: Duration = Duration::from_secs(30);
/// How long expired responses are used while no server answers: time to repair a server. RFC 8767
/// section 5 allows days, but addresses of workloads are reassigned sooner.
pub(crate) const MAX_STALE: Duration = Duration::from_mins(15);
/// How long a client waits for a server while there is a stale response (RFC 8767 section 5: client
/// response timer).
pub(crate) const STALE_WAIT: Duration = Duration::from_millis(1800);
/// How long after a failed query expired responses are used at once, while the servers are asked
/// (RFC 8767 section 5: failure recheck timer).
pub(super) const RECHECK: Duration = Duration::from_secs(30);
/// The maximum memory of a pod's responses, and their number.
const MAX_BYTES: usize = 256 << 10;
const MAX_ENTRIES: usize = 2048;
/// The memory of an entry without its message.
const ENTRY_BYTES: usize = 128;

/// The parts of a query that its response depends on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    name: DomainName,
    kind: RecordType,
    flags: u16,
    dnssec_ok: bool,
}

impl Key {
    /// `None` if the answer to `query` serves no other query.
    pub(super) fn of(query: &Query) -> Option<Self> {
        let (kind, flags) = (query.kind, query.flags & (RD | CD | AD));
        let key = Self { name: query.name.clone(), kind, flags, dnssec_ok: query.dnssec_ok() };
        query.is_plain.then_some(key)
    }
}

/// The stored responses of one pod. Times are arguments.
#[derive(Debug, Default)]
pub(super) struct Cache {
    entries: HashMap<Key, Entry>,
    bytes: usize,
}

#[derive(Debug)]
struct Entry {
    response: Arc<StoredResponse>,
    stored: Instant,
    lifetime: Duration,
    used: Instant,
    /// The last time that no server has answered.
    failed: Option<Instant>,
}

/// A stored response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Cached {
    /// With its age.
    Fresh(Arc<StoredResponse>, Duration),
    /// It has expired.
    Stale(Stale),
    Missing,
}

/// A stored response that has expired.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stale {
    pub(super) response: Arc<StoredResponse>,
    /// Whether the servers have failed within [`RECHECK`].
    pub(super) has_failed: bool,
}

impl Cache {
    pub(super) fn get(&mut self, key: &Key, now: Instant) -> Cached {
        let Some(entry) = self.entries.get_mut(key) else { return Cached::Missing };
        entry.used = now;
        let age = now.duration_since(entry.stored);
        match () {
            () if age < entry.lifetime => Cached::Fresh(entry.response.clone(), age),
            () if age < entry.lifetime + MAX_STALE => Cached::Stale(Stale {
                response: entry.response.clone(),
                has_failed: entry.failed.is_some_and(|at| now.duration_since(at) < RECHECK),
            }),
            () => Cached::Missing,
        }
    }

    /// Stores a response, if it may be cached.
    pub(super) fn insert(&mut self, key: Key, response: Arc<StoredResponse>, now: Instant) {
        let Some(ttl @ 1..) = response.ttl(key.kind) else { return };
        let limit = if response.has_answer(key.kind) { MAX_FRESH } else { MAX_NEGATIVE };
        let lifetime = Duration::from_secs(ttl.into()).min(limit);
        let size = size(&key, &response);
        if size > MAX_BYTES / 2 {
            return;
        }
        self.remove(&key);
        if self.bytes + size > MAX_BYTES || self.entries.len() >= MAX_ENTRIES {
            self.evict(now, size);
        }
        self.bytes += size;
        self.entries
            .insert(key, Entry { response, stored: now, lifetime, used: now, failed: None });
    }

    /// Records that no server has answered.
    pub(super) fn fail(&mut self, key: &Key, now: Instant) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.failed = Some(now);
        }
    }

    fn remove(&mut self, key: &Key) {
        if let Some(entry) = self.entries.remove(key) {
            self.bytes -= size(key, &entry.response);
        }
    }

    /// Removes the least recently used entries, an eighth of all and enough for `wanted` bytes, so
    /// that the search for them is rare.
    fn evict(&mut self, now: Instant, wanted: usize) {
        let mut by_use: Vec<_> = self.entries.iter().map(|(key, one)| (one.used, key)).collect();
        by_use.sort_unstable_by_key(|(used, _)| *used);
        let keys: Vec<Key> = by_use.into_iter().map(|(_, key)| key.clone()).collect();
        let share = keys.len() / 8 + 1;
        let is_dead =
            |entry: &Entry| now.duration_since(entry.stored) >= entry.lifetime + MAX_STALE;
        for (index, key) in keys.iter().enumerate() {
            let is_enough = index >= share && self.bytes + wanted <= MAX_BYTES;
            if !is_enough || self.entries.get(key).is_some_and(is_dead) {
                self.remove(key);
            }
        }
    }
}

fn size(key: &Key, response: &StoredResponse) -> usize {
    ENTRY_BYTES + key.name.as_str().len() + response.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dns::message::testing::{query, record, response};

    fn key(name: &str) -> Key {
        Key::of(&Query::read(&query(name, RecordType::A, &[])).unwrap()).unwrap()
    }

    fn stored(name: &str, ttl: u32, length: usize) -> Arc<StoredResponse> {
        let asked = query(name, RecordType::A, &[]);
        let records = [record(1, ttl, &[10, 0, 0, 1]), record(16, ttl, &vec![0; length])];
        Arc::new(StoredResponse::new(response(&asked, 0, [&records, &[], &[]])).unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn response_is_fresh_then_stale_then_gone() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        cache.insert(key("a"), stored("a", 60, 0), now);
        let at = |cache: &mut Cache, seconds| match cache
            .get(&key("A"), now + Duration::from_secs(seconds))
        {
            Cached::Fresh(_, age) => format!("{} s old", age.as_secs()),
            Cached::Stale(stale) if stale.has_failed => "failed".to_owned(),
            Cached::Stale(_) => "stale".to_owned(),
            Cached::Missing => "missing".to_owned(),
        };
        assert_eq!(at(&mut cache, 59), "59 s old");
        assert_eq!(at(&mut cache, 60), "stale");
        cache.fail(&key("a"), now + Duration::from_secs(60));
        assert_eq!(at(&mut cache, 60 + 29), "failed");
        assert_eq!(at(&mut cache, 60 + 30), "stale");
        assert_eq!(at(&mut cache, 60 + 899), "stale");
        assert_eq!(at(&mut cache, 60 + 900), "missing");
    }

    #[tokio::test(start_paused = true)]
    async fn lifetime_is_bounded_and_zero_is_not_stored() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        cache.insert(key("long"), stored("long", 86_400, 0), now);
        assert!(matches!(cache.get(&key("long"), now + MAX_FRESH), Cached::Stale(_)));
        cache.insert(key("zero"), stored("zero", 0, 0), now);
        assert_eq!(cache.get(&key("zero"), now), Cached::Missing);
        let soa = record(6, 900, &[[0; 20].as_slice(), &[0, 0, 3, 0]].concat());
        let asked = query("no", RecordType::A, &[]);
        let no = StoredResponse::new(response(&asked, 3, [&[], &[soa], &[]])).unwrap();
        cache.insert(key("no"), Arc::new(no), now);
        assert!(matches!(cache.get(&key("no"), now + MAX_NEGATIVE), Cached::Stale(_)));
    }

    #[tokio::test(start_paused = true)]
    async fn memory_and_number_of_responses_are_bounded() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        for (count, length) in [(3 * MAX_ENTRIES, 0), (100, 20_000)] {
            for n in 0..count {
                let name = format!("n{n}");
                let at = now + Duration::from_nanos(u64::try_from(n).unwrap());
                cache.insert(key(&name), stored(&name, 60, length), at);
                assert!(cache.bytes <= MAX_BYTES && cache.entries.len() <= MAX_ENTRIES);
                assert!(
                    matches!(cache.get(&key(&name), at), Cached::Fresh(..)),
                    "the newest stays"
                );
            }
        }
        let sizes = cache.entries.iter().map(|(key, entry)| size(key, &entry.response));
        let sum: usize = sizes.sum();
        assert_eq!(cache.bytes, sum);
        cache.insert(key("huge"), stored("huge", 60, 60_000), now);
        cache.insert(key("too-huge"), stored("too-huge", 60, 65_000), now);
        assert!(cache.bytes <= MAX_BYTES);
    }
}
