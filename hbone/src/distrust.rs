//! How whoever uses a tunnel learns at once that its peer is not to be trusted any longer, without asking at every turn.
//!
//! Not here: who is trusted (`revocation.rs`).

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use slab::Slab;

use crate::HboneError;
use crate::link::Link;

/// Whether the peer of a tunnel is distrusted, and whom to tell.
#[derive(Debug, Default)]
pub(crate) struct Distrusted {
    told: AtomicBool,
    waiting: Mutex<Slab<Waker>>,
}

/// Waits until the peer of a tunnel is not to be trusted any longer; never ends if that never is.
///
/// To ask again is one read: the task that waits is noted once, and no lock is taken as long as it stays the same one.
#[derive(Debug)]
pub struct Distrust {
    link: Arc<Link>,
    noted: Option<(usize, Waker)>,
}

impl Distrusted {
    /// Tells all who wait, and all who come later.
    pub(crate) fn tell(&self) {
        self.told.store(true, Ordering::SeqCst);
        let waiting: Vec<_> = self.waiting().iter().map(|(_, waker)| waker.clone()).collect();
        // Not under the lock, which they may take.
        waiting.into_iter().for_each(Waker::wake);
    }

    fn is_told(&self) -> bool {
        self.told.load(Ordering::SeqCst)
    }

    fn waiting(&self) -> MutexGuard<'_, Slab<Waker>> {
        // What is in there is whole at any time.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Distrust {
    pub(crate) fn of(link: Arc<Link>) -> Self {
        Self { link, noted: None }
    }

    fn note(&mut self, waker: &Waker) {
        if self.noted.as_ref().is_some_and(|(_, noted)| noted.will_wake(waker)) {
            return;
        }
        self.forget();
        let key = self.link.trust().waiting().insert(waker.clone());
        self.noted = Some((key, waker.clone()));
    }

    fn forget(&mut self) {
        if let Some((key, _)) = self.noted.take() {
            self.link.trust().waiting().try_remove(key);
        }
    }
}

impl Future for Distrust {
    type Output = HboneError;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<HboneError> {
        self.note(cx.waker());
        // Asked last: whoever tells has set it before it looks whom to wake.
        if self.link.trust().is_told() { Poll::Ready(self.link.lost(None)) } else { Poll::Pending }
    }
}

impl Drop for Distrust {
    fn drop(&mut self) {
        self.forget();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::future::poll_immediate;

    use super::*;
    use crate::testing::Mesh;

    #[tokio::test]
    async fn all_who_wait_are_told_and_nobody_is_noted_who_has_gone() {
        let (tunnel, _server) = Mesh::new().tunnel().await;
        let link = tunnel.link();
        let noted = || link.trust().waiting().len();
        let (mut one, mut gone) = (Distrust::of(link.clone()), Distrust::of(link.clone()));
        for _ in 0..2 {
            assert!(poll_immediate(&mut one).await.is_none());
            assert!(poll_immediate(&mut gone).await.is_none());
        }
        assert_eq!(noted(), 2, "each is noted once");
        drop(gone);
        assert_eq!(noted(), 1);
        let waiting = tokio::spawn(one);
        tokio::task::yield_now().await;
        assert_eq!(noted(), 1, "another task takes its place");
        link.distrust(HboneError::Revoked);
        assert!(matches!(waiting.await.unwrap(), HboneError::Revoked));
        assert!(matches!(Distrust::of(link.clone()).await, HboneError::Revoked));
        assert_eq!(noted(), 0);
    }
}
