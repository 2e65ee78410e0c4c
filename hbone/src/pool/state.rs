//! Which tunnel a stream goes through, when tunnels are dialled, and when they are let go: the
//! pool's decisions.
//!
//! ```text
//!          opened         not usable, too old, idle           closed
//! dialing ────────▶ open ───────────────────────────▶ retired ────────▶ gone
//!   ▲ │ failed
//!   │ ▼                    nobody asked for a while
//! backing off ──────────────────────────────────────▶ gone
//! ```
//!
//! Not here: IO, tasks and clocks. Tunnels are seen through [`Handle`], and the time comes as an
//! argument.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use foldhash::fast::RandomState;
use tokio::time::Instant;

use super::{PoolSettings, PoolStatistics, TunnelKey};
use crate::error::HboneError;

/// The pause after a first failure: not longer than a client waits gladly for a peer that restarts,
/// and still no more than ten dials a second to one that refuses.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// What it doubles to: a peer that came back is not missed for longer than a person notices.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Thousandths of a pause, so that the workers of many hosts do not dial a peer that came back all
/// at once.
const PAUSE_JITTER: RangeInclusive<u32> = 800..=1200;
/// How long after its pause a failure is remembered: one that follows sooner counts as the next in
/// a row.
const FORGET_AFTER: Duration = Duration::from_secs(10);

/// Thousandths of the maximum age, so that tunnels opened together do not all move at once.
const AGE_JITTER: RangeInclusive<u32> = 900..=1000;
/// Thousandths of the idle time, for the same reason.
const IDLE_JITTER: RangeInclusive<u32> = 900..=1100;
/// A tunnel that is not needed goes after this part of the idle time: the last one saves a dial,
/// others save none.
const SURPLUS_IDLE_PART: u32 = 10;

/// From here a new stream is better off in another tunnel. It is a quarter of what a 1 Gbit/s link
/// carries: below it a shared congestion window and socket buffer hardly delay anybody.
const BUSY_BYTES_PER_SECOND: u64 = 32 << 20;

/// How many tunnels to one peer are dialled at once: a handful serves a burst soon, and is far from
/// the number of handshakes that a peer bears from one address (64 is our own default, for all
/// workers of a client).
const DIALS_AT_ONCE: usize = 4;

/// Longer waits are cut to this, as tokio does it: an [`Instant`] cannot express every one.
const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 3600);

/// A tunnel as the pool sees it.
pub(super) trait Handle {
    /// Holds a stream's place in the tunnel from the moment it is promised.
    type Place;

    /// How it is right now.
    fn load(&self) -> Load;

    /// A place for one more stream, whatever the load; `None` once released.
    fn reserve(&self) -> Option<Self::Place>;

    /// Lets go of the tunnel, so that it closes with its last stream.
    fn release(&mut self);
}

/// What is asked of a tunnel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    /// Whether it takes new streams: it is neither closed nor going away, and both certificates are
    /// valid.
    pub(super) usable: bool,
    /// How many streams have a place.
    pub(super) streams: usize,
    /// Since when there are none.
    pub(super) idle_since: Option<Instant>,
    /// How many the peer allows; `None` if it did not say so (yet).
    pub(super) allowed: Option<usize>,
    /// What it moves in both directions.
    pub(super) bytes_per_second: u64,
}

/// Names a tunnel within a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TunnelId(u64);

/// Names a dial within a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DialId(pub(super) u64);

/// What a caller wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    /// A place in whatever tunnel there is.
    Any,
    /// A place in a tunnel that is only being opened.
    Fresh,
}

/// What a caller gets.
#[derive(Debug)]
pub(super) enum Checkout<P, W> {
    /// A place in a tunnel.
    Use {
        /// Which one.
        id: TunnelId,
        /// The place.
        place: P,
    },
    /// A dial to wait for.
    Wait {
        /// Its ticket.
        ticket: W,
        /// Whether the tunnel that it opens is to have a place for the caller. Otherwise all dials
        /// are spoken for; once this one has ended, ask again.
        promised: bool,
    },
    /// Nothing, because the last dial failed just now.
    Refuse {
        /// How long nothing is dialled yet.
        remaining: Duration,
        /// Why the last dial failed.
        last: Arc<HboneError>,
    },
}

/// The tunnels `T`, and the tickets `W` that callers wait with for those being dialled.
#[derive(Debug)]
pub(super) struct State<T, W> {
    settings: PoolSettings,
    /// With a fast hash: the keys come from the mesh, not from peers.
    entries: HashMap<TunnelKey, Entry<T, W>, RandomState>,
    opened: u64,
    dialled: u64,
    rng: Rng,
}

