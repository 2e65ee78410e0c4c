//! File descriptors: how many there are for connections, and what happens when none is left.
//! Accepting pauses before the last ones are gone, so that what was accepted can be carried on and
//! the endpoints still answer. Readiness says so, and both end by themselves.
//!
//! Not here: errors of the kernel, which may have fewer descriptors than its limit says.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::timeout;
use underpass_hbone::{Budget, Sharing};

use crate::admin::endpoints::Readiness;
use crate::observe::metrics;

/// What a caught connection takes: one accepted, one dialled.
pub(super) const PAIR: usize = 2;
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
    budget: Arc<Budget>,
    allowed: usize,
    /// How many listeners wait for some.
    waiting: AtomicUsize,
    freed: Notify,
    shortages: watch::Sender<Shortages>,
}

/// The descriptors of a pod.
#[derive(Debug)]
pub(super) struct Directions {
    pub(super) outbound: Arc<Budget>,
    pub(super) inbound: Arc<Budget>,
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

/// Descriptors that are held, or soon will be, by what is no connection: pipes, pooled tunnels.
#[derive(Debug)]
pub(crate) struct FdPermit {
    descriptors: Descriptors,
    budget: Arc<Budget>,
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
        Self(Arc::new(State {
            budget: Arc::new(Budget::new(allowed)),
            allowed,
            waiting: AtomicUsize::new(0),
            freed: Notify::new(),
            shortages: watch::Sender::default(),
        }))
    }

    /// Those of one more pod. Neither of its directions takes all of them.
    pub(super) fn of_pod(&self) -> Directions {
        let part = |whole, sharing| Arc::new(Budget::part(whole, usize::MAX, sharing));
        let pod = part(&self.0.budget, Sharing::Members);
        let direction = || part(&pod, Sharing::Reserving);
        Directions { outbound: direction(), inbound: direction() }
    }

    /// `count` more of `budget`, which cannot wait and may exceed it.
    pub(super) fn hold(&self, budget: &Arc<Budget>, count: usize) -> FdPermit {
        budget.take_anyway(count);
        FdPermit { descriptors: self.clone(), budget: budget.clone(), count }
    }

    /// How many connections and the like may have together.
    pub(crate) fn total(&self) -> usize {
        self.0.allowed
    }

    /// `count` more for what can do without, as long as connections leave plenty.
    pub(crate) fn spare(&self, count: usize) -> Option<FdPermit> {
        let State { budget, allowed, .. } = &*self.0;
        let plenty = allowed - allowed / 4;
        if budget.used().saturating_add(count) > plenty || budget.take(count).is_err() {
            return None;
        }
        Some(FdPermit { descriptors: self.clone(), budget: budget.clone(), count })
    }

    /// Gives back what was taken of `budget`, a part of these.
    pub(super) fn give_back(&self, budget: &Budget, count: usize) {
        budget.give_back(count);
        if self.0.waiting.load(SeqCst) > 0 {
            self.0.freed.notify_waiters();
        }
    }

    /// Waits until descriptors are freed such that `has_room`.
    pub(super) async fn freed(&self, has_room: impl Fn() -> bool) {
        let _waiting = Waiting::new(&self.0.waiting);
        loop {
            // Made first: what is freed after the look wakes this.
            let freed = self.0.freed.notified();
            if has_room() {
                return;
            }
            freed.await;
        }
    }

    /// Notes that a stream of a tunnel was refused because none is left.
    pub(super) fn note_refused_stream(&self) {
        self.note(None, 0);
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

    /// Reports to log and probes whether there is a shortage, for ever.
    pub(super) async fn report(&self, readiness: &Readiness) {
        let mut shortages = self.0.shortages.subscribe();
        let mut reported = 0;
        // The sender is ours, so that waiting cannot fail.
        while shortages.wait_for(|shortages| shortages.ever > reported).await.is_ok() {
            readiness.out_of_descriptors(true);
            let error = shortages.borrow().error.map(io::Error::from_raw_os_error);
            let (held, allowed) = (self.0.budget.used(), self.0.allowed);
            tracing::warn!(
                held,
                allowed,
                error = error.map(tracing::field::display),
                "accepting pauses, and streams of tunnels are refused: is the limit of open files too low (ulimit -n, LimitNOFILE)?"
            );
            reported = recovered(&mut shortages).await;
            readiness.out_of_descriptors(false);
            tracing::info!("accepting goes on");
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

impl Drop for FdPermit {
    fn drop(&mut self) {
        self.descriptors.give_back(&self.budget, self.count);
    }
}

/// A listener that waits, for as long as this lives.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, SeqCst);
        Self(waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
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
    fn pipes_get_descriptors_while_connections_leave_plenty() {
        let descriptors = descriptors(40);
        let pod = descriptors.of_pod();
        let connections = descriptors.hold(&pod.inbound, 28);
        let pipe = descriptors.spare(2);
        assert!(pipe.is_some() && descriptors.spare(2).is_none());
        assert!(pod.outbound.free() > 0, "connections may have the rest");
        drop(connections);
        assert!(descriptors.spare(2).is_some());
    }

    #[test]
    fn direction_leaves_some_to_the_other() {
        let descriptors = descriptors(48);
        let pod = descriptors.of_pod();
        let fill = |budget: &Budget| {
            std::iter::repeat_with(|| budget.take(1)).take_while(Result::is_ok).count()
        };
        assert_eq!((fill(&pod.outbound), fill(&pod.inbound)), (36, 9));
        let other = descriptors.of_pod();
        assert!(fill(&other.inbound) >= 2, "another pod gets some too");
    }

    #[tokio::test]
    async fn waiting_for_room_ends_when_there_is_some() {
        let descriptors = descriptors(5);
        let pod = descriptors.of_pod();
        let room = || Box::pin(descriptors.freed(|| pod.inbound.free() >= PAIR));
        let first = descriptors.hold(&pod.inbound, PAIR);
        assert!(room().now_or_never().is_some(), "3 are left, of which 2 are for this direction");
        let second = descriptors.hold(&pod.inbound, PAIR);
        let mut waiting = room();
        assert!((&mut waiting).now_or_never().is_none(), "1 is left");
        drop(first);
        assert!((&mut waiting).now_or_never().is_some());
        drop((second, waiting));
        assert_eq!((descriptors.0.budget.used(), descriptors.0.waiting.load(SeqCst)), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn unready_until_no_listener_has_rested_for_a_while() {
        let (descriptors, readiness) = (descriptors(5), Readiness::default());
        let reporting = descriptors.report(&readiness);
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
            assert!(short(), "a short one is reported too");
        };
        tokio::select! {
            () = reporting => unreachable!(),
            () = script => {}
        }
    }
}
