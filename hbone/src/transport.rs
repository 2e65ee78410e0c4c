//! Whether what was written to a connection has left: while the connection is blocked, streams gather small writes instead of
//! queueing a frame for each.
//!
//! Not here: gathering (`stream/gather.rs`).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// The sending direction of one connection.
#[derive(Debug, Default)]
pub(crate) struct Transport {
    blocked: AtomicBool,
    waiting: Mutex<Vec<Waker>>,
}

impl Transport {
    /// Notes whether bytes are left that the connection did not take.
    pub(crate) fn set_blocked(&self, blocked: bool) {
        if self.blocked.load(Ordering::Relaxed) == blocked {
            return;
        }
        self.blocked.store(blocked, Ordering::SeqCst);
        if !blocked {
            let waiting = std::mem::take(&mut *self.waiting());
            waiting.into_iter().for_each(Waker::wake);
        }
    }

    /// Ready while the connection takes what is written to it.
    pub(crate) fn poll_free(&self, cx: &Context<'_>) -> Poll<()> {
        if !self.blocked.load(Ordering::Relaxed) {
            return Poll::Ready(());
        }
        let mut waiting = self.waiting();
        // Asked again under the lock: the one who frees it stores that before it takes the lock.
        if !self.blocked.load(Ordering::SeqCst) {
            return Poll::Ready(());
        }
        if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Waker>> {
        // What is in there is whole at any time.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures_util::task::{ArcWake, waker};

    use super::*;

    #[derive(Default)]
    struct Woken(AtomicBool);

    impl ArcWake for Woken {
        fn wake_by_ref(this: &Arc<Self>) {
            this.0.store(true, Ordering::Relaxed);
        }
    }

    #[test]
    fn blocked_transport_wakes_each_task_once_when_it_is_free() {
        let (transport, woken) = (Transport::default(), Arc::<Woken>::default());
        let waker = waker(woken.clone());
        let cx = Context::from_waker(&waker);
        assert!(transport.poll_free(&cx).is_ready());
        transport.set_blocked(true);
        assert!(transport.poll_free(&cx).is_pending() && transport.poll_free(&cx).is_pending());
        assert_eq!(transport.waiting().len(), 1);
        assert!(!woken.0.load(Ordering::Relaxed));
        transport.set_blocked(false);
        assert!(woken.0.load(Ordering::Relaxed) && transport.waiting().is_empty());
        assert!(transport.poll_free(&cx).is_ready());
    }
}
