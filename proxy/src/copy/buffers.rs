//! How much memory the buffers of busy connections may take, of all workers together, and how many descriptors their pipes.
//!
//! Counted is what a connection holds of its own accord beyond a first small read: the copy's buffers, and what may be in its pipes.
//! Not counted is what is bounded elsewhere: the kernel's socket buffers, and what HTTP/2 has received or queued for a stream
//! (its windows and its send buffer; a queued byte can keep the whole read that it came in alive).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use metrics::Gauge;

use crate::descriptors::{Descriptors, Held};
use crate::metrics::{buffer_bytes, buffer_refused};

/// The memory for all buffers. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Buffers(Arc<Budget>);

struct Budget {
    limit: usize,
    used: AtomicUsize,
    gauge: Gauge,
    descriptors: Descriptors,
}

impl std::fmt::Debug for Buffers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffers").field("limit", &self.0.limit).finish_non_exhaustive()
    }
}

impl Buffers {
    /// `limits.buffers`, in bytes; pipes take some of `descriptors`.
    pub(crate) fn new(limit: usize, descriptors: Descriptors) -> Self {
        let (used, gauge) = (AtomicUsize::new(0), buffer_bytes());
        Self(Arc::new(Budget { limit, used, gauge, descriptors }))
    }

    /// The descriptors of a pipe.
    pub(super) fn pipe_ends(&self) -> Option<Held> {
        self.0.descriptors.spare(2)
    }

    fn take(&self, bytes: usize) -> bool {
        let Budget { limit, used, gauge, .. } = &*self.0;
        let fits = |used: usize| used.checked_add(bytes).filter(|sum| sum <= limit);
        let taken = used.fetch_update(Relaxed, Relaxed, fits).is_ok();
        if taken {
            gauge.increment(bytes as f64);
        }
        taken
    }

    fn give_back(&self, bytes: usize) {
        self.0.used.fetch_sub(bytes, Relaxed);
        self.0.gauge.decrement(bytes as f64);
    }

    /// With as many descriptors as anybody could want.
    #[cfg(test)]
    pub(super) fn of(limit: usize) -> Self {
        Self::new(limit, Descriptors::new(1 << 20, 0, 1))
    }

    #[cfg(test)]
    pub(super) fn used(&self) -> usize {
        self.0.used.load(Relaxed)
    }
}

/// What one direction of a connection has of it; given back when this is dropped.
///
/// Asked for when a buffer grows, and not for every read: thousands of connections must not fight for one cache line.
pub(super) struct Share<'a> {
    buffers: &'a Buffers,
    bytes: usize,
}

impl<'a> Share<'a> {
    pub(super) fn buffers(&self) -> &'a Buffers {
        self.buffers
    }

    pub(super) fn none_of(buffers: &'a Buffers) -> Self {
        Self { buffers, bytes: 0 }
    }

    /// Makes it `bytes`, unless that is more than it was and more than there is left: then it stays as it was, which is counted.
    pub(super) fn resize(&mut self, bytes: usize) -> bool {
        if bytes > self.bytes && !self.buffers.take(bytes - self.bytes) {
            buffer_refused("limit");
            return false;
        }
        if bytes < self.bytes {
            self.buffers.give_back(self.bytes - bytes);
        }
        self.bytes = bytes;
        true
    }
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        self.resize(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_given_until_there_is_no_more_and_again_when_some_came_back() {
        let buffers = Buffers::of(100);
        let (mut one, mut other) = (Share::none_of(&buffers), Share::none_of(&buffers));
        assert!(one.resize(60));
        assert!(!other.resize(41), "more than is left");
        assert_eq!(buffers.used(), 60);
        assert!(other.resize(40));
        assert!(!one.resize(61));
        assert!(one.resize(20));
        assert!(other.resize(80));
        assert_eq!(buffers.used(), 100);
        drop(one);
        drop(other);
        assert_eq!(buffers.used(), 0);
    }

    #[test]
    fn what_can_never_be_is_refused_too() {
        let buffers = Buffers::of(usize::MAX);
        let mut share = Share::none_of(&buffers);
        assert!(share.resize(1));
        assert!(!Share::none_of(&buffers).resize(usize::MAX));
    }
}
