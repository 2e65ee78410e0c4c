//! Applies random sequences of events to the pool state, and checks its invariants after each
//! event.

use proptest::prelude::*;

use std::collections::BTreeMap;

use super::*;

const KEYS: u16 = 3;

#[derive(Debug, Clone)]
enum Event {
    Request {
        key: u16,
        needs_new_tunnel: bool,
    },
    DialSucceeds {
        key: u16,
    },
    DialFails {
        key: u16,
    },
    EndStream(usize),
    /// The peer sends GOAWAY: streams of this tunnel continue.
    GoAway(usize),
    /// The connection is lost with all its streams.
    Lose(usize),
    SetRate {
        tunnel: usize,
        bytes_per_second: u64,
    },
    SetAllowedStreams {
        tunnel: usize,
        streams: usize,
    },
    Retire(usize),
    Inspect(usize),
    Wait {
        milliseconds: u64,
    },
    Drain,
}

fn event() -> impl Strategy<Value = Event> {
    let key = 0..KEYS;
    let tunnel = 0..8_usize;
    prop_oneof![
        12 => (key.clone(), prop::bool::weighted(0.1))
            .prop_map(|(key, needs_new_tunnel)| Event::Request { key, needs_new_tunnel }),
        4 => key.clone().prop_map(|key| Event::DialSucceeds { key }),
        1 => key.prop_map(|key| Event::DialFails { key }),
        5 => tunnel.clone().prop_map(Event::EndStream),
        1 => tunnel.clone().prop_map(Event::GoAway),
        1 => tunnel.clone().prop_map(Event::Lose),
        1 => (tunnel.clone(), 0..2 * BUSY_BYTES_PER_SECOND)
            .prop_map(|(tunnel, bytes_per_second)| Event::SetRate { tunnel, bytes_per_second }),
        1 => (tunnel.clone(), 0..6_usize)
            .prop_map(|(tunnel, streams)| Event::SetAllowedStreams { tunnel, streams }),
        1 => tunnel.clone().prop_map(Event::Retire),
        2 => tunnel.prop_map(Event::Inspect),
        2 => prop_oneof![1..3000_u64, 1..4_000_000_u64].prop_map(|milliseconds| Event::Wait { milliseconds }),
        1 => Just(Event::Drain),
    ]
}

/// The expected state: dials in progress with the callers that wait for them, and open connections.
struct Model {
    pool: TestPool,
    /// For each dial: the port, and each waiting caller with whether a stream is promised to it.
    waiting: BTreeMap<u64, (u16, Vec<(Reuse, bool)>)>,
    tunnels: Vec<(u16, TunnelId, FakeTunnel)>,
    forget_at: Vec<(u16, Instant)>,
    answered: usize,
    asked: usize,
}

