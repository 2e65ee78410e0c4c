//! The pool's decisions: which tunnel a stream uses, when to dial, and when to release a tunnel.
//!
//! ```text
//!          opened         not usable, too old, idle           closed
//! dialing ────────▶ open ───────────────────────────▶ retired ────────▶ removed
//!   ▲ │ failed
//!   │ ▼                    no stream requested for a while
//! backing off ──────────────────────────────────────▶ removed
//! ```
//!
//! Pure: no I/O, no tasks, no clock. Tunnels are accessed through [`Handle`]; times are arguments.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use foldhash::fast::RandomState;
use tokio::time::Instant;

use super::tunnel_load::TunnelLoad;
use super::{PeerTunnels, PoolSettings, PoolStatistics, TunnelKey};
use crate::error::HboneError;

/// The back-off after the first failure: at most ten dials a second to a peer that refuses.
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
/// The maximum back-off: the pool dials a recovered peer within two seconds.
const MAX_BACKOFF: Duration = Duration::from_secs(2);
/// The jitter of the back-off in thousandths: workers do not dial a recovered peer together.
const BACKOFF_JITTER: RangeInclusive<u32> = 800..=1200;
/// A failure within this time after a back-off counts as consecutive.
const CONSECUTIVE_FAILURE_WINDOW: Duration = Duration::from_secs(10);

/// The jitter of the maximum age in thousandths: tunnels opened together do not close together.
const AGE_JITTER: RangeInclusive<u32> = 900..=1000;
/// The jitter of the idle timeout in thousandths, for the same reason.
const IDLE_JITTER: RangeInclusive<u32> = 900..=1100;
/// Divides the idle timeout of surplus tunnels. Keeping the last tunnel saves a dial, keeping
/// others does not.
const SURPLUS_IDLE_DIVISOR: u32 = 10;

/// The maximum number of concurrent dials to one peer. Less than the peer's handshake limit per
/// address.
const MAX_CONCURRENT_DIALS: usize = 4;

/// The upper limit of durations: adding a longer one could overflow an [`Instant`].
const MAX_DURATION: Duration = Duration::from_secs(30 * 365 * 24 * 3600);

/// A tunnel in the pool. Tests replace it.
pub(super) trait Handle {
    type StreamSlot;

    fn current_load(&self) -> TunnelLoad;

    /// Reserves a stream without checking the load. `None` after [`Handle::release`].
    fn reserve(&self) -> Option<Self::StreamSlot>;

    /// Lets the tunnel close with its last stream.
    fn release(&mut self);
}

/// Identifies a tunnel within a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TunnelId(u64);

/// Identifies a dial within a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DialId(pub(super) u64);

/// Whether a stream may use an existing tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reuse {
    /// The stream may use any tunnel.
    Allowed,
    /// The stream needs a new tunnel.
    Forbidden,
}

/// The decision for a stream.
#[derive(Debug)]
pub(super) enum Checkout<P, W> {
    /// Open the stream in this tunnel.
    Use { id: TunnelId, stream_slot: P },
    /// Wait for a dial.
    Wait {
        /// The ticket of the dial.
        ticket: W,
        /// True if a stream of the new tunnel is promised to this caller. If false, all its streams
        /// are promised to others: call [`PoolState::checkout`] again after the dial.
        promised: bool,
    },
    /// Fail: the last dial failed recently.
    Refuse {
        /// The remaining back-off.
        remaining: Duration,
        last: Arc<HboneError>,
    },
}

/// The tunnels `T`, and the dials in progress. A ticket `W` lets its holder wait for a dial.
#[derive(Debug)]
pub(super) struct PoolState<T, W> {
    settings: PoolSettings,
    /// A fast hash is safe here: the keys come from the mesh, and no peer can choose them.
    entries: HashMap<TunnelKey, PeerEntry<T, W>, RandomState>,
    /// The number of the last opened tunnel.
    opened: u64,
    /// The number of the last dial.
    dialled: u64,
    rng: Rng,
}

/// The tunnels, dials and back-off for one key. Removed when empty.
#[derive(Debug)]
struct PeerEntry<T, W> {
    /// In the order of opening.
    tunnels: Vec<PooledTunnel<T>>,
    /// In the order of starting.
    dials: Vec<DialInProgress<W>>,
    backoff: Option<Backoff>,
}

#[derive(Debug)]
struct DialInProgress<W> {
    id: DialId,
    ticket: W,
    /// The number of streams promised to waiting callers.
    promised: usize,
}

