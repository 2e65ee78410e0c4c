//! The decisions one by one; `model` tests random sequences.

mod model;

use std::cell::RefCell;
use std::rc::Rc;

use super::*;
use crate::testing::{CLIENT, HOUR, SECOND, SERVER, id};

const MILLISECOND: Duration = Duration::from_millis(1);
const SETTINGS: PoolSettings = PoolSettings {
    dial: SECOND,
    handshake: SECOND,
    reply: SECOND,
    idle: Duration::from_secs(100),
    max_age: HOUR,
    streams_per_tunnel: 10,
    tunnels_per_peer: 3,
};

/// A tunnel without a connection.
#[derive(Debug, Clone)]
struct Fake(Rc<RefCell<Facts>>);

#[derive(Debug)]
struct Facts {
    load: Load,
    released: bool,
}

impl Fake {
    fn new(now: Instant) -> Self {
        let load = Load {
            usable: true,
            streams: 0,
            idle_since: Some(now),
            allowed: None,
            bytes_per_second: 0,
        };
        Self(Rc::new(RefCell::new(Facts { load, released: false })))
    }

    fn set(&self, change: impl FnOnce(&mut Load)) {
        change(&mut self.0.borrow_mut().load);
    }

    fn end_stream(&self, now: Instant) {
        self.set(|load| {
            load.streams -= 1;
            load.idle_since = (load.streams == 0).then_some(now);
        });
    }

    fn is_released(&self) -> bool {
        self.0.borrow().released
    }

    fn same(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }
}

impl Handle for Fake {
    type Place = Self;

    fn load(&self) -> Load {
        self.0.borrow().load
    }

    fn reserve(&self) -> Option<Self> {
        if self.is_released() {
            return None;
        }
        self.set(|load| {
            load.streams += 1;
            load.idle_since = None;
        });
        Some(self.clone())
    }

    fn release(&mut self) {
        self.0.borrow_mut().released = true;
    }
}

/// A state, a clock, and the number of dials. Tickets are the numbers of the dials.
struct World {
    state: State<Fake, u64>,
    now: Instant,
    dials: u64,
}

impl World {
    fn new() -> Self {
        Self::with(SETTINGS)
    }

    fn with(settings: PoolSettings) -> Self {
        Self { state: State::new(settings, 1), now: Instant::now(), dials: 0 }
    }

    fn ask(&mut self, key: &TunnelKey, wish: Wish) -> Checkout<Fake, u64> {
        let dials = &mut self.dials;
        self.state.checkout(key, wish, self.now, |DialId(id)| {
            *dials += 1;
            assert_eq!(id, *dials);
            id
        })
    }

    /// The tunnel that a new stream is assigned to.
    fn used(&mut self) -> Fake {
        match self.ask(&key(1), Wish::Any) {
            Checkout::Use { place, .. } => place,
            other => panic!("{other:?}"),
        }
    }

    fn waits(&mut self, wish: Wish) -> u64 {
        match self.ask(&key(1), wish) {
            Checkout::Wait { ticket, promised: true } => ticket,
            other => panic!("{other:?}"),
        }
    }

    fn refused(&mut self, wish: Wish) -> Duration {
        match self.ask(&key(1), wish) {
            Checkout::Refuse { remaining, .. } => remaining,
            other => panic!("{other:?}"),
        }
    }

    /// The oldest dial opens a tunnel.
    fn open(&mut self) -> (TunnelId, Fake) {
        let (tunnel, dial) = (Fake::new(self.now), self.oldest_dial(&key(1)));
        (self.state.opened(&key(1), dial, tunnel.clone(), self.now), tunnel)
    }

    /// The oldest dial fails.
    fn fail(&mut self) -> Instant {
        let dial = self.oldest_dial(&key(1));
        self.state.failed(&key(1), dial, Arc::new(HboneError::Lost { source: None }), self.now)
    }

    /// The oldest dial in progress, or an unknown one if there is none.
    fn oldest_dial(&self, key: &TunnelKey) -> DialId {
        let dials = self.state.entries.get(key).map(|entry| entry.dials.as_slice());
        dials.and_then(|dials| Some(dials.first()?.id)).unwrap_or(DialId(0))
    }

