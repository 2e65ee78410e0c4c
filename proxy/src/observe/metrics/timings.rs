//! Durations of connections and handshakes, and the use of the pool. Each worker measures them in
//! histograms and counters of its own.

use std::num::NonZeroU128;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::exposition::{Kind, Page};
use super::histogram::{Bounds, Histogram, Total};
use crate::observe::party::Direction;

const CONNECT: &str = "underpass_connect_duration_seconds";
const FIRST_BYTE: &str = "underpass_first_byte_duration_seconds";
const DURATION: &str = "underpass_connection_duration_seconds";
const HANDSHAKE: &str = "underpass_handshake_duration_seconds";
const POOL_STREAMS: &str = "underpass_pool_streams_total";
const POOL_DIALS_FAILED: &str = "underpass_pool_dials_failed_total";
const POOL_BACKED_OFF: &str = "underpass_pool_streams_backed_off_total";

/// From half a millisecond, as on the same node, to beyond the default timeouts.
const LATENCY: Bounds =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// From a request of one connection to a day.
const LIFETIME: Bounds =
    &[0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0];

/// The measurements of one worker.
#[derive(Debug, Default)]
pub(crate) struct Timings {
    outbound: OfDirection,
    inbound: OfDirection,
    pool: PoolCounters,
}

#[derive(Debug)]
struct OfDirection {
    mutual_tls: ConnectionTimings,
    plaintext: ConnectionTimings,
    handshake: Histogram,
}

impl Default for OfDirection {
    fn default() -> Self {
        Self {
            mutual_tls: ConnectionTimings::default(),
            plaintext: ConnectionTimings::default(),
            handshake: Histogram::new(LATENCY),
        }
    }
}

/// The durations of connections of one direction and security policy, from their accept.
#[derive(Debug)]
struct ConnectionTimings {
    connect: Histogram,
    first_byte: Histogram,
    duration: Histogram,
}

impl Default for ConnectionTimings {
    fn default() -> Self {
        Self {
            connect: Histogram::new(LATENCY),
            first_byte: Histogram::new(LATENCY),
            duration: Histogram::new(LIFETIME),
        }
    }
}

/// The use of a worker's pools.
#[derive(Debug, Default)]
struct PoolCounters {
    reused: AtomicU64,
    opened: AtomicU64,
    dials_failed: AtomicU64,
    backed_off: AtomicU64,
}

/// A point in a connection's life, whose time since the accept is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Milestone {
    /// The connection to the destination is open.
    Connected,
    /// The first byte went to the client.
    FirstByte,
    /// An open connection has ended.
    Ended,
}

/// An event in a pool of tunnels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PoolUse {
    /// A stream in a tunnel that was open before.
    Reused,
    /// A stream in a tunnel that was opened for it.
    Opened,
    DialFailed,
    /// A stream was refused, because the peer is in back-off.
    BackedOff,
}

impl Timings {
    fn direction(&self, direction: Direction) -> &OfDirection {
        match direction {
            Direction::Outbound => &self.outbound,
            Direction::Inbound => &self.inbound,
        }
    }

    /// Records that a connection has reached a milestone, `since_accept` after its accept.
    pub(crate) fn reached(
        &self,
        milestone: Milestone,
        (direction, is_mutual_tls): (Direction, bool),
        since_accept: Duration,
        trace_id: Option<NonZeroU128>,
    ) {
        let of_direction = self.direction(direction);
        let timings =
            if is_mutual_tls { &of_direction.mutual_tls } else { &of_direction.plaintext };
        let histogram = match milestone {
            Milestone::Connected => &timings.connect,
            Milestone::FirstByte => &timings.first_byte,
            Milestone::Ended => &timings.duration,
        };
        histogram.record(since_accept, trace_id);
    }

    /// Records the duration of a tunnel's TLS and HTTP/2 handshake that has succeeded.
    pub(crate) fn handshake(&self, direction: Direction, duration: Duration) {
        self.direction(direction).handshake.record(duration, None);
    }

    /// Counts an event in a pool.
    pub(crate) fn pool(&self, event: PoolUse) {
        let counter = match event {
            PoolUse::Reused => &self.pool.reused,
            PoolUse::Opened => &self.pool.opened,
            PoolUse::DialFailed => &self.pool.dials_failed,
            PoolUse::BackedOff => &self.pool.backed_off,
        };
        counter.fetch_add(1, Relaxed);
    }
}

/// The measurements of all workers.
#[derive(Debug, Default)]
pub(super) struct AllTimings(Mutex<Vec<Arc<Timings>>>);