#[derive(Debug)]
struct PooledTunnel<T> {
    id: TunnelId,
    tunnel: T,
    /// The load when [`PeerEntry::retire_unusable`] last ran.
    seen: TunnelLoad,
    retired: bool,
    /// The time at which the tunnel reaches its maximum age.
    retires: Instant,
    /// The idle timeout, with jitter.
    idle: Duration,
}

#[derive(Debug)]
struct Backoff {
    failures: u32,
    until: Instant,
    last: Arc<HboneError>,
}

impl<T: Handle, W: Clone> PoolState<T, W> {
    /// Creates an empty pool state. The same `seed` gives the same jitter.
    pub(super) fn new(settings: PoolSettings, seed: u64) -> Self {
        let (opened, dialled) = (0, 0);
        Self { settings, entries: HashMap::default(), opened, dialled, rng: Rng::with_seed(seed) }
    }

    /// Selects a tunnel for a stream. If a new tunnel is necessary, or useful for later streams,
    /// calls `dial` for a ticket. The caller must later report the dial by [`PoolState::opened`],
    /// [`PoolState::failed`] or [`PoolState::abandoned`].
    ///
    /// Streams never wait for a place in a full tunnel: if all are full, another one is dialled,
    /// even above `tunnels_per_peer`. One dial serves as many waiting streams as fit into a tunnel.
    pub(super) fn checkout(
        &mut self,
        key: &TunnelKey,
        reuse: Reuse,
        now: Instant,
        dial: impl FnOnce(DialId) -> W,
    ) -> Checkout<T::StreamSlot, W> {
        let settings = &self.settings;
        let entry = self.entries.entry(key.clone()).or_default();
        entry.retire_unusable(now);
        let dialled = &mut self.dialled;
        let dial = |promised| {
            *dialled += 1;
            let id = DialId(*dialled);
            DialInProgress { id, ticket: dial(id), promised }
        };
        if reuse == Reuse::Allowed
            && let Some((id, stream_slot, crowded)) =
                entry.reserve_stream(settings.streams_per_tunnel)
        {
            if crowded && entry.may_open_another(settings.tunnels_per_peer, now) {
                entry.dials.push(dial(0));
            }
            return Checkout::Use { id, stream_slot };
        }
        if let Some(ticket) = entry.promise(settings.streams_per_tunnel) {
            return Checkout::Wait { ticket, promised: true };
        }
        let pause = entry.remaining_backoff(now);
        let cannot_dial = pause.is_some() || entry.dials.len() >= MAX_CONCURRENT_DIALS;
        if let Some(first) = entry.dials.first().filter(|_| cannot_dial) {
            return Checkout::Wait { ticket: first.ticket.clone(), promised: false };
        }
        if let Some((remaining, last)) = pause {
            return Checkout::Refuse { remaining, last };
        }
        let in_progress = dial(1);
        let ticket = in_progress.ticket.clone();
        entry.dials.push(in_progress);
        Checkout::Wait { ticket, promised: true }
    }

    /// Reserves a stream in the new tunnel that a caller waited for. `None` if other callers have
    /// filled it. If the tunnel is lost already, the request will report the reason.
    pub(super) fn join(&self, key: &TunnelKey, tunnel: &T) -> Option<T::StreamSlot> {
        let allowed = self.entries.get(key).and_then(PeerEntry::allowed);
        let load = tunnel.current_load();
        let has_room = load.streams < load.limit(self.settings.streams_per_tunnel, allowed);
        if has_room { tunnel.reserve() } else { None }
    }

