//! Tests of single decisions. `model` tests random sequences of events.

mod model;

use std::cell::RefCell;
use std::rc::Rc;

use super::*;
use crate::pool::tunnel_load::BUSY_BYTES_PER_SECOND;
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
struct FakeTunnel(Rc<RefCell<Facts>>);

#[derive(Debug)]
struct Facts {
    load: TunnelLoad,
    released: bool,
}

impl FakeTunnel {
    fn new(now: Instant) -> Self {
        let load = TunnelLoad {
            usable: true,
            streams: 0,
            idle_since: Some(now),
            allowed: None,
            bytes_per_second: 0,
        };
        Self(Rc::new(RefCell::new(Facts { load, released: false })))
    }

    fn set(&self, change: impl FnOnce(&mut TunnelLoad)) {
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

impl Handle for FakeTunnel {
    type StreamSlot = Self;

    fn current_load(&self) -> TunnelLoad {
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

/// A pool state with a clock and a count of dials. A ticket is the number of its dial.
struct TestPool {
    state: PoolState<FakeTunnel, u64>,
    now: Instant,
    dials: u64,
}

impl TestPool {
    fn new() -> Self {
        Self::with(SETTINGS)
    }

    fn with(settings: PoolSettings) -> Self {
        Self { state: PoolState::new(settings, 1), now: Instant::now(), dials: 0 }
    }

    fn checkout(&mut self, key: &TunnelKey, reuse: Reuse) -> Checkout<FakeTunnel, u64> {
        let dials = &mut self.dials;
        self.state.checkout(key, reuse, self.now, |DialId(id)| {
            *dials += 1;
            assert_eq!(id, *dials);
            id
        })
    }

    /// Checks out a stream, which must use an existing tunnel. Returns that tunnel.
    fn checkout_existing(&mut self) -> FakeTunnel {
        match self.checkout(&key(1), Reuse::Allowed) {
            Checkout::Use { stream_slot, .. } => stream_slot,
            other => panic!("{other:?}"),
        }
    }

    fn checkout_dial(&mut self, reuse: Reuse) -> u64 {
        match self.checkout(&key(1), reuse) {
            Checkout::Wait { ticket, promised: true } => ticket,
            other => panic!("{other:?}"),
        }
    }

    fn checkout_refused(&mut self, reuse: Reuse) -> Duration {
        match self.checkout(&key(1), reuse) {
            Checkout::Refuse { remaining, .. } => remaining,
            other => panic!("{other:?}"),
        }
    }

    /// Lets the oldest dial succeed.
    fn open(&mut self) -> (TunnelId, FakeTunnel) {
        let (tunnel, dial) = (FakeTunnel::new(self.now), self.oldest_dial(&key(1)));
        (self.state.opened(&key(1), dial, tunnel.clone(), self.now), tunnel)
    }

    /// Lets the oldest dial fail.
    fn fail(&mut self) -> Instant {
        let dial = self.oldest_dial(&key(1));
        self.state.failed(&key(1), dial, Arc::new(HboneError::Lost { source: None }), self.now)
    }

    /// The oldest dial in progress. An unknown id if there is none.
    fn oldest_dial(&self, key: &TunnelKey) -> DialId {
        let dials = self.state.entries.get(key).map(|entry| entry.dials.as_slice());
        dials.and_then(|dials| Some(dials.first()?.id)).unwrap_or(DialId(0))
    }

    fn inspect(&mut self, id: TunnelId) -> Option<Duration> {
        self.state.inspect(&key(1), id, self.now).map(|next_check| next_check - self.now)
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
    let mut pool = TestPool::new();
    assert_eq!(
        (
            pool.checkout_dial(Reuse::Allowed),
            pool.checkout_dial(Reuse::Allowed),
            pool.checkout_dial(Reuse::Forbidden)
        ),
        (1, 1, 1)
    );
    for other in [
        key(2),
        TunnelKey { source: id(SERVER), ..key(1) },
        TunnelKey { peers: [].into(), ..key(1) },
    ] {
        assert!(
            matches!(pool.checkout(&other, Reuse::Allowed), Checkout::Wait { ticket, promised: true } if ticket != 1)
        );
    }
    assert_eq!(pool.dials, 4);
}

#[test]
fn burst_starts_several_dials_within_stream_limit() {
    let mut pool = TestPool::new();
    let tickets: Vec<u64> =
        (0..10 * MAX_CONCURRENT_DIALS).map(|_| pool.checkout_dial(Reuse::Allowed)).collect();
    assert!(tickets.chunks(10).zip(1..).all(|(some, ticket)| some.iter().all(|t| *t == ticket)));
    // A caller without a promise asks again after the first dial.
    let late = pool.checkout(&key(1), Reuse::Allowed);
    assert!(matches!(late, Checkout::Wait { ticket: 1, promised: false }), "{late:?}");
    let (_, tunnel) = pool.open();
    (0..10).for_each(|_| assert!(pool.state.join(&key(1), &tunnel).is_some()));
    assert_eq!(pool.checkout_dial(Reuse::Allowed), MAX_CONCURRENT_DIALS as u64 + 1);
}

#[test]
fn concurrent_dial_failures_count_once() {
    let mut pool = TestPool::new();
    for _ in 0..10 * MAX_CONCURRENT_DIALS {
        pool.checkout_dial(Reuse::Allowed);
    }
    for _ in 0..MAX_CONCURRENT_DIALS {
        pool.fail();
    }
    assert!(pool.checkout_refused(Reuse::Allowed) <= 120 * MILLISECOND);
}

#[test]
fn waiting_callers_fill_new_tunnel_to_its_limit() {
    let mut pool = TestPool::new();
    pool.checkout_dial(Reuse::Allowed);
    let (_, tunnel) = pool.open();
    let joined = (0..12).filter_map(|_| pool.state.join(&key(1), &tunnel)).count();
    assert_eq!((joined, tunnel.current_load().streams), (10, 10));
    assert_eq!(pool.checkout_dial(Reuse::Allowed), 2);
}

#[test]
fn selects_least_loaded_then_oldest_tunnel() {
    let mut pool = TestPool::new();
    let tunnels: Vec<_> = (0..3).map(|_| pool.open().1).collect();
    for expected in [0, 1, 2, 0, 1, 2] {
        assert!(pool.checkout_existing().same(&tunnels[expected]));
    }
    tunnels[1].end_stream(pool.now);
    assert!(pool.checkout_existing().same(&tunnels[1]));
    assert_eq!(pool.dials, 0);
}

#[test]
fn half_full_tunnel_is_used_during_dial() {
    let mut pool = TestPool::new();
    let (_, tunnel) = pool.open();
    (0..5).for_each(|_| assert!(pool.checkout_existing().same(&tunnel)));
    assert_eq!(pool.dials, 0);
    (0..5).for_each(|_| assert!(pool.checkout_existing().same(&tunnel)));
    assert_eq!(
        (pool.dials, pool.checkout_dial(Reuse::Allowed)),
        (1, 1),
        "full, and a dial is in progress"
    );
}

#[test]
fn only_full_tunnels_lead_to_more_than_the_tunnel_limit() {
    let mut pool = TestPool::new();
    (0..3).for_each(|_| drop(pool.open()));
    (0..30).for_each(|_| drop(pool.checkout_existing()));
    assert_eq!(pool.dials, 0);
    assert_eq!(pool.checkout_dial(Reuse::Allowed), 1);
    pool.open();
    (0..10).for_each(|_| drop(pool.checkout_existing()));
    assert_eq!(pool.dials, 1, "above the tunnel limit, half full tunnels cause no dial");
    assert_eq!(pool.checkout_dial(Reuse::Allowed), 2);
}

#[test]
fn busy_tunnel_is_avoided_if_another_exists() {
    let mut pool = TestPool::new();
    let (_, busy) = pool.open();
    pool.checkout_existing();
    busy.set(|load| load.bytes_per_second = BUSY_BYTES_PER_SECOND);
    assert!(pool.checkout_existing().same(&busy));
    assert_eq!(pool.dials, 1);
    let (_, quiet) = pool.open();
    (0..4).for_each(|_| assert!(pool.checkout_existing().same(&quiet)));
    busy.set(|load| load.bytes_per_second -= 1);
    assert!(pool.checkout_existing().same(&busy), "2 streams, the other has 4");
    assert_eq!(pool.dials, 1);
}

#[test]
fn peer_limit_applies_to_tunnels_without_settings() {
    let mut pool = TestPool::new();
    let (_, limited) = pool.open();
    limited.set(|load| load.allowed = Some(2));
    (0..2).for_each(|_| drop(pool.checkout_existing()));
    pool.checkout_dial(Reuse::Allowed);
    let (_, unlimited) = pool.open();
    let joined = (0..5).filter_map(|_| pool.state.join(&key(1), &unlimited)).count();
    assert_eq!(joined, 2);
    unlimited.set(|load| load.allowed = Some(4));
    assert!(pool.checkout_existing().same(&unlimited), "its own limit applies");
}

#[test]
fn peer_without_allowed_streams_gets_one_request() {
    let mut pool = TestPool::new();
    let (_, tunnel) = pool.open();
    tunnel.set(|load| load.allowed = Some(0));
    assert!(pool.checkout_existing().same(&tunnel));
    pool.checkout_dial(Reuse::Allowed);
}

#[test]
fn aged_tunnel_keeps_streams_and_takes_no_new_one() {
    let mut pool = TestPool::new();
    let (id, tunnel) = pool.open();
    pool.checkout_existing();
    let age = pool.inspect(id).unwrap().min(HOUR);
    pool.now += HOUR * 9 / 10 - SECOND;
    pool.checkout_existing();
    assert!(!tunnel.is_released() && age < HOUR);
    pool.now += HOUR / 10 + SECOND;
    assert_eq!(pool.checkout_dial(Reuse::Allowed), 1);
    assert!(tunnel.is_released());
    let counted = pool.state.statistics(pool.now);
    assert_eq!((counted.tunnels, counted.retired, counted.streams), (0, 1, 2));
    pool.state.closed(&key(1), id);
    assert_eq!(pool.state.statistics(pool.now).retired, 0);
}

#[test]
fn each_tunnel_has_fixed_random_age_and_idle_limits() {
    let mut pool = TestPool::new();
    let tunnels: Vec<_> = (0..50).map(|_| pool.open().0).collect();
    let entry = &pool.state.entries[&key(1)];
    let times: Vec<_> =
        entry.tunnels.iter().map(|pooled| (pooled.retires - pool.now, pooled.idle)).collect();
    let (ages, idles): (Vec<_>, Vec<_>) = times.into_iter().unzip();
    let spread = |times: &[Duration]| (*times.iter().min().unwrap(), *times.iter().max().unwrap());
    let (shortest, longest) = spread(&ages);
    assert!(shortest >= HOUR * 9 / 10 && shortest < HOUR * 92 / 100 && longest <= HOUR);
    let (shortest, longest) = spread(&idles);
    assert!(shortest >= 90 * SECOND && shortest < 92 * SECOND);
    assert!(longest <= 110 * SECOND && longest > 108 * SECOND);
    assert_eq!(pool.inspect(tunnels[7]), pool.inspect(tunnels[7]));
}

#[test]
fn closed_or_draining_tunnel_is_not_used() {
    let mut pool = TestPool::new();
    let (_, first) = pool.open();
    let (_, second) = pool.open();
    first.set(|load| load.usable = false);
    assert!(pool.checkout_existing().same(&second));
    assert!(first.is_released());
    second.set(|load| load.usable = false);
    assert_eq!((pool.checkout_dial(Reuse::Allowed), pool.tunnels()), (1, 0));
}

#[test]
fn retired_tunnel_is_not_used() {
    let mut pool = TestPool::new();
    let (id, tunnel) = pool.open();
    pool.state.retire(&key(1), id);
    assert!(tunnel.is_released());
    assert_eq!(pool.checkout_dial(Reuse::Allowed), 1);
    assert_eq!(pool.inspect(id), None);
}

#[test]
fn last_tunnel_closes_after_idle_timeout() {
    let mut pool = TestPool::new();
    let (id, tunnel) = pool.open();
    pool.checkout_existing();
    pool.now += HOUR / 2;
    assert!(pool.inspect(id).is_some(), "it has a stream");
    tunnel.end_stream(pool.now);
    let idle_since = pool.now;
    while let Some(wait) = pool.inspect(id) {
        assert!(
            !wait.is_zero() && wait <= 11 * SECOND,
            "other tunnels may open or close meanwhile"
        );
        pool.now += wait;
    }
    let idle = pool.now - idle_since;
    assert!(idle >= 90 * SECOND && idle <= 110 * SECOND);
    assert!(tunnel.is_released());
    pool.state.closed(&key(1), id);
    assert_eq!(pool.state.entries(), 0);
}

#[test]
fn surplus_tunnel_closes_early() {
    let mut pool = TestPool::new();
    let (first, one) = pool.open();
    let (second, _) = pool.open();
    one.set(|load| load.bytes_per_second = BUSY_BYTES_PER_SECOND);
    pool.now += 20 * SECOND;
    assert!(pool.inspect(second).is_some(), "the other one is busy");
    one.set(|load| load.bytes_per_second = 0);
    assert_eq!(pool.inspect(second), None);
    assert!(pool.inspect(first).is_some(), "now it is the last one");
}

#[test]
fn back_off_doubles_and_success_resets_it() {
    let mut pool = TestPool::new();
    for expected in [100, 200, 400, 800, 1600, 2000, 2000] {
        pool.checkout_dial(Reuse::Allowed);
        pool.fail();
        let (remaining, expected) =
            (pool.checkout_refused(Reuse::Allowed), Duration::from_millis(expected));
        assert!(remaining >= expected * 8 / 10 && remaining <= expected * 12 / 10, "{remaining:?}");
        assert_eq!(pool.checkout_refused(Reuse::Forbidden), remaining);
        pool.now += remaining - MILLISECOND;
        assert_eq!(pool.checkout_refused(Reuse::Allowed), MILLISECOND);
        pool.now += MILLISECOND;
    }
    assert_eq!((pool.checkout_dial(Reuse::Allowed), pool.dials), (8, 8));
    let (id, _) = pool.open();
    pool.state.retire(&key(1), id);
    pool.checkout_dial(Reuse::Allowed);
    pool.fail();
    assert!(pool.checkout_refused(Reuse::Allowed) <= 120 * MILLISECOND);
}

#[test]
fn expired_failure_does_not_lengthen_next_back_off() {
    let mut pool = TestPool::new();
    pool.checkout_dial(Reuse::Allowed);
    let earlier = pool.fail();
    pool.now += SECOND;
    pool.checkout_dial(Reuse::Allowed);
    let later = pool.fail();
    pool.state.remove_expired_backoff(&key(1), earlier);
    assert_eq!(pool.state.entries(), 1, "a later failure followed");
    pool.state.remove_expired_backoff(&key(1), later);
    assert_eq!(pool.state.entries(), 0);
    pool.now = later;
    pool.checkout_dial(Reuse::Allowed);
    pool.fail();
    assert!(pool.checkout_refused(Reuse::Allowed) <= 120 * MILLISECOND);
}

#[test]
fn back_off_allows_open_tunnels_but_no_dial() {
    let mut pool = TestPool::new();
    pool.open();
    (0..6).for_each(|_| drop(pool.checkout_existing()));
    assert_eq!(pool.dials, 1);
    pool.fail();
    (0..4).for_each(|_| drop(pool.checkout_existing()));
    assert_eq!(pool.dials, 1);
    pool.checkout_refused(Reuse::Allowed);
}

#[test]
fn required_new_tunnel_shares_dial_in_progress() {
    let mut pool = TestPool::new();
    pool.open();
    assert_eq!(
        (pool.checkout_dial(Reuse::Forbidden), pool.checkout_dial(Reuse::Forbidden)),
        (1, 1)
    );
    pool.checkout_existing();
    let (_, fresh) = pool.open();
    assert!(pool.state.join(&key(1), &fresh).is_some());
    assert_eq!(pool.checkout_dial(Reuse::Forbidden), 2);
}

#[test]
fn drained_pool_keeps_only_open_streams() {
    let mut pool = TestPool::new();
    let (id, tunnel) = pool.open();
    pool.checkout_existing();
    pool.checkout(&key(2), Reuse::Allowed);
    pool.state.failed(&key(2), DialId(1), Arc::new(HboneError::Lost { source: None }), pool.now);
    pool.checkout(&key(3), Reuse::Allowed);
    pool.state.drain();
    assert!(tunnel.is_released());
    let expected =
        PoolStatistics { retired: 1, streams: 1, dialing: 1, ..PoolStatistics::default() };
    assert_eq!(pool.state.statistics(pool.now), expected);
    assert_eq!(pool.state.entries(), 2);
    pool.state.closed(&key(1), id);
    assert_eq!(pool.state.entries(), 1);
}

#[test]
fn accepts_unbounded_durations() {
    let settings = PoolSettings { idle: Duration::MAX, max_age: Duration::MAX, ..SETTINGS };
    let mut pool = TestPool::with(settings);
    let (id, _) = pool.open();
    pool.now += 1000 * HOUR;
    assert!(pool.inspect(id).unwrap() > 1000 * HOUR);
}