impl AllTimings {
    /// The measurements of a new worker.
    pub(super) fn of_worker(&self) -> Arc<Timings> {
        let timings = Arc::<Timings>::default();
        self.lock().push(timings.clone());
        timings
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Timings>>> {
        // No code panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn render(&self, page: &mut Page) {
        let workers = self.lock().clone();
        let of_connections: [(_, _, _, Timing); 3] = [
            (
                CONNECT,
                "From the accept of a connection until the connection to its destination is open.",
                LATENCY,
                |timings| &timings.connect,
            ),
            (
                FIRST_BYTE,
                "From the accept of a connection until its client gets the first byte.",
                LATENCY,
                |timings| &timings.first_byte,
            ),
            (
                DURATION,
                "From the accept of a connection that was opened until its end.",
                LIFETIME,
                |timings| &timings.duration,
            ),
        ];
        for (name, help, bounds, histogram) in of_connections {
            page.family(name, Kind::Histogram, help);
            for (direction, reporter) in REPORTERS {
                for (policy, side) in SECURITY {
                    let mut total = Total::new(bounds);
                    for worker in &workers {
                        total.add(histogram(side(worker.direction(direction))));
                    }
                    let labels =
                        format!("reporter=\"{reporter}\",connection_security_policy=\"{policy}\"");
                    total.render(name, &labels, page);
                }
            }
        }
        render_handshakes(&workers, page);
        render_pool(&workers, page);
    }
}

const REPORTERS: [(Direction, &str); 2] =
    [(Direction::Outbound, "source"), (Direction::Inbound, "destination")];

type Side = fn(&OfDirection) -> &ConnectionTimings;
type Timing = fn(&ConnectionTimings) -> &Histogram;
type PoolCounter = fn(&PoolCounters) -> &AtomicU64;

const SECURITY: [(&str, Side); 2] =
    [("mutual_tls", |timings| &timings.mutual_tls), ("unknown", |timings| &timings.plaintext)];

fn render_handshakes(workers: &[Arc<Timings>], page: &mut Page) {
    page.family(HANDSHAKE, Kind::Histogram, "TLS and HTTP/2 handshakes of tunnels that succeeded.");
    for (direction, _) in REPORTERS {
        let mut total = Total::new(LATENCY);
        workers.iter().for_each(|worker| total.add(&worker.direction(direction).handshake));
        total.render(HANDSHAKE, &format!("direction=\"{}\"", direction.as_str()), page);
    }
}

fn render_pool(workers: &[Arc<Timings>], page: &mut Page) {
    let sum = |counter: PoolCounter| -> u64 {
        workers.iter().map(|worker| counter(&worker.pool).load(Relaxed)).sum()
    };
    page.family(
        POOL_STREAMS,
        Kind::Counter,
        "Streams in tunnels of the pool, by the tunnel's age.",
    );
    let (reused, opened) = (sum(|pool| &pool.reused), sum(|pool| &pool.opened));
    page.line(format_args!("{POOL_STREAMS}{{tunnel=\"reused\"}} {reused}"));
    page.line(format_args!("{POOL_STREAMS}{{tunnel=\"new\"}} {opened}"));
    let others: [(_, _, PoolCounter); 2] = [
        (POOL_DIALS_FAILED, "Tunnels that could not be opened.", |pool| &pool.dials_failed),
        (
            POOL_BACKED_OFF,
            "Streams refused without an attempt, because a recent one to the peer failed.",
            |pool| &pool.backed_off,
        ),
    ];
    for (name, help, counter) in others {
        page.family(name, Kind::Counter, help);
        page.line(format_args!("{name} {}", sum(counter)));
    }
}

#[cfg(test)]
mod tests {
    use super::super::exposition::Format;
    use super::*;

    #[test]
    fn milestones_of_all_workers_are_counted_by_reporter_and_security() {
        let all = AllTimings::default();
        let workers = [all.of_worker(), all.of_worker()];
        let millis = Duration::from_millis;
        for worker in &workers {
            worker.reached(Milestone::Connected, (Direction::Outbound, true), millis(3), None);
            worker.handshake(Direction::Inbound, millis(20));
            worker.pool(PoolUse::Reused);
        }
        workers[0].reached(Milestone::Ended, (Direction::Inbound, false), millis(70_000), None);
        workers[1].pool(PoolUse::BackedOff);
        let mut page = Page::new(Format::Prometheus);
        all.render(&mut page);
        let text = page.into_text();
        let source = "reporter=\"source\",connection_security_policy=\"mutual_tls\"";
        let plain = "reporter=\"destination\",connection_security_policy=\"unknown\"";
        for line in [
            format!("{CONNECT}_count{{{source}}} 2"),
            format!("{CONNECT}_bucket{{{source},le=\"0.0025\"}} 0"),
            format!("{CONNECT}_bucket{{{source},le=\"0.005\"}} 2"),
            format!("{CONNECT}_count{{{plain}}} 0"),
            format!("{FIRST_BYTE}_count{{{source}}} 0"),
            format!("{DURATION}_bucket{{{plain},le=\"60.0\"}} 0"),
            format!("{DURATION}_bucket{{{plain},le=\"300.0\"}} 1"),
            format!("{DURATION}_sum{{{plain}}} 70"),
            format!("{HANDSHAKE}_count{{direction=\"inbound\"}} 2"),
            format!("{HANDSHAKE}_count{{direction=\"outbound\"}} 0"),
            format!("{POOL_STREAMS}{{tunnel=\"reused\"}} 2"),
            format!("{POOL_STREAMS}{{tunnel=\"new\"}} 0"),
            format!("{POOL_BACKED_OFF} 1"),
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in:\n{text}");
        }
    }
}
