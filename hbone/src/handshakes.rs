//! Caps on the TLS handshakes that may be under way: each costs us signatures and memory before we know who it is. One source
//! has so many and is refused more; all together have so many, and whoever comes then waits for its turn.
//!
//! Not here: how long one may wait and take (the caller's deadline), and what becomes of those who are refused.

use std::net::IpAddr;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError};

use crate::sources::{SourceGuard, SourceLimit};

/// Counts the handshakes under way. Cheap to clone; clones count together.
#[derive(Debug, Clone)]
pub struct HandshakeLimit {
    sources: SourceLimit,
    places: Arc<Semaphore>,
}

/// One handshake under way, for as long as it lives.
#[derive(Debug)]
pub struct HandshakeGuard {
    _source: SourceGuard,
    _place: OwnedSemaphorePermit,
}

impl HandshakeLimit {
    /// A limit of `total` handshakes at once, of which one source has `per_source` at most.
    pub fn new(total: usize, per_source: usize) -> Self {
        let places = Arc::new(Semaphore::new(total.min(Semaphore::MAX_PERMITS)));
        Self { sources: SourceLimit::new(per_source), places }
    }

    /// Begins a handshake with `source`, when those who asked before have had their turn; `None` when it has too many, those
    /// that wait included. `waits` is called if there is a wait. Whoever gives up waiting leaves nothing behind.
    pub async fn admit(&self, source: IpAddr, waits: impl FnOnce()) -> Option<HandshakeGuard> {
        let source = self.sources.admit(source)?;
        let place = match self.places.clone().try_acquire_owned() {
            Ok(place) => place,
            Err(TryAcquireError::NoPermits) => {
                waits();
                self.places.clone().acquire_owned().await.ok()?
            }
            // It never is.
            Err(TryAcquireError::Closed) => return None,
        };
        Some(HandshakeGuard { _source: source, _place: place })
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::Duration;

    use futures_util::FutureExt as _;
    use tokio::time::timeout;

    use super::*;

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    #[tokio::test]
    async fn a_source_with_too_many_is_refused_at_once() {
        let limit = HandshakeLimit::new(10, 1);
        let held = limit.admit(ip(1), || unreachable!()).await;
        assert!(limit.clone().admit(ip(1), || unreachable!()).await.is_none());
        drop(held);
        assert!(limit.admit(ip(1), || unreachable!()).await.is_some());
    }

    #[tokio::test]
    async fn whoever_comes_when_all_places_are_taken_waits_for_its_turn() {
        let limit = HandshakeLimit::new(1, 1);
        let held = limit.admit(ip(1), || unreachable!()).await;
        let waits = Cell::new(0);
        let count = || waits.set(waits.get() + 1);
        let mut second = Box::pin(limit.admit(ip(2), count));
        let mut third = Box::pin(limit.admit(ip(3), count));
        assert!((&mut second).now_or_never().is_none());
        assert!((&mut third).now_or_never().is_none());
        assert_eq!(waits.get(), 2);
        assert!(limit.admit(ip(3), || unreachable!()).await.is_none(), "one that waits counts");
        drop(held);
        assert!((&mut third).now_or_never().is_none(), "it came later");
        let second = second.await;
        assert!(second.is_some() && (&mut third).now_or_never().is_none());
        drop(second);
        assert!(third.await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_gives_up_waiting_leaves_nothing_behind() {
        let limit = HandshakeLimit::new(1, 1);
        let held = limit.admit(ip(1), || ()).await;
        let waiting = timeout(Duration::from_secs(10), limit.admit(ip(2), || ()));
        waiting.await.unwrap_err();
        drop(held);
        let second = limit.admit(ip(2), || unreachable!()).await;
        assert!(second.is_some());
    }
}
