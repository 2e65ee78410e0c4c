//! File descriptors: how many connections hold, and what happens when there are no more. Accepting pauses before the last ones are
//! gone, so that what was accepted can be carried on and the endpoints still answer; readiness says so, and both end by themselves.
//!
//! Not here: what the kernel has no descriptor for all the same; `accept.rs` and `error.rs` tell of that.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::timeout;

use crate::endpoints::Readiness;
use crate::metrics;

/// What a caught connection takes: one accepted, one dialled.
pub(crate) const PAIR: usize = 2;
/// What stays free for all that is no connection: probes, scrapes, certificates, rules, name lookups. A fiftieth of a large limit.
const RESERVE: usize = 64;
const RESERVED_PART: usize = 50;
/// What the runtime of a worker opens: epoll twice, its waker, signals.
const PER_WORKER: usize = 4;
/// Accepting that pauses again within this has not recovered. It also bounds the log lines: two for each time.
const RECOVERED: Duration = Duration::from_secs(1);

/// The descriptors of all connections. Cheap to clone; clones count together.
#[derive(Debug, Clone)]
pub(crate) struct Descriptors(Arc<State>);

#[derive(Debug)]
struct State {
    /// What connections may hold.
    allowed: usize,
    held: AtomicUsize,
    freed: Notify,
    shortages: watch::Sender<Shortages>,
}

/// How often there was no descriptor.
#[derive(Debug, Clone, Copy, Default)]
struct Shortages {
    /// How many listeners rest right now.
    resting: usize,
    /// How often one had to, or a stream was refused.
    ever: u64,
    /// What the system said at the last one.
    error: Option<i32>,
}

/// Descriptors that are held, or soon will be.
#[derive(Debug)]
pub(crate) struct Held {
    descriptors: Descriptors,
    count: usize,
}

/// Why a listener rests.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Shortage {
    /// Connections hold what they may.
    Descriptors,
    /// The system said so, with this error.
    System(Option<i32>),
}

/// A listener that rests, for as long as this lives.
#[derive(Debug)]
pub(crate) struct Paused(Descriptors);

impl Descriptors {
    /// Those of a process that may have `limit` open, of which it has `open`, and will have `workers`.
    pub(crate) fn new(limit: usize, open: usize, workers: usize) -> Self {
        let left = limit.saturating_sub(open.saturating_add(workers.saturating_mul(PER_WORKER)));
        // With a limit that small, half of it serves more than nothing would.
        let reserve = RESERVE.max(limit / RESERVED_PART).min(left / 2);
        let allowed = (left - reserve).max(PAIR);
        let (held, freed) = (AtomicUsize::new(0), Notify::new());
        Self(Arc::new(State { allowed, held, freed, shortages: watch::Sender::default() }))
    }

    /// `count` more, which cannot wait and may exceed what is allowed by the few that are under way.
    pub(crate) fn hold(&self, count: usize) -> Held {
        self.0.held.fetch_add(count, SeqCst);
        Held { descriptors: self.clone(), count }
    }

    /// One more, if there is one.
    pub(crate) fn one(&self) -> Option<Held> {
        let one_more = |held| (held < self.0.allowed).then_some(held + 1);
        if self.0.held.fetch_update(SeqCst, SeqCst, one_more).is_err() {
            self.note(None, 0);
            return None;
        }
        Some(Held { descriptors: self.clone(), count: 1 })
    }

    /// `count` more for what can do without, as long as connections leave plenty.
    pub(crate) fn spare(&self, count: usize) -> Option<Held> {
        let plenty = self.0.allowed - self.0.allowed / 4;
        let more = |held: usize| held.checked_add(count).filter(|sum| *sum <= plenty);
        self.0.held.fetch_update(SeqCst, SeqCst, more).ok()?;
        Some(Held { descriptors: self.clone(), count })
    }

    /// Whether there are enough for one more connection.
    pub(crate) fn have_room(&self) -> bool {
        self.0.held.load(SeqCst).saturating_add(PAIR) <= self.0.allowed
    }

    /// Waits until there are.
    pub(crate) async fn room(&self) {
        loop {
            // Made first: whatever is freed after we have looked wakes us.
            let freed = self.0.freed.notified();
            if self.have_room() {
                return;
            }
            freed.await;
        }
    }

    /// Notes that a listener rests.
    pub(crate) fn pause(&self, listener: &'static str, shortage: Shortage) -> Paused {
        let (reason, error) = match shortage {
            Shortage::Descriptors => ("descriptors", None),
            Shortage::System(error) => ("system", error),
        };
        metrics::accept_paused(listener, reason);
        self.note(error, 1);
        Paused(self.clone())
    }

    fn note(&self, error: Option<i32>, resting: usize) {
        self.0.shortages.send_modify(|shortages| {
            shortages.resting += resting;
            shortages.ever += 1;
            shortages.error = error;
        });
    }