/// All there is for one key. Removed as soon as there is nothing.
#[derive(Debug)]
struct Entry<T, W> {
    /// In the order in which they were opened.
    tunnels: Vec<Slot<T>>,
    /// The oldest first.
    dials: Vec<UnderWay<W>>,
    backoff: Option<Backoff>,
}

#[derive(Debug)]
struct UnderWay<W> {
    id: DialId,
    ticket: W,
    /// How many places are promised.
    promised: usize,
}

#[derive(Debug)]
struct Slot<T> {
    id: TunnelId,
    tunnel: T,
    /// How it was when [`Entry::look`] last looked.
    seen: Load,
    retired: bool,
    /// The end of its maximum age.
    retires: Instant,
    /// How long it may be without streams.
    idle: Duration,
}

#[derive(Debug)]
struct Backoff {
    failures: u32,
    until: Instant,
    last: Arc<HboneError>,
}

impl<T: Handle, W: Clone> State<T, W> {
    /// The same `seed` gives the same jitter.
    pub(super) fn new(settings: PoolSettings, seed: u64) -> Self {
        let (opened, dialled) = (0, 0);
        Self { settings, entries: HashMap::default(), opened, dialled, rng: Rng::with_seed(seed) }
    }

    /// Decides where a stream goes. If that takes a dial, or another tunnel would be good to have
    /// soon, `dial` is called for the ticket of one; [`State::opened`], [`State::failed`] or
    /// [`State::abandoned`] must follow.
    ///
    /// Full tunnels are never waited for: beyond `tunnels_per_peer`, which bounds what is opened
    /// because of load, others are dialled, for as many callers each as a tunnel has places. What
    /// bounds that is the number of callers.
    pub(super) fn checkout(
        &mut self,
        key: &TunnelKey,
        wish: Wish,
        now: Instant,
        dial: impl FnOnce(DialId) -> W,
    ) -> Checkout<T::Place, W> {
        let settings = &self.settings;
        let entry = self.entries.entry(key.clone()).or_default();
        entry.look(now);
        let dialled = &mut self.dialled;
        let dial = |promised| {
            *dialled += 1;
            let id = DialId(*dialled);
            UnderWay { id, ticket: dial(id), promised }
        };
        if wish == Wish::Any
            && let Some((id, place, crowded)) = entry.take_place(settings.streams_per_tunnel)
        {
            if crowded && entry.may_grow(settings.tunnels_per_peer, now) {
                entry.dials.push(dial(0));
            }
            return Checkout::Use { id, place };
        }
        if let Some(ticket) = entry.promise(settings.streams_per_tunnel) {
            return Checkout::Wait { ticket, promised: true };
        }
        let pause = entry.pause(now);
        let no_more = pause.is_some() || entry.dials.len() >= DIALS_AT_ONCE;
        if let Some(first) = entry.dials.first().filter(|_| no_more) {
            return Checkout::Wait { ticket: first.ticket.clone(), promised: false };
        }
        if let Some((remaining, last)) = pause {
            return Checkout::Refuse { remaining, last };
        }
        let under_way = dial(1);
        let ticket = under_way.ticket.clone();
        entry.dials.push(under_way);
        Checkout::Wait { ticket, promised: true }
    }

    /// A place in the tunnel that a caller waited for; `None` if others that waited took all there
    /// were. Should it be gone already, whoever takes a place learns there why.
    pub(super) fn join(&self, key: &TunnelKey, tunnel: &T) -> Option<T::Place> {
        let allowed = self.entries.get(key).and_then(Entry::allowed);
        let load = tunnel.load();
        let room = load.streams < load.limit(self.settings.streams_per_tunnel, allowed);
        if room { tunnel.reserve() } else { None }
    }

    /// Takes in the tunnel that was dialled.
    pub(super) fn opened(
        &mut self,
        key: &TunnelKey,
        dial: DialId,
        tunnel: T,
        now: Instant,
    ) -> TunnelId {
        self.opened += 1;
        let id = TunnelId(self.opened);
        let max_age = jittered(&mut self.rng, self.settings.max_age, AGE_JITTER);
        let idle = jittered(&mut self.rng, self.settings.idle, IDLE_JITTER);
        let entry = self.entries.entry(key.clone()).or_default();
        entry.ended(dial);
        entry.backoff = None;
        let retires = after(now, max_age);
        let seen = tunnel.load();
        entry.tunnels.push(Slot { id, tunnel, seen, retired: false, retires, idle });
        id
    }

