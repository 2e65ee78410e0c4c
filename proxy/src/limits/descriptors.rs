//! Limits the file descriptors of connections. Accepting pauses before all are used, so that
//! accepted connections can be served and the endpoints respond. Readiness reports the pause, which
//! ends when descriptors are free.
//!
//! The system-wide limit is handled separately: the kernel may run out of files before the process
//! reaches its own limit.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::timeout;
use underpass_hbone::{Budget, Sharing};

use crate::admin::readiness::Readiness;
use crate::observe::metrics;

/// The descriptors of a caught connection: one accepted, one dialled.
pub(super) const DESCRIPTORS_PER_CONNECTION: usize = 2;
/// The minimum reserve for descriptors of other purposes: probes, scrapes, certificates, rules,
/// name lookups.
const MIN_RESERVE: usize = 64;
/// The reserve is this part of the limit if that is more than [`MIN_RESERVE`].
const RESERVED_PART: usize = 50;
/// The descriptors of a worker's runtime: epoll twice, its waker, signals.
const DESCRIPTORS_PER_WORKER: usize = 4;
/// The descriptors of an idle pod of a node: its namespace, listeners, lists of legacy tables and
/// notifications of changed rules.
const DESCRIPTORS_PER_POD: usize = 16;
/// The further descriptors of an idle pod with a DNS proxy: two listeners for TCP, and two for UDP.
/// A listener for UDP has two descriptors: the handle for a take-over cannot share the runtime's.
const DESCRIPTORS_PER_DNS_PROXY: usize = 6;
/// The time without a pause after which a shortage is over. It also limits the log to two lines per
/// shortage.
const RECOVERY_TIME: Duration = Duration::from_secs(1);

/// The descriptors of all connections. Clones share the counts.
#[derive(Debug, Clone)]
pub(crate) struct Descriptors(Arc<State>);

#[derive(Debug)]
struct State {
    /// The budget of all connections.
    budget: Arc<Budget>,
    allowed: usize,
    /// The number of listeners that wait for descriptors.
    waiting: AtomicUsize,
    freed: Notify,
    shortages: watch::Sender<Shortages>,
}

/// The descriptors of a pod, by direction.
#[derive(Debug)]
pub(super) struct Directions {
    pub(super) outbound: Arc<Budget>,
    pub(super) inbound: Arc<Budget>,
}

/// Counts shortages of descriptors.
#[derive(Debug, Clone, Copy, Default)]
struct Shortages {
    /// The number of listeners that are paused now.
    paused: usize,
    /// The number of pauses and refused streams so far.
    total: u64,
    /// The error of the system at the last shortage.
    error: Option<i32>,
}

/// A permit for descriptors other than those of accepted connections: pipes, pooled tunnels.
#[derive(Debug)]
pub(crate) struct FdPermit {
    descriptors: Descriptors,
    budget: Arc<Budget>,
    count: usize,
}

/// The reason why a listener pauses.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Shortage {
    /// Connections use the whole budget.
    Descriptors,
    /// The system reported this error.
    System(Option<i32>),
}

/// Counts a listener as paused until it is dropped.
#[derive(Debug)]
pub(crate) struct PausedListener(Descriptors);

impl Descriptors {
    /// The descriptors of a process with the limit `limit`, `open` files and `workers` threads.
    pub(crate) fn new(limit: usize, open: usize, workers: usize) -> Self {
        let left = limit
            .saturating_sub(open.saturating_add(workers.saturating_mul(DESCRIPTORS_PER_WORKER)));
        // A small limit is split in half: the reserve alone would leave nothing for connections.
        let reserve = MIN_RESERVE.max(limit / RESERVED_PART).min(left / 2);
        let allowed = (left - reserve).max(DESCRIPTORS_PER_CONNECTION);
        Self(Arc::new(State {
            budget: Arc::new(Budget::new(allowed)),
            allowed,
            waiting: AtomicUsize::new(0),
            freed: Notify::new(),
            shortages: watch::Sender::default(),
        }))
    }

    /// The descriptors of all pods.
    pub(super) fn budget(&self) -> &Budget {
        &self.0.budget
    }

    /// Creates the budgets of a pod. Neither direction can take all of its descriptors.
    pub(super) fn of_pod(&self) -> Directions {
        let part = |whole, sharing| Arc::new(Budget::part(whole, usize::MAX, sharing));
        let pod = part(&self.0.budget, Sharing::KnownParts);
        let direction = || part(&pod, Sharing::Reserving);
        Directions { outbound: direction(), inbound: direction() }
    }

    /// Takes `count` descriptors of `budget` without waiting. The budget may be exceeded.
    pub(super) fn hold(&self, budget: &Arc<Budget>, count: usize) -> FdPermit {
        budget.take_beyond_limit(count);
        FdPermit { descriptors: self.clone(), budget: budget.clone(), count }
    }

