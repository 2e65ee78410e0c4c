//! Drains the inbound connections of a pod that stays in service: an operator takes the pod out of
//! use before maintenance, without cutting its connections.
//!
//! ```text
//! serving ── begin() ──> draining ── all ended, or deadline and the rest terminated ──> drained
//!    ▲                      │  new inbound connections are refused, GOAWAY is sent        │
//!    └────── undo() ────────┴─────────────────────────────────────────────────────────────┘
//! ```
//!
//! Outbound connections go on, because the open inbound ones may need them.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::decide::connection_registry::Registries;
use crate::decide::subject::Decision;
use crate::error::ProxyError;

/// The interval of counts of the open connections: ten thousand take less than a millisecond.
const CHECK_INTERVAL: Duration = Duration::from_millis(200);

/// The state of a pod's inbound connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum DrainState {
    #[default]
    Serving,
    /// New connections are refused; the remaining ones are terminated at the deadline.
    Draining { deadline: Instant },
    /// New connections are refused, and none is open.
    Drained { terminated: usize },
}

/// The drain of the inbound connections of one pod.
#[derive(Debug)]
pub(crate) struct InboundDrain {
    /// Read for each accepted connection, so it is outside the mutex.
    refuses: AtomicBool,
    phase: Mutex<Phase>,
    /// Cancelled when the pod or the process drains.
    closing: CancellationToken,
}

#[derive(Debug)]
struct Phase {
    state: DrainState,
    /// Cancelled when a drain begins, or the pod closes: tunnels then accept no new streams.
    tunnels: CancellationToken,
    /// Cancelled when the drain is undone or replaced.
    current: CancellationToken,
}

impl InboundDrain {
    /// `closing` is cancelled when the pod or the process drains.
    pub(crate) fn new(closing: &CancellationToken) -> Self {
        let (state, tunnels) = (DrainState::Serving, closing.child_token());
        let phase = Phase { state, tunnels, current: CancellationToken::new() };
        let (refuses, closing) = (AtomicBool::new(false), closing.clone());
        Self { refuses, phase: Mutex::new(phase), closing }
    }

    /// Whether new inbound connections are refused.
    pub(crate) fn refuses(&self) -> bool {
        self.refuses.load(Relaxed)
    }

    pub(crate) fn state(&self) -> DrainState {
        self.phase().state
    }

    /// A token for a new tunnel of a peer, which is cancelled when the tunnel must accept no new
    /// streams.
    pub(crate) fn closing_of_tunnel(&self) -> CancellationToken {
        self.phase().tunnels.clone()
    }

    /// Refuses new inbound connections, and lets tunnels accept no new streams. The returned drain
    /// terminates the connections that are left `within` this time. Replaces a current drain.
    pub(crate) fn begin(&self, within: Duration) -> CurrentDrain {
        let deadline = Instant::now() + within;
        let mut phase = self.phase();
        self.refuses.store(true, Relaxed);
        phase.tunnels.cancel();
        phase.state = DrainState::Draining { deadline };
        phase.current.cancel();
        phase.current = CancellationToken::new();
        CurrentDrain { deadline, replaced: phase.current.clone() }
    }

    /// Accepts inbound connections again. Returns whether they were refused.
    pub(crate) fn undo(&self) -> bool {
        let mut phase = self.phase();
        phase.current.cancel();
        phase.tunnels = self.closing.child_token();
        phase.state = DrainState::Serving;
        self.refuses.swap(false, Relaxed)
    }