    /// Notes that a dial failed. Returns when [`State::forget`] is due.
    pub(super) fn failed(
        &mut self,
        key: &TunnelKey,
        dial: DialId,
        error: Arc<HboneError>,
        now: Instant,
    ) -> Instant {
        self.entries.entry(key.clone()).or_default().ended(dial);
        self.back_off(key, error, now)
    }

    /// Notes that a dial ended without an outcome.
    pub(super) fn abandoned(&mut self, key: &TunnelKey, dial: DialId) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.ended(dial);
            self.remove_if_empty(key);
        }
    }

    /// Pauses dialling, for longer after each failure in a row; those of dials that went on beside
    /// the first one are the same failure. Returns when [`State::forget`] is due.
    pub(super) fn back_off(
        &mut self,
        key: &TunnelKey,
        error: Arc<HboneError>,
        now: Instant,
    ) -> Instant {
        let entry = self.entries.entry(key.clone()).or_default();
        if let Some(backoff) = entry.backoff.as_mut().filter(|backoff| now < backoff.until) {
            backoff.last = error;
            return backoff.until + FORGET_AFTER;
        }
        let before = entry.backoff.as_ref().map_or(0, |backoff| backoff.failures);
        let doubled = FIRST_PAUSE.saturating_mul(1_u32.checked_shl(before).unwrap_or(u32::MAX));
        let pause = jittered(&mut self.rng, doubled.min(LONGEST_PAUSE), PAUSE_JITTER);
        let backoff =
            Backoff { failures: before.saturating_add(1), until: now + pause, last: error };
        let forget_at = backoff.until + FORGET_AFTER;
        entry.backoff = Some(backoff);
        forget_at
    }

    /// Forgets a failure that nothing followed.
    pub(super) fn forget(&mut self, key: &TunnelKey, now: Instant) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.backoff.take_if(|backoff| now >= backoff.until + FORGET_AFTER);
            self.remove_if_empty(key);
        }
    }

    /// Retires a tunnel that is idle or too old. `None` once it is retired, otherwise when to look
    /// again.
    pub(super) fn inspect(
        &mut self,
        key: &TunnelKey,
        id: TunnelId,
        now: Instant,
    ) -> Option<Instant> {
        let entry = self.entries.get_mut(key)?;
        entry.look(now);
        let surplus = entry.can_do_without(id, self.settings.streams_per_tunnel);
        let slot = entry.open_mut().find(|slot| slot.id == id)?;
        let soon = slot.idle / SURPLUS_IDLE_PART;
        if let Some(idle_since) = slot.tunnel.load().idle_since {
            let due = after(idle_since, if surplus { soon } else { slot.idle });
            if now >= due {
                slot.retire();
                return None;
            }
            return Some(due.min(after(now, soon)).min(slot.retires));
        }
        Some(after(now, soon).min(slot.retires))
    }

    /// Gives a tunnel no new streams.
    pub(super) fn retire(&mut self, key: &TunnelKey, id: TunnelId) {
        let entry = self.entries.get_mut(key);
        entry
            .into_iter()
            .flat_map(Entry::open_mut)
            .filter(|slot| slot.id == id)
            .for_each(Slot::retire);
    }

    /// Forgets a tunnel whose connection ended.
    pub(super) fn closed(&mut self, key: &TunnelKey, id: TunnelId) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.tunnels.retain(|slot| slot.id != id);
            self.remove_if_empty(key);
        }
    }

    /// Retires all tunnels and forgets all failures. A dial under way goes on.
    pub(super) fn drain(&mut self) {
        for entry in self.entries.values_mut() {
            entry.open_mut().for_each(Slot::retire);
            entry.backoff = None;
        }
        self.entries.retain(|_, entry| !entry.is_empty());
    }

    pub(super) fn statistics(&self, now: Instant) -> PoolStatistics {
        let mut counted = PoolStatistics::default();
        for entry in self.entries.values() {
            let open = entry.open().count();
            counted.tunnels += open;
            counted.retired += entry.tunnels.len() - open;
            counted.streams +=
                entry.tunnels.iter().map(|slot| slot.tunnel.load().streams).sum::<usize>();
            counted.dialing += entry.dials.len();
            counted.backing_off += usize::from(entry.pause(now).is_some());
        }
        counted
    }

    #[cfg(test)]
    pub(super) fn entries(&self) -> usize {
        self.entries.len()
    }

    fn remove_if_empty(&mut self, key: &TunnelKey) {
        if self.entries.get(key).is_some_and(Entry::is_empty) {
            self.entries.remove(key);
        }
    }
}

impl<T: Handle, W: Clone> Entry<T, W> {
    fn open(&self) -> impl Iterator<Item = &Slot<T>> {
        self.tunnels.iter().filter(|slot| !slot.retired)
    }