    /// Takes the descriptors that a pod of a node needs without connections.
    pub(crate) fn hold_of_idle_pod(&self, has_dns_proxy: bool) -> FdPermit {
        self.hold(&self.0.budget, descriptors_of_idle_pod(has_dns_proxy))
    }

    /// The number of descriptors that connections, pipes and pooled tunnels may use together.
    pub(crate) fn total(&self) -> usize {
        self.0.allowed
    }

    /// Takes `count` optional descriptors; `None` unless plenty are free.
    pub(crate) fn spare(&self, count: usize) -> Option<FdPermit> {
        let State { budget, allowed, .. } = &*self.0;
        let plenty = allowed - allowed / 4;
        if budget.used().saturating_add(count) > plenty || budget.take(count).is_err() {
            return None;
        }
        Some(FdPermit { descriptors: self.clone(), budget: budget.clone(), count })
    }

    /// Releases descriptors of `budget`, which is a part of this one.
    pub(super) fn give_back(&self, budget: &Budget, count: usize) {
        budget.give_back(count);
        if self.0.waiting.load(SeqCst) > 0 {
            self.0.freed.notify_waiters();
        }
    }

    /// Waits for freed descriptors until `has_room` is true.
    pub(super) async fn freed(&self, has_room: impl Fn() -> bool) {
        let _waiting = WaitingListener::new(&self.0.waiting);
        loop {
            // Created before the check, so that a release after the check wakes it.
            let freed = self.0.freed.notified();
            if has_room() {
                return;
            }
            freed.await;
        }
    }

    /// Records that a stream was refused for lack of descriptors.
    pub(super) fn record_refused_stream(&self) {
        self.record_shortage(None, 0);
    }

    /// Records that a listener pauses.
    pub(crate) fn pause(&self, listener: &'static str, shortage: Shortage) -> PausedListener {
        let (reason, error) = match shortage {
            Shortage::Descriptors => ("descriptors", None),
            Shortage::System(error) => ("system", error),
        };
        metrics::accept_paused(listener, reason);
        self.record_shortage(error, 1);
        PausedListener(self.clone())
    }

    fn record_shortage(&self, error: Option<i32>, paused: usize) {
        self.0.shortages.send_modify(|shortages| {
            shortages.paused += paused;
            shortages.total += 1;
            shortages.error = error;
        });
    }

    /// Reports shortages to the log and the readiness probe. Never returns.
    pub(super) async fn report(&self, readiness: &Readiness) {
        let mut shortages = self.0.shortages.subscribe();
        let mut reported = 0;
        // The sender lives as long as `self`, so waiting cannot fail.
        while shortages.wait_for(|shortages| shortages.total > reported).await.is_ok() {
            readiness.out_of_descriptors(true);
            let error = shortages.borrow().error.map(io::Error::from_raw_os_error);
            let (held, allowed) = (self.0.budget.used(), self.0.allowed);
            tracing::warn!(
                held,
                allowed,
                error = error.map(tracing::field::display),
                hint = "ulimit -n, LimitNOFILE",
                "accepting pauses and tunnel streams are refused: the limit of open files is reached"
            );
            reported = recovered(&mut shortages).await;
            readiness.out_of_descriptors(false);
            tracing::info!("accepting resumes");
        }
    }
}

/// Waits until a shortage is over. Returns the number of shortages until then.
async fn recovered(shortages: &mut watch::Receiver<Shortages>) -> u64 {
    loop {
        let total = match shortages.wait_for(|shortages| shortages.paused == 0).await {
            Ok(state) => state.total,
            // The sender lives as long as `self`.
            Err(_) => return u64::MAX,
        };
        if timeout(RECOVERY_TIME, shortages.wait_for(|shortages| shortages.total > total))
            .await
            .is_err()
        {
            return total;
        }
    }
}

/// The number of descriptors that a pod of a node needs without connections.
pub(super) fn descriptors_of_idle_pod(has_dns_proxy: bool) -> usize {
    DESCRIPTORS_PER_POD + if has_dns_proxy { DESCRIPTORS_PER_DNS_PROXY } else { 0 }
}

impl Drop for FdPermit {
    fn drop(&mut self) {
        self.descriptors.give_back(&self.budget, self.count);
    }
}

/// Counts a listener as waiting until it is dropped.
struct WaitingListener<'a>(&'a AtomicUsize);

impl<'a> WaitingListener<'a> {
    fn new(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, SeqCst);
        Self(waiting)
    }
}

impl Drop for WaitingListener<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