    /// Waits for the end of the inbound connections, terminates the rest at the deadline, and
    /// records the end of the drain.
    pub(crate) async fn finish(&self, drain: CurrentDrain, connections: &Registries<Decision>) {
        let CurrentDrain { deadline, replaced } = drain;
        let mut terminated = 0;
        while connections.count(Decision::is_inbound).await > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            // The count yields: an undone drain terminates nothing.
            if replaced.is_cancelled() {
                return;
            }
            if left.is_zero() {
                // Again at every check: a stream may have got its permit after the deadline.
                terminated += connections.terminate(not_inbound).await;
            }
            let pause = if left.is_zero() { CHECK_INTERVAL } else { left.min(CHECK_INTERVAL) };
            tokio::select! {
                () = sleep(pause) => {}
                () = replaced.cancelled() => return,
                () = self.closing.cancelled() => return,
            }
        }
        let mut phase = self.phase();
        if !replaced.is_cancelled() {
            phase.state = DrainState::Drained { terminated };
        }
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        // No code panics while it holds the lock.
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A drain that has begun.
#[derive(Debug)]
#[must_use = "the drain ends when it is finished"]
pub(crate) struct CurrentDrain {
    deadline: Instant,
    /// Cancelled when the drain is undone or replaced.
    replaced: CancellationToken,
}

fn not_inbound(decision: &Decision) -> Result<(), ProxyError> {
    if decision.is_inbound() { Err(ProxyError::DrainedByRequest) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Arc;

    use super::*;
    use crate::decide::connection_registry::Registration;

    const DEADLINE: Duration = Duration::from_secs(5);

    struct Draining {
        drain: Arc<InboundDrain>,
        connections: Arc<Registries<Decision>>,
        closing: CancellationToken,
    }

    impl Draining {
        fn new() -> Self {
            let closing = CancellationToken::new();
            let drain = Arc::new(InboundDrain::new(&closing));
            Self { drain, connections: Arc::new(Registries::new(2)), closing }
        }

        /// A tunnel of a peer on the second worker.
        fn tunnel(&self) -> Registration<Decision> {
            let registration = self.connections.for_worker(1).register(Decision::undecided(true));
            let (client, id) = (SocketAddr::from(([10, 0, 0, 1], 1)), "spiffe://td/ns/a/sa/b");
            let id = id.parse().unwrap();
            registration.amend(|decision| decision.list_tunnel(client, &id));
            registration
        }

        async fn finish(&self, drain: CurrentDrain) {
            self.drain.finish(drain, &self.connections).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn drain_ends_with_the_last_inbound_connection() {
        let pod = Draining::new();
        let tunnel = pod.tunnel();
        let _opening = pod.connections.for_worker(0).register(Decision::undecided(false));
        let handshake = pod.connections.for_worker(0).register(Decision::undecided(true));
        let closing = pod.drain.closing_of_tunnel();
        assert!(!pod.drain.refuses());
        let (drain, began) = (pod.drain.begin(DEADLINE), Instant::now());
        assert!(pod.drain.refuses() && closing.is_cancelled());
        assert_eq!(pod.drain.state(), DrainState::Draining { deadline: began + DEADLINE });
        let ending = async {
            sleep(Duration::from_secs(1)).await;
            drop(tunnel);
            sleep(Duration::from_secs(1)).await;
            drop(handshake);
        };
        tokio::join!(pod.finish(drain), ending);
        let waited = began.elapsed();
        assert!(waited >= Duration::from_secs(2), "a handshake counts: {waited:?}");
        assert!(waited <= Duration::from_secs(2) + CHECK_INTERVAL, "{waited:?}");
        assert_eq!(pod.drain.state(), DrainState::Drained { terminated: 0 });
        assert!(pod.drain.refuses(), "it stays out of use");
    }

    #[tokio::test(start_paused = true)]
    async fn drain_terminates_only_inbound_connections_at_its_deadline() {
        let pod = Draining::new();
        let tunnel = pod.tunnel();
        let other = pod.connections.for_worker(0).register(Decision::undecided(false));
        let (drain, began) = (pod.drain.begin(DEADLINE), Instant::now());
        let ending = async {
            let endless = std::future::pending::<Result<(), ProxyError>>();
            let ended = tunnel.termination().or_terminate(Box::pin(endless)).await;
            assert!(matches!(ended, Err(ProxyError::DrainedByRequest)), "{ended:?}");
            drop(tunnel);
        };
        tokio::join!(pod.finish(drain), ending);
        assert!(began.elapsed() < DEADLINE + 2 * CHECK_INTERVAL, "{:?}", began.elapsed());
        assert!(began.elapsed() >= DEADLINE && !other.termination().is_terminated());
        assert_eq!(pod.drain.state(), DrainState::Drained { terminated: 1 });
    }

    #[tokio::test(start_paused = true)]
    async fn undone_drain_accepts_again_and_terminates_nothing() {
        let pod = Draining::new();
        let tunnel = pod.tunnel();
        let drain = pod.drain.begin(DEADLINE);
        assert!(pod.drain.undo() && !pod.drain.refuses());
        pod.finish(drain).await;
        assert_eq!(pod.drain.state(), DrainState::Serving);
        sleep(2 * DEADLINE).await;
        assert!(!tunnel.termination().is_terminated());
        let closing = pod.drain.closing_of_tunnel();
        assert!(!closing.is_cancelled(), "a new tunnel accepts streams");
        assert!(!pod.drain.undo(), "it was not draining");
        pod.closing.cancel();
        assert!(closing.is_cancelled(), "the pod closes");
    }

    #[tokio::test(start_paused = true)]
    async fn second_drain_replaces_the_deadline_of_the_first() {
        let pod = Draining::new();
        let tunnel = pod.tunnel();
        let (first, began) = (pod.drain.begin(DEADLINE), Instant::now());
        let second = pod.drain.begin(3 * DEADLINE);
        pod.finish(first).await;
        assert_eq!(pod.drain.state(), DrainState::Draining { deadline: began + 3 * DEADLINE });
        drop(tunnel);
        pod.finish(second).await;
        assert_eq!(pod.drain.state(), DrainState::Drained { terminated: 0 });
    }
}