impl Model {
    fn new() -> Self {
        Self {
            pool: TestPool::with(PoolSettings { streams_per_tunnel: 4, ..SETTINGS }),
            waiting: BTreeMap::new(),
            tunnels: Vec::new(),
            forget_at: Vec::new(),
            answered: 0,
            asked: 0,
        }
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Request { key, needs_new_tunnel } => {
                self.asked += 1;
                self.checkout(
                    key,
                    if needs_new_tunnel { Reuse::Forbidden } else { Reuse::Allowed },
                );
            }
            Event::DialSucceeds { key } => self.dial_succeeds(key),
            Event::DialFails { key } => self.dial_fails(key),
            Event::Wait { milliseconds } => self.wait(Duration::from_millis(milliseconds)),
            Event::Drain => self.pool.state.drain(),
            Event::EndStream(index)
            | Event::GoAway(index)
            | Event::Lose(index)
            | Event::Retire(index)
            | Event::Inspect(index)
            | Event::SetRate { tunnel: index, .. }
            | Event::SetAllowedStreams { tunnel: index, .. } => {
                if let Some((port, id, tunnel)) = self.tunnels.get(index).cloned() {
                    self.apply_to(&event, &key(port), id, &tunnel);
                }
            }
        }
    }

    fn apply_to(&mut self, event: &Event, key: &TunnelKey, id: TunnelId, tunnel: &FakeTunnel) {
        let now = self.pool.now;
        match *event {
            Event::EndStream(_) if tunnel.current_load().streams > 0 => tunnel.end_stream(now),
            Event::GoAway(_) => tunnel.set(|load| load.usable = false),
            Event::Lose(_) => {
                tunnel.set(|load| {
                    (load.usable, load.streams, load.idle_since) = (false, 0, Some(now))
                });
                self.pool.state.closed(key, id);
                self.tunnels.retain(|(_, other, _)| *other != id);
            }
            Event::SetRate { bytes_per_second, .. } => {
                tunnel.set(|load| load.bytes_per_second = bytes_per_second)
            }
            Event::SetAllowedStreams { streams, .. } => {
                tunnel.set(|load| load.allowed = Some(streams))
            }
            Event::Retire(_) => self.pool.state.retire(key, id),
            Event::Inspect(_) => {
                let next_check = self.pool.state.inspect(key, id, now);
                assert!(next_check.is_none_or(|then| then > now), "no busy loop");
                assert_eq!(next_check.is_none(), tunnel.is_released());
            }
            _ => {}
        }
    }

    fn checkout(&mut self, port: u16, reuse: Reuse) {
        let dials = self.pool.dials;
        let checkout = self.pool.checkout(&key(port), reuse);
        let dialled = self.pool.dials - dials;
        // The pool has released tunnels that are too old.
        let open =
            self.tunnels.iter().filter(|(other, ..)| *other == port).map(|(.., tunnel)| tunnel);
        let open: Vec<&FakeTunnel> = open.filter(|tunnel| !tunnel.is_released()).collect();
        let has_room = |tunnel: &FakeTunnel| {
            tunnel.current_load().streams < 4.min(tunnel.current_load().allowed.unwrap_or(4)).max(1)
        };
        assert!(
            dialled == 0 || self.dials(port).len() < MAX_CONCURRENT_DIALS,
            "a few dials at a time"
        );
        match checkout {
            Checkout::Use { stream_slot, .. } => {
                assert_eq!(reuse, Reuse::Allowed);
                assert!(stream_slot.current_load().usable && !stream_slot.is_released());
                assert!(open.iter().any(|tunnel| tunnel.same(&stream_slot)), "of the same key");
                assert!(stream_slot.current_load().streams <= 4, "within the limit");
                assert!(
                    dialled == 0 || open.len() < SETTINGS.tunnels_per_peer,
                    "growth ends at the tunnel limit"
                );
                self.answered += 1;
                if dialled > 0 {
                    self.waiting.insert(self.pool.dials, (port, Vec::new()));
                }
            }
            Checkout::Wait { ticket, promised } => {
                // The peer's limit applies to all its tunnels as soon as one of them has received
                // it.
                let is_limited = |tunnel: &FakeTunnel| tunnel.current_load().allowed.is_some();
                let missed = open.iter().any(|tunnel| is_limited(tunnel) && has_room(tunnel));
                assert!(reuse == Reuse::Forbidden || !missed, "nothing to wait for");
                let (_, waiting) = self.waiting.entry(ticket).or_insert((port, Vec::new()));
                waiting.push((reuse, promised));
                let promises = waiting.iter().filter(|(_, promised)| *promised).count();
                assert!(promises <= 4, "no more promises than streams in a tunnel");
            }
            Checkout::Refuse { remaining, .. } => {
                assert!(!remaining.is_zero() && remaining <= MAX_BACKOFF * 12 / 10);
                assert!(self.dials(port).is_empty(), "callers wait for a dial in progress");
                self.answered += 1;
            }
        }
    }

    /// The dials in progress to a port, in the order of starting.
    fn dials(&self, port: u16) -> Vec<u64> {
        let dials = self.waiting.iter().filter(|(_, (other, _))| *other == port);
        dials.map(|(dial, _)| *dial).collect()
    }

    fn remove_oldest_dial(&mut self, port: u16) -> Option<(DialId, Vec<(Reuse, bool)>)> {
        let dial = *self.dials(port).first()?;
        let (_, waiting) = self.waiting.remove(&dial)?;
        Some((DialId(dial), waiting))
    }

    fn dial_succeeds(&mut self, port: u16) {
        let Some((dial, waiting)) = self.remove_oldest_dial(port) else { return };
        let tunnel = FakeTunnel::new(self.pool.now);
        let id = self.pool.state.opened(&key(port), dial, tunnel.clone(), self.pool.now);
        self.tunnels.push((port, id, tunnel.clone()));
        let promises = waiting.iter().filter(|(_, promised)| *promised).count();
        let mut served = 0;
        for (reuse, promised) in waiting {
            if promised && self.pool.state.join(&key(port), &tunnel).is_some() {
                served += 1;
                self.answered += 1;
            } else {
                self.checkout(port, reuse);
            }
        }
        assert!(promises == 0 || served > 0, "each round serves a caller");
    }

    fn dial_fails(&mut self, port: u16) {
        let Some((dial, waiting)) = self.remove_oldest_dial(port) else { return };
        let error = Arc::new(HboneError::Lost { source: None });
        let forget_at = self.pool.state.failed(&key(port), dial, error, self.pool.now);
        self.forget_at.push((port, forget_at));
        self.answered += waiting.len();
    }

    fn wait(&mut self, duration: Duration) {
        self.pool.now += duration;
        let now = self.pool.now;
        let due = self.forget_at.extract_if(.., |(_, at)| *at <= now).collect::<Vec<_>>();
        for (port, _) in due {
            self.pool.state.remove_expired_backoff(&key(port), now);
        }
    }

    /// Closes the connections that the pool has released and that have no streams.
    fn close_released(&mut self) {
        for (port, id, _) in self.tunnels.extract_if(.., |(_, _, tunnel)| {
            tunnel.is_released() && tunnel.current_load().streams == 0
        }) {
            self.pool.state.closed(&key(port), id);
        }
    }

    fn check(&self) {
        let counted = self.pool.state.statistics(self.pool.now);
        assert_eq!(counted.tunnels + counted.retired, self.tunnels.len());
        assert_eq!(
            counted.streams,
            self.tunnels.iter().map(|(_, _, tunnel)| tunnel.current_load().streams).sum::<usize>()
        );
        assert_eq!(counted.dialing, self.waiting.len());
        let waiting: usize = self.waiting.values().map(|(_, waiting)| waiting.len()).sum();
        assert_eq!(self.answered + waiting, self.asked, "every caller gets an outcome");
        for port in 0..KEYS {
            let has_state = self.tunnels.iter().any(|(other, ..)| *other == port)
                || !self.dials(port).is_empty()
                || self.forget_at.iter().any(|(other, _)| *other == port);
            assert!(
                has_state || !self.pool.state.entries.contains_key(&key(port)),
                "nothing is kept of {port}"
            );
        }
    }

    /// Ends all streams and dials, then advances the clock beyond all timeouts.
    fn wind_down(&mut self) {
        while !self.waiting.is_empty() {
            (0..KEYS).for_each(|port| self.dial_succeeds(port));
        }
        for (_, _, tunnel) in &self.tunnels {
            while tunnel.current_load().streams > 0 {
                tunnel.end_stream(self.pool.now);
            }
        }
        self.wait(2 * HOUR);
        for (port, id, _) in self.tunnels.clone() {
            assert_eq!(self.pool.state.inspect(&key(port), id, self.pool.now), None);
        }
        self.close_released();
        self.check();
        assert_eq!(self.pool.state.entries(), 0);
    }
}

proptest! {
    #[test]
    fn pool_stays_within_bounds_under_random_events(events in prop::collection::vec(event(), 1..200)) {
        let mut model = Model::new();
        for event in events {
            model.apply(event);
            model.close_released();
            model.check();
        }
        model.wind_down();
    }
}
