//! How much memory the buffers of busy connections may take, and how many descriptors their pipes.
//!
//! Counted is what a connection holds of its own accord beyond a first small read: the copy's
//! buffers, and what may be in its pipes. Not counted is what is bounded elsewhere: the kernel's
//! socket buffers, and what HTTP/2 has received or queued for a stream (its windows and its send
//! buffer; a queued byte can keep the whole read that it came in alive).

use std::sync::Arc;

use metrics::Gauge;
use underpass_hbone::{Budget, Sharing};

use super::descriptors::{Descriptors, FdPermit};
use crate::observe::metrics::{buffer_bytes, buffer_refused};

/// The memory for the buffers of a pod's connections. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Buffers {
    budget: Arc<Budget>,
    gauge: Gauge,
    descriptors: Descriptors,
}

impl std::fmt::Debug for Buffers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffers").field("budget", &self.budget).finish_non_exhaustive()
    }
}

impl Buffers {
    /// `limits.buffers`, in bytes; pipes take some of `descriptors`.
    pub(crate) fn new(limit: usize, descriptors: Descriptors) -> Self {
        Self { budget: Arc::new(Budget::new(limit)), gauge: buffer_bytes(), descriptors }
    }

    /// The share of one more pod.
    pub(super) fn of_pod(&self) -> Self {
        let budget = Budget::part(&self.budget, usize::MAX, Sharing::Members);
        Self { budget: Arc::new(budget), ..self.clone() }
    }

    /// The descriptors of a pipe.
    pub(crate) fn pipe_ends(&self) -> Option<FdPermit> {
        self.descriptors.spare(2)
    }

    fn take(&self, bytes: usize) -> bool {
        let taken = self.budget.take(bytes).is_ok();
        if taken {
            self.gauge.increment(bytes as f64);
        }
        taken
    }

    fn give_back(&self, bytes: usize) {
        self.budget.give_back(bytes);
        self.gauge.decrement(bytes as f64);
    }

    /// With more descriptors than are needed.
    #[cfg(test)]
    pub(crate) fn of(limit: usize) -> Self {
        Self::new(limit, Descriptors::new(1 << 20, 0, 1))
    }

    #[cfg(test)]
    pub(crate) fn used(&self) -> usize {
        self.budget.used()
    }
}

/// What one direction of a connection has of it; given back when this is dropped.
///
/// Taken when a buffer grows, and not for every read: thousands of connections must not compete for
/// one cache line.
pub(crate) struct BufferShare<'a> {
    buffers: &'a Buffers,
    bytes: usize,
}

impl<'a> BufferShare<'a> {
    pub(crate) fn buffers(&self) -> &'a Buffers {
        self.buffers
    }

    pub(crate) fn none_of(buffers: &'a Buffers) -> Self {
        Self { buffers, bytes: 0 }
    }

    /// Makes it `bytes`, unless that is more than it was and more than is left: then it stays as it was, which is counted.
    pub(crate) fn resize(&mut self, bytes: usize) -> bool {
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

impl Drop for BufferShare<'_> {
    fn drop(&mut self) {
        self.resize(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_shares_up_to_the_limit_and_again_what_came_back() {
        let buffers = Buffers::of(100);
        let (mut one, mut other) = (BufferShare::none_of(&buffers), BufferShare::none_of(&buffers));
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
    fn refuses_more_than_can_be_counted() {
        let buffers = Buffers::of(usize::MAX);
        let mut share = BufferShare::none_of(&buffers);
        assert!(share.resize(1));
        assert!(!BufferShare::none_of(&buffers).resize(usize::MAX));
    }
}
