//! Limits connections from unauthenticated clients, in total and per source, and displaces existing
//! ones.
//!
//! If no slot is free, a new connection displaces the oldest connection of the source with the most
//! connections. Idle unauthenticated connections are displaced first, then all unauthenticated
//! ones, then idle authenticated ones. An authenticated connection with a request in progress is
//! never displaced. A flood from any number of sources therefore displaces only its own
//! connections.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::budget::{Budget, Exhausted, Share, Sharing};
use super::keyed::KeyedBudget;
use super::source::SourceNetwork;

/// The slots of a server. Clones share them.
#[derive(Debug, Clone)]
pub struct ConnectionSlots(Arc<Mutex<SlotTable>>);

#[derive(Debug)]
struct SlotTable {
    budget: KeyedBudget<SourceNetwork>,
    next: u64,
    /// Keys increase with time, so the oldest connection is first.
    occupied: BTreeMap<u64, SlotState>,
}

#[derive(Debug)]
struct SlotState {
    source: SourceNetwork,
    _share: Share,
    authenticated: bool,
    requests: usize,
    displaced: Arc<Notify>,
}

/// The slot of one connection, freed when dropped.
#[derive(Debug)]
pub struct ConnectionSlot {
    slots: ConnectionSlots,
    number: u64,
    displaced: Arc<Notify>,
}

/// Marks the connection as busy with a request while this value lives.
#[derive(Debug)]
pub struct RequestInProgress<'a>(&'a ConnectionSlot);

impl ConnectionSlots {
    /// Creates `total` slots. One source may occupy at most `per_source` of them.
    pub fn new(total: usize, per_source: usize) -> Self {
        let budget = KeyedBudget::new(Budget::new(total), per_source, Sharing::Greedy);
        Self(Arc::new(Mutex::new(SlotTable { budget, next: 0, occupied: BTreeMap::new() })))
    }

    /// Takes a slot for a connection from `source`, which may displace another connection. `None`
    /// if no connection can be displaced.
    pub fn take(&self, source: IpAddr) -> Option<ConnectionSlot> {
        let source = SourceNetwork::of(source);
        let mut table = self.lock();
        let share = match table.budget.take(source) {
            Ok(share) => share,
            Err(exhausted) => {
                let any_source = exhausted == Exhausted::Whole;
                table.displace(|occupied| any_source || occupied.source == source)?;
                table.budget.take(source).ok()?
            }
        };
        let (number, displaced) = (table.next, Arc::<Notify>::default());
        table.next += 1;
        let occupied = SlotState {
            source,
            _share: share,
            authenticated: false,
            requests: 0,
            displaced: displaced.clone(),
        };
        table.occupied.insert(number, occupied);
        Some(ConnectionSlot { slots: self.clone(), number, displaced })
    }

    fn lock(&self) -> MutexGuard<'_, SlotTable> {
        // No code panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SlotTable {
    /// Frees the slot of one of the connections for which `is_displaceable` returns true.
    fn displace(&mut self, is_displaceable: impl Fn(&SlotState) -> bool) -> Option<()> {
        let number =
            [(false, false), (false, true), (true, false)].into_iter().find_map(|rank| {
                self.oldest_of_the_largest_source(|occupied| {
                    is_displaceable(occupied) && occupied.rank() == rank
                })
            })?;
        self.occupied.remove(&number)?.displaced.notify_one();
        Some(())
    }

    fn oldest_of_the_largest_source(
        &self,
        is_candidate: impl Fn(&SlotState) -> bool,
    ) -> Option<u64> {
        let candidates = || self.occupied.iter().filter(|(_, occupied)| is_candidate(occupied));
        let mut counts: HashMap<SourceNetwork, usize> = HashMap::new();
        candidates().for_each(|(_, occupied)| *counts.entry(occupied.source).or_default() += 1);
        let most = counts.values().max()?;
        candidates()
            .find(|(_, occupied)| counts.get(&occupied.source) == Some(most))
            .map(|(n, _)| *n)
    }
}

impl SlotState {
    /// Connections with a lower rank are displaced first.
    fn rank(&self) -> (bool, bool) {
        (self.authenticated, self.requests > 0)
    }
}

impl ConnectionSlot {
    /// Waits until another connection takes this slot.
    pub async fn displaced(&self) {
        self.displaced.notified().await;
    }

    /// Marks the connection as authenticated.
    pub fn mark_authenticated(&self) {
        self.change(|occupied| occupied.authenticated = true);
    }