    fn open_mut(&mut self) -> impl Iterator<Item = &mut Slot<T>> {
        self.tunnels.iter_mut().filter(|slot| !slot.retired)
    }

    fn is_empty(&self) -> bool {
        self.tunnels.is_empty() && self.dials.is_empty() && self.backoff.is_none()
    }

    /// Sees how the tunnels are, once for all that is asked of them, and retires those that are not
    /// usable.
    fn look(&mut self, now: Instant) {
        for slot in self.open_mut() {
            slot.seen = slot.tunnel.load();
            if now >= slot.retires || !slot.seen.usable {
                slot.retire();
            }
        }
    }

    /// How many streams the peer allows in a tunnel, from the tunnels where it said so by now:
    /// since [`Entry::look`], too.
    fn allowed(&self) -> Option<usize> {
        self.open().filter_map(|slot| slot.tunnel.load().allowed).min()
    }

    /// A place in the least loaded tunnel with room, and whether even that one is crowded. Of
    /// equals the oldest is taken, so that those that are not needed become idle.
    fn take_place(&self, streams_per_tunnel: usize) -> Option<(TunnelId, T::Place, bool)> {
        let allowed = self.open().filter_map(|slot| slot.seen.allowed).min();
        let (slot, limit) = self
            .open()
            .map(|slot| (slot, slot.seen.limit(streams_per_tunnel, allowed)))
            .filter(|(slot, limit)| slot.seen.streams < *limit)
            .min_by_key(|(slot, _)| (slot.seen.is_busy(), slot.seen.streams))?;
        Some((slot.id, slot.tunnel.reserve()?, slot.seen.is_crowded(limit)))
    }

    /// The ticket of a dial under way whose tunnel has a place left, which is promised with it.
    fn promise(&mut self, streams_per_tunnel: usize) -> Option<W> {
        let places = streams_per_tunnel.min(self.allowed().unwrap_or(usize::MAX)).max(1);
        let under_way = self.dials.iter_mut().find(|dial| dial.promised < places)?;
        under_way.promised += 1;
        Some(under_way.ticket.clone())
    }

    fn ended(&mut self, dial: DialId) {
        self.dials.retain(|under_way| under_way.id != dial);
    }

    fn may_grow(&self, tunnels_per_peer: usize, now: Instant) -> bool {
        self.dials.is_empty() && self.pause(now).is_none() && self.open().count() < tunnels_per_peer
    }

    /// Whether another tunnel would take a new stream without being crowded.
    fn can_do_without(&self, id: TunnelId, streams_per_tunnel: usize) -> bool {
        let allowed = self.allowed();
        self.open().filter(|slot| slot.id != id).any(|slot| {
            let load = slot.tunnel.load();
            !load.is_crowded(load.limit(streams_per_tunnel, allowed))
        })
    }

    /// How long nothing is to be dialled, and why.
    fn pause(&self, now: Instant) -> Option<(Duration, Arc<HboneError>)> {
        let backoff = self.backoff.as_ref().filter(|backoff| now < backoff.until)?;
        Some((backoff.until - now, backoff.last.clone()))
    }
}

impl<T, W> Default for Entry<T, W> {
    fn default() -> Self {
        Self { tunnels: Vec::new(), dials: Vec::new(), backoff: None }
    }
}

impl<T: Handle> Slot<T> {
    fn retire(&mut self) {
        self.retired = true;
        self.tunnel.release();
    }
}

impl Load {
    /// How many streams may share the tunnel: a peer whose SETTINGS did not come yet is taken to
    /// allow what it does in its other tunnels. One is always possible, so that a peer that allows
    /// none costs a reply timeout and not a dial for ever.
    fn limit(&self, streams_per_tunnel: usize, elsewhere: Option<usize>) -> usize {
        let allowed = self.allowed.or(elsewhere).unwrap_or(usize::MAX);
        streams_per_tunnel.min(allowed).max(1)
    }

    fn is_busy(&self) -> bool {
        self.bytes_per_second >= BUSY_BYTES_PER_SECOND
    }

    /// Whether the next stream makes another tunnel worth its dial. At half of the limit the other
    /// half is there for those that come while it is dialled.
    fn is_crowded(&self, limit: usize) -> bool {
        self.is_busy() || self.streams >= limit.div_ceil(2)
    }
}

fn jittered(rng: &mut Rng, duration: Duration, thousandths: RangeInclusive<u32>) -> Duration {
    (duration / 1000).saturating_mul(rng.u32(thousandths))
}

fn after(now: Instant, wait: Duration) -> Instant {
    now + wait.min(FAR)
}

#[cfg(test)]
mod tests;
