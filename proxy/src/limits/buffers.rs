//! Limits the memory for buffers of busy connections, and the descriptors for their pipes.
//!
//! It counts relay buffers beyond a first small read, and the capacity of pipes. Other limits cover
//! the kernel's socket buffers, and HTTP/2's receive windows and send buffers, where a queued byte
//! can keep the entire buffer of its read alive.

use std::sync::Arc;

use metrics::Gauge;
use underpass_hbone::{Budget, Sharing};

use super::descriptors::{Descriptors, FdPermit};
use crate::observe::metrics::{buffer_bytes, buffer_refused};

/// The memory for the buffers of a pod's connections. Clones share the counts.
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
    /// A budget of `limits.buffers` bytes. Pipes take spare `descriptors`.
    pub(crate) fn new(limit: usize, descriptors: Descriptors) -> Self {
        Self { budget: Arc::new(Budget::new(limit)), gauge: buffer_bytes(), descriptors }
    }

    /// The bytes of all pods.
    pub(super) fn budget(&self) -> &Budget {
        &self.budget
    }

    /// Creates the share of a pod.
    pub(super) fn of_pod(&self) -> Self {
        let budget = Budget::part(&self.budget, usize::MAX, Sharing::KnownParts);
        Self { budget: Arc::new(budget), ..self.clone() }
    }

    /// The descriptors of a pipe; `None` if connections need them.
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

    /// A test budget with enough descriptors.
    #[cfg(test)]
    pub(crate) fn of(limit: usize) -> Self {
        Self::new(limit, Descriptors::new(1 << 20, 0, 1))
    }

    #[cfg(test)]
    pub(crate) fn used(&self) -> usize {
        self.budget.used()
    }
}

/// The share of one direction of a connection, released on drop.
///
/// It changes when a buffer grows and not on every read, so that connections do not contend for one
/// cache line.
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

    /// Resizes the share to `bytes`. If too few bytes are free, counts the refusal, keeps the size
    /// and returns false.
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
    fn grants_buffers_up_to_limit_and_again_after_release() {
        let buffers = Buffers::of(100);
        let (mut one, mut other) = (BufferShare::none_of(&buffers), BufferShare::none_of(&buffers));
        assert!(one.resize(60));
        assert!(!other.resize(41), "only 40 bytes are free");
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
    fn refuses_buffer_size_beyond_integer_range() {
        let buffers = Buffers::of(usize::MAX);
        let mut share = BufferShare::none_of(&buffers);
        assert!(share.resize(1));
        assert!(!BufferShare::none_of(&buffers).resize(usize::MAX));
    }
}