    /// Returns true if the connection is authenticated and not displaced.
    pub fn is_authenticated(&self) -> bool {
        self.slots.lock().occupied.get(&self.number).is_some_and(|occupied| occupied.authenticated)
    }

    /// Marks the connection as busy while the returned value lives.
    pub fn request(&self) -> RequestInProgress<'_> {
        self.change(|occupied| occupied.requests += 1);
        RequestInProgress(self)
    }

    fn change(&self, change: impl FnOnce(&mut SlotState)) {
        // A displaced connection has no entry.
        if let Some(occupied) = self.slots.lock().occupied.get_mut(&self.number) {
            change(occupied);
        }
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        self.slots.lock().occupied.remove(&self.number);
    }
}

impl Drop for RequestInProgress<'_> {
    fn drop(&mut self) {
        self.0.change(|occupied| occupied.requests = occupied.requests.saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    const TOTAL: usize = 256;
    const PER_SOURCE: usize = 32;

    fn slots() -> ConnectionSlots {
        ConnectionSlots::new(TOTAL, PER_SOURCE)
    }

    fn ip(third: u8, last: u8) -> IpAddr {
        IpAddr::from([10, 0, third, last])
    }

    fn fill(slots: &ConnectionSlots, sources: impl Iterator<Item = IpAddr>) -> Vec<ConnectionSlot> {
        sources.map(|source| slots.take(source).unwrap()).collect()
    }

    fn displaced(held: &[ConnectionSlot]) -> Vec<usize> {
        let is_displaced = |(at, slot): (usize, &ConnectionSlot)| {
            slot.displaced().now_or_never().is_some().then_some(at)
        };
        held.iter().enumerate().filter_map(is_displaced).collect()
    }

    #[test]
    fn source_at_its_limit_displaces_its_own_oldest_connection() {
        let slots = slots();
        let other = slots.take(ip(1, 1)).unwrap();
        let held = fill(&slots, std::iter::repeat_n(ip(0, 1), PER_SOURCE));
        let _new = slots.take(ip(0, 1)).unwrap();
        assert_eq!(displaced(&held), [0]);
        assert!(other.displaced().now_or_never().is_none());
    }

    #[test]
    fn flood_from_several_sources_displaces_its_own_connections() {
        let slots = slots();
        let honest = slots.take(ip(1, 1)).unwrap();
        let sources = (0..TOTAL - 1).map(|n| ip(0, u8::try_from(n % 10).unwrap()));
        let mut held = fill(&slots, sources);
        for _ in 0..10 {
            held.push(slots.take(ip(2, 1)).unwrap());
            assert!(honest.displaced().now_or_never().is_none(), "the oldest of all");
        }
        assert_eq!(displaced(&held).len(), 10);
        assert_eq!(slots.lock().occupied.len(), TOTAL);
    }

    #[test]
    fn idle_connection_is_displaced_before_one_with_a_request() {
        let slots = ConnectionSlots::new(3, 3);
        let held = fill(&slots, [ip(0, 1), ip(0, 1), ip(0, 1)].into_iter());
        let _busy = [held[0].request(), held[2].request()];
        let _new = slots.take(ip(0, 1)).unwrap();
        assert_eq!(displaced(&held), [1]);
    }

    #[test]
    fn authenticated_connections_are_displaced_last_and_never_while_busy() {
        let slots = slots();
        let held = fill(&slots, std::iter::repeat_n(ip(0, 1), PER_SOURCE));
        held.iter().for_each(ConnectionSlot::mark_authenticated);
        let busy: Vec<_> = held[..PER_SOURCE - 1].iter().map(ConnectionSlot::request).collect();
        let new = slots.take(ip(0, 1)).unwrap();
        assert_eq!(displaced(&held), [PER_SOURCE - 1], "the idle one");
        let newer = slots.take(ip(0, 1)).unwrap();
        assert!(new.displaced().now_or_never().is_some(), "the unauthenticated one");
        newer.mark_authenticated();
        let _request = newer.request();
        assert!(slots.take(ip(0, 1)).is_none());
        drop(busy);
        assert!(slots.take(ip(0, 1)).is_some());
    }

    #[test]
    fn closed_connections_free_their_slots() {
        let slots = slots();
        drop(fill(&slots, (0..TOTAL).map(|n| ip(0, u8::try_from(n).unwrap()))));
        assert!(slots.lock().occupied.is_empty());
    }
}