    /// Adds a tunnel that a dial has opened.
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
        entry.remove_dial(dial);
        entry.backoff = None;
        let retires = after(now, max_age);
        let seen = tunnel.current_load();
        entry.tunnels.push(PooledTunnel { id, tunnel, seen, retired: false, retires, idle });
        id
    }

    /// Records that a dial failed. Returns the time at which to call
    /// [`PoolState::remove_expired_backoff`].
    pub(super) fn failed(
        &mut self,
        key: &TunnelKey,
        dial: DialId,
        error: Arc<HboneError>,
        now: Instant,
    ) -> Instant {
        self.entries.entry(key.clone()).or_default().remove_dial(dial);
        self.back_off(key, error, now)
    }

    /// Records that a dial was aborted: no tunnel and no failure.
    pub(super) fn abandoned(&mut self, key: &TunnelKey, dial: DialId) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.remove_dial(dial);
            self.remove_if_empty(key);
        }
    }

    /// Starts a back-off, longer after each consecutive failure. Failures of concurrent dials count
    /// once. Returns the time at which to call [`PoolState::remove_expired_backoff`].
    pub(super) fn back_off(
        &mut self,
        key: &TunnelKey,
        error: Arc<HboneError>,
        now: Instant,
    ) -> Instant {
        let entry = self.entries.entry(key.clone()).or_default();
        if let Some(backoff) = entry.backoff.as_mut().filter(|backoff| now < backoff.until) {
            backoff.last = error;
            return backoff.until + CONSECUTIVE_FAILURE_WINDOW;
        }
        let before = entry.backoff.as_ref().map_or(0, |backoff| backoff.failures);
        let doubled = FIRST_BACKOFF.saturating_mul(1_u32.checked_shl(before).unwrap_or(u32::MAX));
        let pause = jittered(&mut self.rng, doubled.min(MAX_BACKOFF), BACKOFF_JITTER);
        let backoff =
            Backoff { failures: before.saturating_add(1), until: now + pause, last: error };
        let forget_at = backoff.until + CONSECUTIVE_FAILURE_WINDOW;
        entry.backoff = Some(backoff);
        forget_at
    }

    /// Removes an expired back-off after which no dial followed.
    pub(super) fn remove_expired_backoff(&mut self, key: &TunnelKey, now: Instant) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.backoff.take_if(|backoff| now >= backoff.until + CONSECUTIVE_FAILURE_WINDOW);
            self.remove_if_empty(key);
        }
    }

    /// Retires a tunnel that is idle or too old, and returns `None`. Otherwise returns the time of
    /// the next check.
    pub(super) fn inspect(
        &mut self,
        key: &TunnelKey,
        id: TunnelId,
        now: Instant,
    ) -> Option<Instant> {
        let entry = self.entries.get_mut(key)?;
        entry.retire_unusable(now);
        let surplus = entry.is_surplus(id, self.settings.streams_per_tunnel);
        let pooled = entry.open_mut().find(|pooled| pooled.id == id)?;
        let soon = pooled.idle / SURPLUS_IDLE_DIVISOR;
        if let Some(idle_since) = pooled.tunnel.current_load().idle_since {
            let due = after(idle_since, if surplus { soon } else { pooled.idle });
            if now >= due {
                pooled.retire();
                return None;
            }
            return Some(due.min(after(now, soon)).min(pooled.retires));
        }
        Some(after(now, soon).min(pooled.retires))
    }

    /// Excludes a tunnel from new streams.
    pub(super) fn retire(&mut self, key: &TunnelKey, id: TunnelId) {
        let entry = self.entries.get_mut(key);
        entry
            .into_iter()
            .flat_map(PeerEntry::open_mut)
            .filter(|pooled| pooled.id == id)
            .for_each(PooledTunnel::retire);
    }

    /// Removes a tunnel whose connection ended.
    pub(super) fn closed(&mut self, key: &TunnelKey, id: TunnelId) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.tunnels.retain(|pooled| pooled.id != id);
            self.remove_if_empty(key);
        }
    }

    /// Retires all tunnels and removes all back-offs. A dial in progress stays until it is
    /// reported.
    pub(super) fn drain(&mut self) {
        for entry in self.entries.values_mut() {
            entry.open_mut().for_each(PooledTunnel::retire);
            entry.backoff = None;
        }
        self.entries.retain(|_, entry| !entry.is_empty());
    }

    pub(super) fn statistics(&self, now: Instant) -> PoolStatistics {
        let each = self.entries.values().map(|entry| entry.statistics(now));
        each.fold(PoolStatistics::default(), |sum, one| PoolStatistics {
            tunnels: sum.tunnels + one.tunnels,
            retired: sum.retired + one.retired,
            streams: sum.streams + one.streams,
            dialing: sum.dialing + one.dialing,
            backing_off: sum.backing_off + one.backing_off,
        })
    }

    pub(super) fn peers(&self, now: Instant) -> Vec<PeerTunnels> {
        let of_peer = |(key, entry): (&TunnelKey, &PeerEntry<T, W>)| PeerTunnels {
            key: key.clone(),
            counts: entry.statistics(now),
            back_off: entry.remaining_backoff(now),
        };
        self.entries.iter().map(of_peer).collect()
    }

    #[cfg(test)]
    pub(super) fn entries(&self) -> usize {
        self.entries.len()
    }

    fn remove_if_empty(&mut self, key: &TunnelKey) {
        if self.entries.get(key).is_some_and(PeerEntry::is_empty) {
            self.entries.remove(key);
        }
    }
}

impl<T: Handle, W: Clone> PeerEntry<T, W> {
    fn open(&self) -> impl Iterator<Item = &PooledTunnel<T>> {
        self.tunnels.iter().filter(|pooled| !pooled.retired)
    }

