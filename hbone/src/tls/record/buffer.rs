//! Large buffers that the tunnels of one thread share.
//!
//! A thread polls one tunnel at a time, and a tunnel usually returns its buffers before the thread
//! polls the next one. Two buffers therefore serve all tunnels of a thread, stay in its L2 cache,
//! and are zeroed once instead of at each use.

use std::cell::RefCell;
use std::mem;
use std::ops::{Deref, DerefMut};

use super::MAX_SEALED;

/// A sealed DATA frame of 128 KiB: eight full records, and a small one with the frame header.
pub(super) const SIZE: usize = 9 * MAX_SEALED;

/// Buffers that a thread keeps: one to read into, one to write from.
const SPARE: usize = 2;

thread_local! {
    static SPARES: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of [`SIZE`] bytes. Its contents are arbitrary: it may hold bytes of an earlier
/// borrower.
pub(super) struct Buffer(Box<[u8]>);

impl Buffer {
    pub(super) fn borrow() -> Self {
        let spare = SPARES.try_with(|spares| spares.borrow_mut().pop()).ok().flatten();
        Self(spare.unwrap_or_else(|| vec![0; SIZE].into_boxed_slice()))
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let buffer = mem::take(&mut self.0);
        // Fails only during the destruction of thread-locals; the closure then frees the buffer.
        let _ends = SPARES.try_with(|spares| {
            let mut spares = spares.borrow_mut();
            if spares.len() < SPARE {
                spares.push(buffer);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reuses_the_buffers_of_a_thread_and_keeps_few() {
        let held = [(); SPARE + 2].map(|()| Buffer::borrow());
        let last = held[SPARE - 1].as_ptr();
        drop(held);
        assert_eq!(SPARES.with_borrow(Vec::len), SPARE);
        assert_eq!(Buffer::borrow().as_ptr(), last);
    }
}