    fn inspect(&mut self, id: TunnelId) -> Option<Duration> {
        self.state.inspect(&key(1), id, self.now).map(|look_again| look_again - self.now)
    }

    fn tunnels(&self) -> usize {
        self.state.statistics(self.now).tunnels
    }
}

fn key(port: u16) -> TunnelKey {
    TunnelKey {
        source: id(CLIENT),
        address: ([10, 0, 0, 1], port).into(),
        peers: [id(SERVER)].into(),
    }
}

#[test]
fn callers_of_one_key_share_one_dial() {
    let mut world = World::new();
    assert_eq!(
        (world.waits(Wish::Any), world.waits(Wish::Any), world.waits(Wish::Fresh)),
        (1, 1, 1)
    );
    for other in [
        key(2),
        TunnelKey { source: id(SERVER), ..key(1) },
        TunnelKey { peers: [].into(), ..key(1) },
    ] {
        assert!(
            matches!(world.ask(&other, Wish::Any), Checkout::Wait { ticket, promised: true } if ticket != 1)
        );
    }
    assert_eq!(world.dials, 4);
}

#[test]
fn burst_starts_several_dials_within_stream_limit() {
    let mut world = World::new();
    let tickets: Vec<u64> = (0..10 * DIALS_AT_ONCE).map(|_| world.waits(Wish::Any)).collect();
    assert!(tickets.chunks(10).zip(1..).all(|(some, ticket)| some.iter().all(|t| *t == ticket)));
    // Callers without a promise ask again after the first of the dials.
    let late = world.ask(&key(1), Wish::Any);
    assert!(matches!(late, Checkout::Wait { ticket: 1, promised: false }), "{late:?}");
    let (_, tunnel) = world.open();
    (0..10).for_each(|_| assert!(world.state.join(&key(1), &tunnel).is_some()));
    assert_eq!(world.waits(Wish::Any), DIALS_AT_ONCE as u64 + 1);
}

#[test]
fn concurrent_dial_failures_count_once() {
    let mut world = World::new();
    for _ in 0..10 * DIALS_AT_ONCE {
        world.waits(Wish::Any);
    }
    for _ in 0..DIALS_AT_ONCE {
        world.fail();
    }
    assert!(world.refused(Wish::Any) <= 120 * MILLISECOND);
}

#[test]
fn waiting_callers_fill_new_tunnel_to_its_limit() {
    let mut world = World::new();
    world.waits(Wish::Any);
    let (_, tunnel) = world.open();
    let joined = (0..12).filter_map(|_| world.state.join(&key(1), &tunnel)).count();
    assert_eq!((joined, tunnel.load().streams), (10, 10));
    assert_eq!(world.waits(Wish::Any), 2);
}

#[test]
fn selects_least_loaded_then_oldest_tunnel() {
    let mut world = World::new();
    let tunnels: Vec<_> = (0..3).map(|_| world.open().1).collect();
    for expected in [0, 1, 2, 0, 1, 2] {
        assert!(world.used().same(&tunnels[expected]));
    }
    tunnels[1].end_stream(world.now);
    assert!(world.used().same(&tunnels[1]));
    assert_eq!(world.dials, 0);
}

#[test]
fn half_full_tunnel_is_used_during_dial() {
    let mut world = World::new();
    let (_, tunnel) = world.open();
    (0..5).for_each(|_| assert!(world.used().same(&tunnel)));
    assert_eq!(world.dials, 0);
    (0..5).for_each(|_| assert!(world.used().same(&tunnel)));
    assert_eq!((world.dials, world.waits(Wish::Any)), (1, 1), "full, and one is under way");
}

#[test]
fn load_respects_tunnel_cap_and_full_tunnels_exceed_it() {
    let mut world = World::new();
    (0..3).for_each(|_| drop(world.open()));
    (0..30).for_each(|_| drop(world.used()));
    assert_eq!(world.dials, 0);
    assert_eq!(world.waits(Wish::Any), 1);
    world.open();
    (0..10).for_each(|_| drop(world.used()));
    assert_eq!(world.dials, 1, "beyond the cap, half full is no reason");
    assert_eq!(world.waits(Wish::Any), 2);
}

