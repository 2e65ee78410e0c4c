//! Limits concurrent TLS handshakes, each of which costs signatures and memory before the client is
//! authenticated. Handshakes beyond the total wait; those beyond the limit of their source are
//! refused.
//!
//! Sources with the fewest handshakes come first, so that sources that never complete theirs do not
//! delay others. A source that exceeded a limit of its tunnel is limited to two handshakes for a
//! while, because each reconnection costs one.
//!
//! The caller sets the timeout, and requests a ticket only after the client has sent a ClientHello.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use underpass_hbone::{Budget, Queue, QueuePermit, Share, Sharing, SourceNetwork};

/// The duration of a source's penalty after it exceeded a limit.
const PENALTY_TIME: Duration = Duration::from_secs(10);
/// The maximum number of handshakes of a penalized source, including waiting ones.
const MAX_PENALIZED_HANDSHAKES: usize = 2;
/// The maximum number of penalized sources.
const MAX_PENALIZED_SOURCES: usize = 1024;

/// The handshakes of the node. Clones share the counts.
#[derive(Debug, Clone)]
pub(super) struct Handshakes {
    under_way: Arc<Budget>,
    per_source: usize,
    /// Ordered by the number of handshakes of the source.
    queue: Queue<usize>,
    penalties: Arc<Penalties>,
}

/// The handshakes of one source.
#[derive(Debug)]
pub(super) struct SourceHandshakes {
    under_way: Arc<Budget>,
    /// The started handshakes, including waiting ones.
    begun: Arc<Budget>,
}

/// Counts one handshake until it is dropped.
#[derive(Debug)]
pub(crate) struct HandshakeTicket {
    _permit: QueuePermit<usize>,
    _begun: Share,
}

impl Handshakes {
    /// Allows `total` handshakes at once, of which one source has at most `per_source`.
    pub(super) fn new(total: usize, per_source: usize) -> Self {
        let (queue, penalties) = (Queue::default(), Arc::default());
        Self { under_way: Arc::new(Budget::new(total)), per_source, queue, penalties }
    }

    /// The handshakes in progress.
    pub(super) fn under_way(&self) -> &Budget {
        &self.under_way
    }

    pub(super) fn of_source(&self) -> SourceHandshakes {
        let under_way = Budget::part(&self.under_way, self.per_source, Sharing::UnknownParts);
        let begun = Arc::new(Budget::new(self.per_source));
        SourceHandshakes { under_way: Arc::new(under_way), begun }
    }

    /// Waits for the turn of a handshake. Calls `on_wait` if it has to wait. Returns `None` if
    /// `source` has too many. Cancel-safe.
    pub(super) async fn admit(
        &self,
        source: IpAddr,
        of_source: &SourceHandshakes,
        on_wait: impl FnOnce(),
    ) -> Option<HandshakeTicket> {
        let SourceHandshakes { under_way, begun } = of_source;
        if begun.used() >= MAX_PENALIZED_HANDSHAKES && self.penalties.applies_to(source) {
            return None;
        }
        let begun = Share::take(begun, 1).ok()?;
        let rank = of_source.begun.used();
        let turn = self.queue.turn(under_way, rank, on_wait).await;
        Some(HandshakeTicket { _permit: turn, _begun: begun })
    }

    pub(super) fn penalize(&self, source: IpAddr) {
        self.penalties.add(source);
    }
}

/// The penalized sources, each with the end of its penalty.
#[derive(Debug, Default)]
struct Penalties {
    /// Whether a source may be penalized. Read without the lock.
    has_penalties: AtomicBool,
    until: Mutex<HashMap<SourceNetwork, Instant>>,
}

impl Penalties {
    fn add(&self, source: IpAddr) {
        let now = Instant::now();
        // No code panics while it holds the lock.
        let mut until = self.until.lock().unwrap_or_else(PoisonError::into_inner);
        if until.len() >= MAX_PENALIZED_SOURCES {
            until.retain(|_, until| *until > now);
        }
        let source = SourceNetwork::of(source);
        if until.len() < MAX_PENALIZED_SOURCES || until.contains_key(&source) {
            until.insert(source, now + PENALTY_TIME);
            self.has_penalties.store(true, Relaxed);
        }
    }

    fn applies_to(&self, source: IpAddr) -> bool {
        if !self.has_penalties.load(Relaxed) {
            return false;
        }
        let now = Instant::now();
        // No code panics while it holds the lock.
        let mut until = self.until.lock().unwrap_or_else(PoisonError::into_inner);
        let is_penalized = until.get(&SourceNetwork::of(source)).is_some_and(|until| *until > now);
        if !is_penalized {
            until.retain(|_, until| *until > now);
            self.has_penalties.store(!until.is_empty(), Relaxed);
        }
        is_penalized
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

    /// Starts handshakes of a source until one would wait.
    fn fill(
        handshakes: &Handshakes,
        source: IpAddr,
        of_source: &SourceHandshakes,
    ) -> Vec<HandshakeTicket> {
        let begin = || handshakes.admit(source, of_source, || ()).now_or_never().flatten();
        std::iter::from_fn(begin).collect()
    }

    #[tokio::test]
    async fn refuses_source_with_too_many_handshakes_at_once() {
        let handshakes = Handshakes::new(100, 2);
        let source = handshakes.of_source();
        let tickets = fill(&handshakes, ip(1), &source);
        assert_eq!(tickets.len(), 2);
        assert!(handshakes.admit(ip(1), &source, || ()).await.is_none());
        drop(tickets);
        assert!(handshakes.admit(ip(1), &source, || unreachable!()).await.is_some());
    }

    #[tokio::test]
    async fn unfinished_handshakes_do_not_delay_new_sources() {
        let handshakes = Handshakes::new(1024, 64);
        let sources: Vec<_> = (0..32).map(|last| (ip(last), handshakes.of_source())).collect();
        let tickets: Vec<_> =
            sources.iter().map(|(ip, source)| fill(&handshakes, *ip, source)).collect();
        assert_eq!(tickets[0].len(), 64);
        let new_source = handshakes.of_source();
        let admitted = handshakes.admit(ip(100), &new_source, || unreachable!());
        assert!(admitted.now_or_never().is_some());
    }

    #[tokio::test]
    async fn waiting_handshakes_count_for_their_source() {
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
    async fn penalized_source_gets_two_handshakes_for_a_while() {
        let handshakes = Handshakes::new(100, 10);
        handshakes.penalize(ip(1));
        let (penalized, other) = (handshakes.of_source(), handshakes.of_source());
        assert_eq!(fill(&handshakes, ip(1), &penalized).len(), MAX_PENALIZED_HANDSHAKES);
        assert_eq!(fill(&handshakes, ip(2), &other).len(), 10);
        advance(PENALTY_TIME).await;
        assert_eq!(fill(&handshakes, ip(1), &penalized).len(), 10);
        assert!(handshakes.penalties.until.lock().unwrap().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn number_of_penalized_sources_is_bounded() {
        let penalties = Penalties::default();
        for n in 0..2 * u32::try_from(MAX_PENALIZED_SOURCES).unwrap() {
            penalties.add(IpAddr::V4(n.into()));
        }
        assert_eq!(penalties.until.lock().unwrap().len(), MAX_PENALIZED_SOURCES);
        advance(PENALTY_TIME).await;
        penalties.add(ip(1));
        assert_eq!(penalties.until.lock().unwrap().len(), 1);
    }
}
