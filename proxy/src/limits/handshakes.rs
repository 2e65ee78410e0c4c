//! TLS handshakes under way: each costs signatures and memory before the client is authenticated.
//! Those beyond the total wait; those beyond the limit of one source are refused.
//!
//! Handshakes of the source with the fewest come first, so that sources that never complete theirs
//! do not delay others. A source that was disconnected for exceeding a limit of its tunnel gets two
//! at a time for a while, as each attempt costs a handshake.
//!
//! Not here: how long one may wait and take, and a connection that has sent no ClientHello yet, for
//! which nothing is counted here.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use underpass_hbone::{Budget, Queue, Share, Sharing, SourceNetwork, Turn};

/// How long a source is penalized after it exceeded a limit.
const PENALTY: Duration = Duration::from_secs(10);
/// How many handshakes a penalized source may have, those that wait included.
const PENALIZED_HANDSHAKES: usize = 2;
/// How many penalized sources are remembered.
const PENALIZED_SOURCES: usize = 1024;

/// The handshakes of the node. Cheap to clone; clones count together.
#[derive(Debug, Clone)]
pub(super) struct Handshakes {
    under_way: Arc<Budget>,
    per_source: usize,
    /// By how many the source has already.
    queue: Queue<usize>,
    penalties: Arc<Penalties>,
}

/// The handshakes of one source.
#[derive(Debug)]
pub(super) struct SourceHandshakes {
    under_way: Arc<Budget>,
    /// Those that wait included.
    begun: Arc<Budget>,
}

/// One handshake, for as long as it lives.
#[derive(Debug)]
pub(crate) struct HandshakeTicket {
    _turn: Turn<usize>,
    _begun: Share,
}

impl Handshakes {
    /// `total` at once, of which one source has `per_source` at most.
    pub(super) fn new(total: usize, per_source: usize) -> Self {
        let (queue, penalties) = (Queue::default(), Arc::default());
        Self { under_way: Arc::new(Budget::new(total)), per_source, queue, penalties }
    }

    pub(super) fn of_source(&self) -> SourceHandshakes {
        let under_way = Budget::part(&self.under_way, self.per_source, Sharing::Strangers);
        let begun = Arc::new(Budget::new(self.per_source));
        SourceHandshakes { under_way: Arc::new(under_way), begun }
    }

    /// Begins a handshake when it is its turn; `None` when `source` has too many. `waits` is called
    /// if there is a wait. Cancel-safe.
    pub(super) async fn admit(
        &self,
        source: IpAddr,
        of_source: &SourceHandshakes,
        waits: impl FnOnce(),
    ) -> Option<HandshakeTicket> {
        let SourceHandshakes { under_way, begun } = of_source;
        if begun.used() >= PENALIZED_HANDSHAKES && self.penalties.are_on(source) {
            return None;
        }
        let begun = Share::take(begun, 1).ok()?;
        let rank = of_source.begun.used();
        let turn = self.queue.turn(under_way, rank, waits).await;
        Some(HandshakeTicket { _turn: turn, _begun: begun })
    }

    pub(super) fn penalize(&self, source: IpAddr) {
        self.penalties.add(source);
    }
}

/// The sources that get fewer handshakes, and until when.
#[derive(Debug, Default)]
struct Penalties {
    /// So that nothing is locked while there is none.
    some: AtomicBool,
    until: Mutex<HashMap<SourceNetwork, Instant>>,
}

impl Penalties {
    fn add(&self, source: IpAddr) {
        let now = Instant::now();
        // Nothing panics while it is held.
        let mut until = self.until.lock().unwrap_or_else(PoisonError::into_inner);
        if until.len() >= PENALIZED_SOURCES {
            until.retain(|_, until| *until > now);
        }
        if until.len() < PENALIZED_SOURCES {
            until.insert(SourceNetwork::of(source), now + PENALTY);
            self.some.store(true, Relaxed);
        }
    }

