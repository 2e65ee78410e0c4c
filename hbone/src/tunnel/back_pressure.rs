//! Tracks whether writes to a connection are blocked. While they are, streams gather small writes
//! (`stream::gather`) instead of queueing a frame for each.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// The sending direction of one connection.
#[derive(Debug, Default)]
pub(crate) struct BackPressure {
    blocked: AtomicBool,
    /// One waker for each waiting stream, removed when the stream ends.
    waiting: Mutex<HashMap<u32, Waker>>,
}

impl BackPressure {
    /// Records whether the connection is blocked with unsent bytes.
    pub(crate) fn set_blocked(&self, blocked: bool) {
        if self.blocked.load(Ordering::Relaxed) == blocked {
            return;
        }
        self.blocked.store(blocked, Ordering::SeqCst);
        if !blocked {
            let waiting = std::mem::take(&mut *self.waiting());
            waiting.into_values().for_each(Waker::wake);
        }
    }

    /// Ready while the connection is not blocked. Otherwise registers the task of `stream` to be
    /// woken.
    pub(crate) fn poll_writable(&self, stream: u32, cx: &Context<'_>) -> Poll<()> {
        if !self.blocked.load(Ordering::Relaxed) {
            return Poll::Ready(());
        }
        let mut waiting = self.waiting();
        // Check again under the lock: `set_blocked` stores the flag before it takes the lock.
        if !self.blocked.load(Ordering::SeqCst) {
            return Poll::Ready(());
        }
        waiting.insert(stream, cx.waker().clone());
        Poll::Pending
    }

    /// Removes the waker of a stream that has ended.
    pub(crate) fn remove_stream(&self, stream: u32) {
        // Drop the waker outside of the lock: dropping it may drop its task.
        let _waker = self.waiting().remove(&stream);
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u32, Waker>> {
        // No code panics while it holds the lock.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures_util::task::{ArcWake, waker};

    use super::*;

    #[derive(Default)]
    struct WakeFlag(AtomicBool);

    impl ArcWake for WakeFlag {
        fn wake_by_ref(this: &Arc<Self>) {
            this.0.store(true, Ordering::Relaxed);
        }
    }

    #[test]
    fn wakes_each_waiting_stream_once_when_it_is_writable() {
        let (pressure, woken) = (BackPressure::default(), Arc::<WakeFlag>::default());
        let waker = waker(woken.clone());
        let cx = Context::from_waker(&waker);
        let poll = |stream: u32| pressure.poll_writable(stream, &cx);
        assert!(poll(1).is_ready());
        pressure.set_blocked(true);
        assert!(poll(1).is_pending() && poll(1).is_pending());
        assert_eq!(pressure.waiting().len(), 1);
        assert!(!woken.0.load(Ordering::Relaxed));
        pressure.set_blocked(false);
        assert!(woken.0.load(Ordering::Relaxed) && pressure.waiting().is_empty());
        assert!(poll(1).is_ready());
    }

    #[test]
    fn stream_that_ended_while_blocked_leaves_no_waker() {
        let (pressure, woken) = (BackPressure::default(), Arc::<WakeFlag>::default());
        pressure.set_blocked(true);
        for stream in (1..2000_u32).step_by(2) {
            let waker = waker(woken.clone());
            let cx = Context::from_waker(&waker);
            assert!(pressure.poll_writable(stream, &cx).is_pending());
            pressure.remove_stream(stream);
        }
        assert!(pressure.waiting().is_empty());
        assert_eq!(Arc::strong_count(&woken), 1, "no task is kept");
    }
}