    fn open_mut(&mut self) -> impl Iterator<Item = &mut PooledTunnel<T>> {
        self.tunnels.iter_mut().filter(|pooled| !pooled.retired)
    }

    fn statistics(&self, now: Instant) -> PoolStatistics {
        let tunnels = self.open().count();
        let loads = self.tunnels.iter().map(|pooled| pooled.tunnel.current_load());
        PoolStatistics {
            tunnels,
            retired: self.tunnels.len() - tunnels,
            streams: loads.map(|load| load.streams).sum(),
            dialing: self.dials.len(),
            backing_off: usize::from(self.remaining_backoff(now).is_some()),
        }
    }

    fn is_empty(&self) -> bool {
        self.tunnels.is_empty() && self.dials.is_empty() && self.backoff.is_none()
    }

    /// Reads the load of every tunnel, and retires unusable tunnels.
    fn retire_unusable(&mut self, now: Instant) {
        for pooled in self.open_mut() {
            pooled.seen = pooled.tunnel.current_load();
            if now >= pooled.retires || !pooled.seen.usable {
                pooled.retire();
            }
        }
    }

    /// The stream limit that the peer has set in any of its tunnels. Some may have received it
    /// since [`PeerEntry::retire_unusable`] ran.
    fn allowed(&self) -> Option<usize> {
        self.open().filter_map(|pooled| pooled.tunnel.current_load().allowed).min()
    }

    /// Reserves a stream in the least loaded tunnel with capacity, and returns whether that tunnel
    /// is crowded. Prefers the oldest of equally loaded tunnels, so that the others become idle.
    fn reserve_stream(&self, streams_per_tunnel: usize) -> Option<(TunnelId, T::StreamSlot, bool)> {
        let allowed = self.open().filter_map(|pooled| pooled.seen.allowed).min();
        let (pooled, limit) = self
            .open()
            .map(|pooled| (pooled, pooled.seen.limit(streams_per_tunnel, allowed)))
            .filter(|(pooled, limit)| pooled.seen.streams < *limit)
            .min_by_key(|(pooled, _)| (pooled.seen.is_busy(), pooled.seen.streams))?;
        Some((pooled.id, pooled.tunnel.reserve()?, pooled.seen.is_crowded(limit)))
    }

    /// Promises a stream of a dial in progress, and returns the dial's ticket. `None` if all are
    /// promised.
    fn promise(&mut self, streams_per_tunnel: usize) -> Option<W> {
        let streams = streams_per_tunnel.min(self.allowed().unwrap_or(usize::MAX)).max(1);
        let in_progress = self.dials.iter_mut().find(|dial| dial.promised < streams)?;
        in_progress.promised += 1;
        Some(in_progress.ticket.clone())
    }

    fn remove_dial(&mut self, dial: DialId) {
        self.dials.retain(|in_progress| in_progress.id != dial);
    }

    fn may_open_another(&self, tunnels_per_peer: usize, now: Instant) -> bool {
        self.dials.is_empty()
            && self.remaining_backoff(now).is_none()
            && self.open().count() < tunnels_per_peer
    }

    /// Returns true if another tunnel could take a new stream without becoming crowded.
    fn is_surplus(&self, id: TunnelId, streams_per_tunnel: usize) -> bool {
        let allowed = self.allowed();
        self.open().filter(|pooled| pooled.id != id).any(|pooled| {
            let load = pooled.tunnel.current_load();
            !load.is_crowded(load.limit(streams_per_tunnel, allowed))
        })
    }

    /// The remaining back-off, and the error that caused it.
    fn remaining_backoff(&self, now: Instant) -> Option<(Duration, Arc<HboneError>)> {
        let backoff = self.backoff.as_ref().filter(|backoff| now < backoff.until)?;
        Some((backoff.until - now, backoff.last.clone()))
    }
}

impl<T, W> Default for PeerEntry<T, W> {
    fn default() -> Self {
        Self { tunnels: Vec::new(), dials: Vec::new(), backoff: None }
    }
}

impl<T: Handle> PooledTunnel<T> {
    fn retire(&mut self) {
        self.retired = true;
        self.tunnel.release();
    }
}

fn jittered(rng: &mut Rng, duration: Duration, thousandths: RangeInclusive<u32>) -> Duration {
    (duration / 1000).saturating_mul(rng.u32(thousandths))
}

fn after(now: Instant, wait: Duration) -> Instant {
    now + wait.min(MAX_DURATION)
}

#[cfg(test)]
mod tests;