    /// Tells the log and the probes whether there is a shortage, for ever.
    pub(crate) async fn tell(&self, readiness: &Readiness) {
        let mut shortages = self.0.shortages.subscribe();
        let mut told = 0;
        // The sender is ours, so that waiting cannot fail.
        while shortages.wait_for(|shortages| shortages.ever > told).await.is_ok() {
            readiness.out_of_descriptors(true);
            let error = shortages.borrow().error.map(io::Error::from_raw_os_error);
            let (held, allowed) = (self.0.held.load(SeqCst), self.0.allowed);
            tracing::warn!(
                held,
                allowed,
                error = error.map(tracing::field::display),
                "accepting pauses, and streams of tunnels are refused: is the limit of open files too low (ulimit -n, LimitNOFILE)?"
            );
            told = recovered(&mut shortages).await;
            readiness.out_of_descriptors(false);
            tracing::info!("accepting goes on");
        }
    }

    fn release(&self, count: usize) {
        let held = self.0.held.fetch_sub(count, SeqCst);
        // Otherwise nobody can be waiting: there was room before.
        if held.saturating_add(PAIR) > self.0.allowed {
            self.0.freed.notify_waiters();
        }
    }
}

/// Waits until there was no shortage for a while; says how many there were by then.
async fn recovered(shortages: &mut watch::Receiver<Shortages>) -> u64 {
    loop {
        let ever = match shortages.wait_for(|shortages| shortages.resting == 0).await {
            Ok(none) => none.ever,
            // As above.
            Err(_) => return u64::MAX,
        };
        if timeout(RECOVERED, shortages.wait_for(|shortages| shortages.ever > ever)).await.is_err()
        {
            return ever;
        }
    }
}

impl Held {
    /// Gives one of them back.
    pub(crate) fn release_one(&mut self) {
        if self.count > 0 {
            self.count -= 1;
            self.descriptors.release(1);
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.descriptors.release(self.count);
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        self.0.0.shortages.send_modify(|shortages| shortages.resting -= 1);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use tokio::time::{Instant, sleep};

    use super::*;

    /// `allowed` of them.
    fn descriptors(allowed: usize) -> Descriptors {
        let descriptors = Descriptors::new(2 * allowed, 0, 0);
        assert_eq!(descriptors.0.allowed, allowed);
        descriptors
    }

    #[test]
    fn a_reserve_stays_free_and_a_small_limit_is_shared() {
        let allowed = |limit, open, workers| Descriptors::new(limit, open, workers).0.allowed;
        assert_eq!(allowed(1024, 30, 2), 1024 - 30 - 8 - 64);
        assert_eq!(allowed(1_000_000, 30, 2), 1_000_000 - 30 - 8 - 20_000);
        assert_eq!(allowed(64, 20, 2), 18);
        assert_eq!(allowed(16, 20, 2), PAIR, "it cannot work, but nothing else would be better");
    }

    #[test]
    fn what_can_do_without_gets_some_while_connections_leave_plenty() {
        let descriptors = descriptors(40);
        let connections = descriptors.hold(28);
        let pipe = descriptors.spare(2);
        assert!(pipe.is_some() && descriptors.spare(2).is_none());
        assert!(descriptors.have_room(), "connections may have the rest");
        drop(connections);
        assert!(descriptors.spare(2).is_some());
    }

    #[tokio::test]
    async fn whoever_waits_for_room_goes_on_as_soon_as_there_is() {
        let descriptors = descriptors(5);
        let mut first = descriptors.hold(PAIR);
        assert!(descriptors.room().now_or_never().is_some(), "3 are left");
        let second = descriptors.hold(PAIR);
        let mut room = Box::pin(descriptors.room());
        assert!((&mut room).now_or_never().is_none(), "1 is left");
        let one = descriptors.one();
        assert!(one.is_some() && descriptors.one().is_none());
        drop(one);
        assert!((&mut room).now_or_never().is_none());
        first.release_one();
        assert!((&mut room).now_or_never().is_some());
        drop((first, second));
        assert_eq!(descriptors.0.held.load(SeqCst), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_unready_until_no_listener_has_rested_for_a_while() {
        let (descriptors, readiness) = (descriptors(5), Readiness::default());
        let telling = descriptors.tell(&readiness);
        let script = async {
            let short = || readiness.is_out_of_descriptors();
            let began = Instant::now();
            for _ in 0..3 {
                let paused = descriptors.pause("outbound", Shortage::Descriptors);
                sleep(RECOVERED * 2).await;
                assert!(short());
                drop(paused);
                sleep(RECOVERED / 2).await;
                assert!(short(), "it may only be one connection that has ended");
            }
            while short() {
                sleep(RECOVERED / 100).await;
            }
            let took = began.elapsed();
            assert!(took >= RECOVERED * 8 && took < RECOVERED * 9, "{took:?}");
            drop(descriptors.pause("hbone", Shortage::System(None)));
            sleep(RECOVERED / 2).await;
            assert!(short(), "a short one is told too");
        };
        tokio::select! {
            () = telling => unreachable!(),
            () = script => {}
        }
    }
}