    fn are_on(&self, source: IpAddr) -> bool {
        if !self.some.load(Relaxed) {
            return false;
        }
        let now = Instant::now();
        // As above.
        let mut until = self.until.lock().unwrap_or_else(PoisonError::into_inner);
        let is_on = until.get(&SourceNetwork::of(source)).is_some_and(|until| *until > now);
        if !is_on {
            until.retain(|_, until| *until > now);
            self.some.store(!until.is_empty(), Relaxed);
        }
        is_on
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use tokio::time::advance;

    use super::*;

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    /// As many as a source may begin and do not wait.
    fn fill(
        handshakes: &Handshakes,
        source: IpAddr,
        of_source: &SourceHandshakes,
    ) -> Vec<HandshakeTicket> {
        let begin = || handshakes.admit(source, of_source, || ()).now_or_never().flatten();
        std::iter::from_fn(begin).collect()
    }

    #[tokio::test]
    async fn source_with_too_many_is_refused_at_once() {
        let handshakes = Handshakes::new(100, 2);
        let source = handshakes.of_source();
        let held = fill(&handshakes, ip(1), &source);
        assert_eq!(held.len(), 2);
        assert!(handshakes.admit(ip(1), &source, || ()).await.is_none());
        drop(held);
        assert!(handshakes.admit(ip(1), &source, || unreachable!()).await.is_some());
    }

    #[tokio::test]
    async fn sources_that_finish_none_leave_some_to_newcomers() {
        let handshakes = Handshakes::new(1024, 64);
        let sources: Vec<_> = (0..32).map(|last| (ip(last), handshakes.of_source())).collect();
        let held: Vec<_> =
            sources.iter().map(|(ip, source)| fill(&handshakes, *ip, source)).collect();
        assert_eq!(held[0].len(), 64);
        let newcomer = handshakes.of_source();
        let admitted = handshakes.admit(ip(100), &newcomer, || unreachable!());
        assert!(admitted.now_or_never().is_some());
    }

    #[tokio::test]
    async fn source_that_waits_counts_as_often_as_it_does() {
        let handshakes = Handshakes::new(1, 2);
        let (first, second) = (handshakes.of_source(), handshakes.of_source());
        let _held = handshakes.admit(ip(1), &first, || unreachable!()).await;
        let mut waiting = Box::pin(handshakes.admit(ip(2), &second, || ()));
        let mut also = Box::pin(handshakes.admit(ip(2), &second, || ()));
        assert!((&mut waiting).now_or_never().is_none() && (&mut also).now_or_never().is_none());
        assert!(handshakes.admit(ip(2), &second, || ()).await.is_none());
        drop(also);
        let again = handshakes.admit(ip(2), &second, || ()).now_or_never();
        assert!(again.is_none(), "the abandoned wait no longer counts");
    }

    #[tokio::test(start_paused = true)]
    async fn penalized_source_has_few_for_a_while() {
        let handshakes = Handshakes::new(100, 10);
        handshakes.penalize(ip(1));
        let (penalized, other) = (handshakes.of_source(), handshakes.of_source());
        assert_eq!(fill(&handshakes, ip(1), &penalized).len(), PENALIZED_HANDSHAKES);
        assert_eq!(fill(&handshakes, ip(2), &other).len(), 10);
        advance(PENALTY).await;
        assert_eq!(fill(&handshakes, ip(1), &penalized).len(), 10);
        assert!(handshakes.penalties.until.lock().unwrap().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn remembers_few_penalized_sources() {
        let penalties = Penalties::default();
        for n in 0..2 * u32::try_from(PENALIZED_SOURCES).unwrap() {
            penalties.add(IpAddr::V4(n.into()));
        }
        assert_eq!(penalties.until.lock().unwrap().len(), PENALIZED_SOURCES);
        advance(PENALTY).await;
        penalties.add(ip(1));
        assert_eq!(penalties.until.lock().unwrap().len(), 1);
    }
}
