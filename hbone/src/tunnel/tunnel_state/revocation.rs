//! Signals to all users of a tunnel that its peer is no longer trusted. Polling costs one atomic
//! load.
//!
//! `crate::trust::revocation` decides whether a peer is trusted.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use slab::Slab;

use super::TunnelState;
use crate::error::HboneError;

/// Whether a tunnel's peer is no longer trusted, and the tasks that wait for that.
#[derive(Debug, Default)]
pub(crate) struct Revocation {
    is_revoked: AtomicBool,
    waiting: Mutex<Slab<Waker>>,
}

/// Completes when the peer of a tunnel is no longer trusted. Returns the reason.
///
/// A waiting task registers once. Polling again from the same task takes no lock.
#[derive(Debug)]
pub struct RevocationSignal {
    tunnel_state: Arc<TunnelState>,
    registered: Option<(usize, Waker)>,
}

impl Revocation {
    /// Wakes all waiting tasks. Later waits complete at once.
    pub(crate) fn signal(&self) {
        self.is_revoked.store(true, Ordering::SeqCst);
        let waiting: Vec<_> = self.waiting().iter().map(|(_, waker)| waker.clone()).collect();
        // Wake outside of the lock, which the tasks may take.
        waiting.into_iter().for_each(Waker::wake);
    }

    fn is_revoked(&self) -> bool {
        self.is_revoked.load(Ordering::SeqCst)
    }

    fn waiting(&self) -> MutexGuard<'_, Slab<Waker>> {
        // A panic cannot leave the contents inconsistent.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RevocationSignal {
    pub(super) fn new(tunnel_state: Arc<TunnelState>) -> Self {
        Self { tunnel_state, registered: None }
    }

    fn register(&mut self, waker: &Waker) {
        if self.registered.as_ref().is_some_and(|(_, registered)| registered.will_wake(waker)) {
            return;
        }
        self.deregister();
        let key = self.tunnel_state.revocation.waiting().insert(waker.clone());
        self.registered = Some((key, waker.clone()));
    }

    fn deregister(&mut self) {
        if let Some((key, _)) = self.registered.take() {
            self.tunnel_state.revocation.waiting().try_remove(key);
        }
    }
}

impl Future for RevocationSignal {
    type Output = HboneError;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<HboneError> {
        self.register(cx.waker());
        // Check after registering: `signal` sets the flag before it wakes.
        if self.tunnel_state.revocation.is_revoked() {
            Poll::Ready(self.tunnel_state.lost(None))
        } else {
            Poll::Pending
        }
    }
}

impl Drop for RevocationSignal {
    fn drop(&mut self) {
        self.deregister();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::future::poll_immediate;

    use super::*;
    use crate::testing::Mesh;

    #[tokio::test]
    async fn revocation_signal_wakes_all_tasks_and_keeps_no_waker() {
        let (tunnel, _server) = Mesh::new().tunnel().await;
        let tunnel_state = tunnel.tunnel_state();
        let registered = || tunnel_state.revocation.waiting().len();
        let (mut one, mut gone) = (
            RevocationSignal::new(tunnel_state.clone()),
            RevocationSignal::new(tunnel_state.clone()),
        );
        for _ in 0..2 {
            assert!(poll_immediate(&mut one).await.is_none());
            assert!(poll_immediate(&mut gone).await.is_none());
        }
        assert_eq!(registered(), 2, "each registers once");
        drop(gone);
        assert_eq!(registered(), 1);
        let waiting = tokio::spawn(one);
        tokio::task::yield_now().await;
        assert_eq!(registered(), 1, "another task takes its place");
        tunnel_state.revoke(HboneError::Revoked);
        assert!(matches!(waiting.await.unwrap(), HboneError::Revoked));
        assert!(matches!(RevocationSignal::new(tunnel_state.clone()).await, HboneError::Revoked));
        assert_eq!(registered(), 0);
    }
}