#[test]
fn busy_tunnel_is_avoided_if_another_exists() {
    let mut world = World::new();
    let (_, busy) = world.open();
    world.used();
    busy.set(|load| load.bytes_per_second = BUSY_BYTES_PER_SECOND);
    assert!(world.used().same(&busy));
    assert_eq!(world.dials, 1);
    let (_, quiet) = world.open();
    (0..4).for_each(|_| assert!(world.used().same(&quiet)));
    busy.set(|load| load.bytes_per_second -= 1);
    assert!(world.used().same(&busy), "2 streams, the other has 4");
    assert_eq!(world.dials, 1);
}

#[test]
fn peer_limit_applies_to_tunnels_without_settings() {
    let mut world = World::new();
    let (_, told) = world.open();
    told.set(|load| load.allowed = Some(2));
    (0..2).for_each(|_| drop(world.used()));
    world.waits(Wish::Any);
    let (_, untold) = world.open();
    let joined = (0..5).filter_map(|_| world.state.join(&key(1), &untold)).count();
    assert_eq!(joined, 2);
    untold.set(|load| load.allowed = Some(4));
    assert!(world.used().same(&untold), "what it says itself counts");
}

#[test]
fn peer_without_allowed_streams_gets_one_request() {
    let mut world = World::new();
    let (_, tunnel) = world.open();
    tunnel.set(|load| load.allowed = Some(0));
    assert!(world.used().same(&tunnel));
    world.waits(Wish::Any);
}

#[test]
fn aged_tunnel_keeps_streams_and_takes_no_new_one() {
    let mut world = World::new();
    let (id, tunnel) = world.open();
    world.used();
    let age = world.inspect(id).unwrap().min(HOUR);
    world.now += HOUR * 9 / 10 - SECOND;
    world.used();
    assert!(!tunnel.is_released() && age < HOUR);
    world.now += HOUR / 10 + SECOND;
    assert_eq!(world.waits(Wish::Any), 1);
    assert!(tunnel.is_released());
    let counted = world.state.statistics(world.now);
    assert_eq!((counted.tunnels, counted.retired, counted.streams), (0, 1, 2));
    world.state.closed(&key(1), id);
    assert_eq!(world.state.statistics(world.now).retired, 0);
}

#[test]
fn age_and_idle_limits_have_constant_jitter() {
    let mut world = World::new();
    let tunnels: Vec<_> = (0..50).map(|_| world.open().0).collect();
    let entry = &world.state.entries[&key(1)];
    let times: Vec<_> =
        entry.tunnels.iter().map(|slot| (slot.retires - world.now, slot.idle)).collect();
    let (ages, idles): (Vec<_>, Vec<_>) = times.into_iter().unzip();
    let spread = |times: &[Duration]| (*times.iter().min().unwrap(), *times.iter().max().unwrap());
    let (shortest, longest) = spread(&ages);
    assert!(shortest >= HOUR * 9 / 10 && shortest < HOUR * 92 / 100 && longest <= HOUR);
    let (shortest, longest) = spread(&idles);
    assert!(shortest >= 90 * SECOND && shortest < 92 * SECOND);
    assert!(longest <= 110 * SECOND && longest > 108 * SECOND);
    assert_eq!(world.inspect(tunnels[7]), world.inspect(tunnels[7]));
}

#[test]
fn closed_or_draining_tunnel_is_not_used() {
    let mut world = World::new();
    let (_, first) = world.open();
    let (_, second) = world.open();
    first.set(|load| load.usable = false);
    assert!(world.used().same(&second));
    assert!(first.is_released());
    second.set(|load| load.usable = false);
    assert_eq!((world.waits(Wish::Any), world.tunnels()), (1, 0));
}

#[test]
fn retired_tunnel_is_not_used() {
    let mut world = World::new();
    let (id, tunnel) = world.open();
    world.state.retire(&key(1), id);
    assert!(tunnel.is_released());
    assert_eq!(world.waits(Wish::Any), 1);
    assert_eq!(world.inspect(id), None);
}

#[test]
fn last_tunnel_closes_after_idle_timeout() {
    let mut world = World::new();
    let (id, tunnel) = world.open();
    world.used();
    world.now += HOUR / 2;
    assert!(world.inspect(id).is_some(), "it has a stream");
    tunnel.end_stream(world.now);
    let idle_since = world.now;
    while let Some(wait) = world.inspect(id) {
        assert!(!wait.is_zero() && wait <= 11 * SECOND, "the others may come and go");
        world.now += wait;
    }
    let idle = world.now - idle_since;
    assert!(idle >= 90 * SECOND && idle <= 110 * SECOND);
    assert!(tunnel.is_released());
    world.state.closed(&key(1), id);
    assert_eq!(world.state.entries(), 0);
}

