//! Large buffers that the tunnels of one thread share: whoever has bytes to hold borrows one.
//!
//! A thread drives one tunnel at a time, and a tunnel mostly gives its buffers back before the thread turns to the next: so two
//! of them serve all tunnels of a thread, stay in its cache, and are cleared once and not for each use.

use std::cell::RefCell;
use std::mem;
use std::ops::{Deref, DerefMut};

use super::MAX_SEALED;

/// What h2 hands over for a DATA frame of 128 KiB, sealed: eight full records, and its header in a small one.
pub(super) const SIZE: usize = 9 * MAX_SEALED;

/// One to read into, one to write from.
const SPARE: usize = 2;

thread_local! {
    static SPARES: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of [`SIZE`] bytes, with whatever its last borrower left in it.
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
        // Fails only while the thread ends, and then the buffer is freed with the closure.
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
