//! Slots for connections to the CA: a total, a limit per source, and displacement of existing
//! connections.
//!
//! Clients are unauthenticated until they present a listed token. If no slot is free, the displaced
//! connection is the oldest one of the source with the most, among those without a token; otherwise
//! among idle ones with a token. Connections with a request in progress are never displaced. So a
//! flood displaces itself, from one source or several.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::sources::network;

/// The maximum number of connections.
const MAX_SLOTS: usize = 256;
/// The maximum number of connections per source: an IPv4 address or an IPv6 /64.
const MAX_PER_SOURCE: usize = 32;

/// All slots. Cheap to clone; clones share the slots.
#[derive(Debug, Clone, Default)]
pub(super) struct ConnectionSlots(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    next: u64,
    /// By number, so the oldest is first.
    occupied: BTreeMap<u64, SlotState>,
}

#[derive(Debug)]
struct SlotState {
    source: IpAddr,
    proven: bool,
    requests: usize,
    displaced: Arc<Notify>,
}

/// The slot of a connection. Dropping it frees the slot.
#[derive(Debug)]
pub(super) struct ConnectionSlot {
    slots: ConnectionSlots,
    number: u64,
    displaced: Arc<Notify>,
}

/// Marks a request in progress.
#[derive(Debug)]
pub(super) struct RequestInProgress<'a>(&'a ConnectionSlot);

impl ConnectionSlots {
    /// Takes a slot for a connection of `source`, displacing another one if needed. `None` if none
    /// can be displaced.
    pub(super) fn take(&self, source: IpAddr) -> Option<ConnectionSlot> {
        let source = network(source);
        let mut table = self.table();
        let own = table.occupied.values().filter(|occupied| occupied.source == source).count();
        if own >= MAX_PER_SOURCE {
            table.displace(|occupied| occupied.source == source)?;
        } else if table.occupied.len() >= MAX_SLOTS {
            table.displace(|_| true)?;
        }
        let (number, displaced) = (table.next, Arc::<Notify>::default());
        table.next += 1;
        let occupied =
            SlotState { source, proven: false, requests: 0, displaced: displaced.clone() };
        table.occupied.insert(number, occupied);
        Some(ConnectionSlot { slots: self.clone(), number, displaced })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // No holder panics.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Frees the slot of one of the connections that `may_lose` selects.
    fn displace(&mut self, may_lose: impl Fn(&SlotState) -> bool) -> Option<()> {
        let number = [false, true].into_iter().find_map(|proven| {
            let is_candidate = |occupied: &SlotState| {
                may_lose(occupied)
                    && occupied.proven == proven
                    && !(proven && occupied.requests > 0)
            };
            self.oldest_of_the_largest_source(is_candidate)
        })?;
        self.occupied.remove(&number)?.displaced.notify_one();
        Some(())
    }

    fn oldest_of_the_largest_source(
        &self,
        is_candidate: impl Fn(&SlotState) -> bool,
    ) -> Option<u64> {
        let candidates = || self.occupied.iter().filter(|(_, occupied)| is_candidate(occupied));
        let mut counts: HashMap<IpAddr, usize> = HashMap::new();
        candidates().for_each(|(_, occupied)| *counts.entry(occupied.source).or_default() += 1);
        let most = counts.values().max()?;
        candidates()
            .find(|(_, occupied)| counts.get(&occupied.source) == Some(most))
            .map(|(n, _)| *n)
    }
}

impl ConnectionSlot {
    /// Waits until another connection displaced this one.
    pub(super) async fn displaced(&self) {
        self.displaced.notified().await;
    }

    /// Marks the connection as authenticated by a listed token.
    pub(super) fn mark_authenticated(&self) {
        self.change(|occupied| occupied.proven = true);
    }

    /// Returns true if it is authenticated and not displaced.
    pub(super) fn is_authenticated(&self) -> bool {
        self.slots.table().occupied.get(&self.number).is_some_and(|occupied| occupied.proven)
    }

    /// Marks a request in progress until the value is dropped.
    pub(super) fn request(&self) -> RequestInProgress<'_> {
        self.change(|occupied| occupied.requests += 1);
        RequestInProgress(self)
    }

    fn change(&self, change: impl FnOnce(&mut SlotState)) {
        // A displaced connection has no entry.
        if let Some(occupied) = self.slots.table().occupied.get_mut(&self.number) {
            change(occupied);
        }
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        self.slots.table().occupied.remove(&self.number);
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

    fn ip(third: u8, last: u8) -> IpAddr {
        IpAddr::from([10, 0, third, last])
    }

    fn fill(slots: &ConnectionSlots, sources: impl Iterator<Item = IpAddr>) -> Vec<ConnectionSlot> {
        sources.map(|source| slots.take(source).unwrap()).collect()
    }

    fn displaced(held: &[ConnectionSlot]) -> Vec<usize> {
        let is_evicted = |(at, slot): (usize, &ConnectionSlot)| {
            slot.displaced().now_or_never().is_some().then_some(at)
        };
        held.iter().enumerate().filter_map(is_evicted).collect()
    }

    #[test]
    fn source_at_its_cap_displaces_its_own_oldest() {
        let slots = ConnectionSlots::default();
        let other = slots.take(ip(1, 1)).unwrap();
        let held = fill(&slots, std::iter::repeat_n(ip(0, 1), MAX_PER_SOURCE));
        let _new = slots.take(ip(0, 1)).unwrap();
        assert_eq!(displaced(&held), [0]);
        assert!(other.displaced().now_or_never().is_none());
    }

    #[test]
    fn flood_from_several_sources_displaces_itself() {
        let slots = ConnectionSlots::default();
        let honest = slots.take(ip(1, 1)).unwrap();
        let sources = (0..MAX_SLOTS - 1).map(|n| ip(0, u8::try_from(n % 10).unwrap()));
        let mut held = fill(&slots, sources);
        for _ in 0..10 {
            held.push(slots.take(ip(2, 1)).unwrap());
            assert!(honest.displaced().now_or_never().is_none(), "the oldest of all");
        }
        assert_eq!(displaced(&held).len(), 10);
        assert_eq!(slots.table().occupied.len(), MAX_SLOTS);
    }

    #[test]
    fn proven_connections_outlast_others_and_busy_ones_all() {
        let slots = ConnectionSlots::default();
        let held = fill(&slots, std::iter::repeat_n(ip(0, 1), MAX_PER_SOURCE));
        held.iter().for_each(ConnectionSlot::mark_authenticated);
        let busy: Vec<_> = held[..MAX_PER_SOURCE - 1].iter().map(ConnectionSlot::request).collect();
        let new = slots.take(ip(0, 1)).unwrap();
        assert_eq!(displaced(&held), [MAX_PER_SOURCE - 1], "the idle one");
        let newer = slots.take(ip(0, 1)).unwrap();
        assert!(new.displaced().now_or_never().is_some(), "the one without a token");
        newer.mark_authenticated();
        let _request = newer.request();
        assert!(slots.take(ip(0, 1)).is_none());
        drop(busy);
        assert!(slots.take(ip(0, 1)).is_some());
    }

    #[test]
    fn closed_connections_free_their_places() {
        let slots = ConnectionSlots::default();
        drop(fill(&slots, (0..MAX_SLOTS).map(|n| ip(0, u8::try_from(n).unwrap()))));
        assert!(slots.table().occupied.is_empty());
    }
}