#[test]
fn surplus_tunnel_closes_early() {
    let mut world = World::new();
    let (first, one) = world.open();
    let (second, _) = world.open();
    one.set(|load| load.bytes_per_second = BUSY_BYTES_PER_SECOND);
    world.now += 20 * SECOND;
    assert!(world.inspect(second).is_some(), "the other one is busy");
    one.set(|load| load.bytes_per_second = 0);
    assert_eq!(world.inspect(second), None);
    assert!(world.inspect(first).is_some(), "now it is the last one");
}

#[test]
fn back_off_doubles_and_success_resets_it() {
    let mut world = World::new();
    for expected in [100, 200, 400, 800, 1600, 2000, 2000] {
        world.waits(Wish::Any);
        world.fail();
        let (remaining, expected) = (world.refused(Wish::Any), Duration::from_millis(expected));
        assert!(remaining >= expected * 8 / 10 && remaining <= expected * 12 / 10, "{remaining:?}");
        assert_eq!(world.refused(Wish::Fresh), remaining);
        world.now += remaining - MILLISECOND;
        assert_eq!(world.refused(Wish::Any), MILLISECOND);
        world.now += MILLISECOND;
    }
    assert_eq!((world.waits(Wish::Any), world.dials), (8, 8));
    let (id, _) = world.open();
    world.state.retire(&key(1), id);
    world.waits(Wish::Any);
    world.fail();
    assert!(world.refused(Wish::Any) <= 120 * MILLISECOND);
}

#[test]
fn failure_expires() {
    let mut world = World::new();
    world.waits(Wish::Any);
    let earlier = world.fail();
    world.now += SECOND;
    world.waits(Wish::Any);
    let later = world.fail();
    world.state.forget(&key(1), earlier);
    assert_eq!(world.state.entries(), 1, "another one followed");
    world.state.forget(&key(1), later);
    assert_eq!(world.state.entries(), 0);
    world.now = later;
    world.waits(Wish::Any);
    world.fail();
    assert!(world.refused(Wish::Any) <= 120 * MILLISECOND);
}

#[test]
fn back_off_uses_open_tunnel_and_dials_no_other() {
    let mut world = World::new();
    world.open();
    (0..6).for_each(|_| drop(world.used()));
    assert_eq!(world.dials, 1);
    world.fail();
    (0..4).for_each(|_| drop(world.used()));
    assert_eq!(world.dials, 1);
    world.refused(Wish::Any);
}

#[test]
fn required_new_tunnel_shares_dial_in_progress() {
    let mut world = World::new();
    world.open();
    assert_eq!((world.waits(Wish::Fresh), world.waits(Wish::Fresh)), (1, 1));
    world.used();
    let (_, fresh) = world.open();
    assert!(world.state.join(&key(1), &fresh).is_some());
    assert_eq!(world.waits(Wish::Fresh), 2);
}

#[test]
fn drained_pool_keeps_only_open_streams() {
    let mut world = World::new();
    let (id, tunnel) = world.open();
    world.used();
    world.ask(&key(2), Wish::Any);
    world.state.failed(&key(2), DialId(1), Arc::new(HboneError::Lost { source: None }), world.now);
    world.ask(&key(3), Wish::Any);
    world.state.drain();
    assert!(tunnel.is_released());
    let expected =
        PoolStatistics { retired: 1, streams: 1, dialing: 1, ..PoolStatistics::default() };
    assert_eq!(world.state.statistics(world.now), expected);
    assert_eq!(world.state.entries(), 2);
    world.state.closed(&key(1), id);
    assert_eq!(world.state.entries(), 1);
}

#[test]
fn accepts_unbounded_durations() {
    let settings = PoolSettings { idle: Duration::MAX, max_age: Duration::MAX, ..SETTINGS };
    let mut world = World::with(settings);
    let (id, _) = world.open();
    world.now += 1000 * HOUR;
    assert!(world.inspect(id).unwrap() > 1000 * HOUR);
}
