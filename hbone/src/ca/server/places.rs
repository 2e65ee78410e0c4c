//! The places that connections to the CA take: how many there are, how many one source has, and
//! which connection loses its place to a new one.
//!
//! Anyone can connect, so a connection is worth little before it has presented a listed token. When
//! there is no place, the connection that loses its own is the oldest one of the source that has
//! the most, among those without a token; else among idle ones with a token. One that is being
//! answered never does. So a flood displaces itself, from one source or from several.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::sources::network;

/// How many connections there are at most.
const PLACES: usize = 256;
/// How many of them one source has at most: an IPv4 address or an IPv6 /64.
const PER_SOURCE: usize = 32;

/// All places. Cheap to clone; clones are the same places.
#[derive(Debug, Clone, Default)]
pub(super) struct Places(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    next: u64,
    /// By number: the oldest first.
    taken: BTreeMap<u64, Taken>,
}

#[derive(Debug)]
struct Taken {
    source: IpAddr,
    proven: bool,
    requests: usize,
    evicted: Arc<Notify>,
}

/// The place of one connection, for as long as it lives.
#[derive(Debug)]
pub(super) struct Place {
    places: Places,
    number: u64,
    evicted: Arc<Notify>,
}

/// A request that is being answered.
#[derive(Debug)]
pub(super) struct Busy<'a>(&'a Place);

impl Places {
    /// A place for a connection of `source`. If need be, another connection loses its own; `None`
    /// if none can.
    pub(super) fn take(&self, source: IpAddr) -> Option<Place> {
        let source = network(source);
        let mut table = self.table();
        let own = table.taken.values().filter(|taken| taken.source == source).count();
        if own >= PER_SOURCE {
            table.evict(|taken| taken.source == source)?;
        } else if table.taken.len() >= PLACES {
            table.evict(|_| true)?;
        }
        let (number, evicted) = (table.next, Arc::<Notify>::default());
        table.next += 1;
        let taken = Taken { source, proven: false, requests: 0, evicted: evicted.clone() };
        table.taken.insert(number, taken);
        Some(Place { places: self.clone(), number, evicted })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Nothing panics while it is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Frees the place of one of those that may lose it.
    fn evict(&mut self, may_lose: impl Fn(&Taken) -> bool) -> Option<()> {
        let number = [false, true].into_iter().find_map(|proven| {
            let is_candidate = |taken: &Taken| {
                may_lose(taken) && taken.proven == proven && !(proven && taken.requests > 0)
            };
            self.oldest_of_the_largest_source(is_candidate)
        })?;
        self.taken.remove(&number)?.evicted.notify_one();
        Some(())
    }

    fn oldest_of_the_largest_source(&self, is_candidate: impl Fn(&Taken) -> bool) -> Option<u64> {
        let candidates = || self.taken.iter().filter(|(_, taken)| is_candidate(taken));
        let mut counts: HashMap<IpAddr, usize> = HashMap::new();
        candidates().for_each(|(_, taken)| *counts.entry(taken.source).or_default() += 1);
        let most = counts.values().max()?;
        candidates().find(|(_, taken)| counts.get(&taken.source) == Some(most)).map(|(n, _)| *n)
    }
}

impl Place {
    /// Waits until another connection has taken the place.
    pub(super) async fn evicted(&self) {
        self.evicted.notified().await;
    }

    /// Notes that the connection has presented a listed token.
    pub(super) fn prove(&self) {
        self.change(|taken| taken.proven = true);
    }

    /// Whether it has, and has not lost its place.
    pub(super) fn is_proven(&self) -> bool {
        self.places.table().taken.get(&self.number).is_some_and(|taken| taken.proven)
    }

    /// Notes a request that is being answered for as long as the value lives.
    pub(super) fn request(&self) -> Busy<'_> {
        self.change(|taken| taken.requests += 1);
        Busy(self)
    }

    fn change(&self, change: impl FnOnce(&mut Taken)) {
        // Once the place is lost there is nothing to note.
        if let Some(taken) = self.places.table().taken.get_mut(&self.number) {
            change(taken);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.table().taken.remove(&self.number);
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.change(|taken| taken.requests = taken.requests.saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn ip(third: u8, last: u8) -> IpAddr {
        IpAddr::from([10, 0, third, last])
    }

    fn fill(places: &Places, sources: impl Iterator<Item = IpAddr>) -> Vec<Place> {
        sources.map(|source| places.take(source).unwrap()).collect()
    }

    fn evicted(held: &[Place]) -> Vec<usize> {
        let is_evicted =
            |(at, place): (usize, &Place)| place.evicted().now_or_never().is_some().then_some(at);
        held.iter().enumerate().filter_map(is_evicted).collect()
    }

    #[test]
    fn source_at_its_cap_displaces_its_own_oldest() {
        let places = Places::default();
        let other = places.take(ip(1, 1)).unwrap();
        let held = fill(&places, std::iter::repeat_n(ip(0, 1), PER_SOURCE));
        let _new = places.take(ip(0, 1)).unwrap();
        assert_eq!(evicted(&held), [0]);
        assert!(other.evicted().now_or_never().is_none());
    }

    #[test]
    fn flood_from_several_sources_displaces_itself() {
        let places = Places::default();
        let honest = places.take(ip(1, 1)).unwrap();
        let sources = (0..PLACES - 1).map(|n| ip(0, u8::try_from(n % 10).unwrap()));
        let mut held = fill(&places, sources);
        for _ in 0..10 {
            held.push(places.take(ip(2, 1)).unwrap());
            assert!(honest.evicted().now_or_never().is_none(), "the oldest of all");
        }
        assert_eq!(evicted(&held).len(), 10);
        assert_eq!(places.table().taken.len(), PLACES);
    }

    #[test]
    fn proven_connections_outlast_others_and_busy_ones_all() {
        let places = Places::default();
        let held = fill(&places, std::iter::repeat_n(ip(0, 1), PER_SOURCE));
        held.iter().for_each(Place::prove);
        let busy: Vec<_> = held[..PER_SOURCE - 1].iter().map(Place::request).collect();
        let new = places.take(ip(0, 1)).unwrap();
        assert_eq!(evicted(&held), [PER_SOURCE - 1], "the idle one");
        let newer = places.take(ip(0, 1)).unwrap();
        assert!(new.evicted().now_or_never().is_some(), "the one without a token");
        newer.prove();
        let _request = newer.request();
        assert!(places.take(ip(0, 1)).is_none());
        drop(busy);
        assert!(places.take(ip(0, 1)).is_some());
    }

    #[test]
    fn closed_connections_free_their_places() {
        let places = Places::default();
        drop(fill(&places, (0..PLACES).map(|n| ip(0, u8::try_from(n).unwrap()))));
        assert!(places.table().taken.is_empty());
    }
}