impl Drop for PausedListener {
    fn drop(&mut self) {
        self.0.0.shortages.send_modify(|shortages| shortages.paused -= 1);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use tokio::time::{Instant, sleep};

    use super::*;

    /// A budget of `allowed` descriptors.
    fn descriptors(allowed: usize) -> Descriptors {
        let descriptors = Descriptors::new(2 * allowed, 0, 0);
        assert_eq!(descriptors.0.allowed, allowed);
        descriptors
    }

    #[test]
    fn descriptor_limit_keeps_reserve_and_is_halved_if_small() {
        let allowed = |limit, open, workers| Descriptors::new(limit, open, workers).0.allowed;
        assert_eq!(allowed(1024, 30, 2), 1024 - 30 - 8 - 64);
        assert_eq!(allowed(1_000_000, 30, 2), 1_000_000 - 30 - 8 - 20_000);
        assert_eq!(allowed(64, 20, 2), 18);
        assert_eq!(
            allowed(16, 20, 2),
            DESCRIPTORS_PER_CONNECTION,
            "the minimum for one connection, although too few descriptors are left"
        );
    }

    #[test]
    fn pipes_get_descriptors_only_while_plenty_are_free() {
        let descriptors = descriptors(40);
        let pod = descriptors.of_pod();
        let connections = descriptors.hold(&pod.inbound, 28);
        let pipe = descriptors.spare(2);
        assert!(pipe.is_some() && descriptors.spare(2).is_none());
        assert!(pod.outbound.free() > 0, "the rest is for connections");
        drop(connections);
        assert!(descriptors.spare(2).is_some());
    }

    #[test]
    fn one_direction_leaves_descriptors_to_the_other() {
        let descriptors = descriptors(48);
        let pod = descriptors.of_pod();
        let fill = |budget: &Budget| {
            std::iter::repeat_with(|| budget.take(1)).take_while(Result::is_ok).count()
        };
        assert_eq!((fill(&pod.outbound), fill(&pod.inbound)), (36, 9));
        let other = descriptors.of_pod();
        assert!(fill(&other.inbound) >= 2, "another pod gets some too");
    }

    #[test]
    fn idle_pods_leave_fewer_descriptors_to_connections() {
        let descriptors = descriptors(48);
        let pod = descriptors.of_pod();
        let before = pod.inbound.free();
        let idle = [false, true].map(|has_dns_proxy| descriptors.hold_of_idle_pod(has_dns_proxy));
        let held = 2 * DESCRIPTORS_PER_POD + DESCRIPTORS_PER_DNS_PROXY;
        assert_eq!(descriptors.0.budget.used(), held);
        assert!(pod.inbound.free() < before && pod.inbound.take(48 - held).is_err());
        drop(idle);
        assert_eq!((pod.inbound.free(), descriptors.0.budget.used()), (before, 0));
    }

    #[tokio::test]
    async fn listener_resumes_when_descriptors_are_released() {
        let descriptors = descriptors(5);
        let pod = descriptors.of_pod();
        let room =
            || Box::pin(descriptors.freed(|| pod.inbound.free() >= DESCRIPTORS_PER_CONNECTION));
        let first = descriptors.hold(&pod.inbound, DESCRIPTORS_PER_CONNECTION);
        assert!(room().now_or_never().is_some(), "3 are left, of which 2 are for this direction");
        let second = descriptors.hold(&pod.inbound, DESCRIPTORS_PER_CONNECTION);
        let mut waiting = room();
        assert!((&mut waiting).now_or_never().is_none(), "1 is left");
        drop(first);
        assert!((&mut waiting).now_or_never().is_some());
        drop((second, waiting));
        assert_eq!((descriptors.0.budget.used(), descriptors.0.waiting.load(SeqCst)), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn reports_unready_until_no_listener_pauses_for_a_while() {
        let (descriptors, readiness) = (descriptors(5), Readiness::default());
        let reporting = descriptors.report(&readiness);
        let script = async {
            let is_short = || readiness.is_out_of_descriptors();
            let began = Instant::now();
            for _ in 0..3 {
                let paused = descriptors.pause("outbound", Shortage::Descriptors);
                sleep(RECOVERY_TIME * 2).await;
                assert!(is_short());
                drop(paused);
                sleep(RECOVERY_TIME / 2).await;
                assert!(is_short(), "a single connection may have ended");
            }
            while is_short() {
                sleep(RECOVERY_TIME / 100).await;
            }
            let elapsed = began.elapsed();
            assert!(elapsed >= RECOVERY_TIME * 8 && elapsed < RECOVERY_TIME * 9, "{elapsed:?}");
            drop(descriptors.pause("hbone", Shortage::System(None)));
            sleep(RECOVERY_TIME / 2).await;
            assert!(is_short(), "a short pause is reported too");
        };
        tokio::select! {
            () = reporting => unreachable!(),
            () = script => {}
        }
    }
}
