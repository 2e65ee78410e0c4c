//! Large buffers that all tunnels of a thread share.
//!
//! A thread polls one tunnel at a time, and a tunnel usually returns its buffers before the thread
//! polls the next one. Two buffers are therefore enough for a thread. They stay in its L2 cache,
//! and are zeroed only once.

use std::cell::RefCell;
use std::mem;
use std::ops::{Deref, DerefMut};

use super::MAX_SEALED;

/// The size of a buffer. A sealed DATA frame of 128 KiB takes nine records: eight full ones, and a
/// small one with the frame header. The space of a tenth record puts this buffer into another size
/// class of the allocator than h2's buffers of such frames. In the same class, the few buffers that
/// a thread keeps would prevent the allocator from returning the memory of all freed frames, some 3
/// MiB for each thread.
pub(super) const SIZE: usize = 10 * MAX_SEALED;

/// The size class of mimalloc that holds a DATA frame of 128 KiB with its header.
const SIZE_CLASS_OF_FRAMES: usize = 160 * 1024;
const _: () = assert!(SIZE > SIZE_CLASS_OF_FRAMES);

/// The number of buffers that a thread keeps: one for reading, one for writing.
const MAX_FREE_BUFFERS: usize = 2;

thread_local! {
    static FREE_BUFFERS: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of [`SIZE`] bytes. It may contain bytes of a previous user.
pub(super) struct Buffer(Box<[u8]>);

impl Buffer {
    pub(super) fn borrow() -> Self {
        let free_buffer =
            FREE_BUFFERS.try_with(|free_buffers| free_buffers.borrow_mut().pop()).ok().flatten();
        Self(free_buffer.unwrap_or_else(|| vec![0; SIZE].into_boxed_slice()))
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
        // Fails only while thread-locals are destroyed. The closure then frees the buffer.
        let _ends = FREE_BUFFERS.try_with(|free_buffers| {
            let mut free_buffers = free_buffers.borrow_mut();
            if free_buffers.len() < MAX_FREE_BUFFERS {
                free_buffers.push(buffer);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thread_reuses_its_buffers_and_keeps_at_most_two() {
        let buffered = [(); MAX_FREE_BUFFERS + 2].map(|()| Buffer::borrow());
        let last = buffered[MAX_FREE_BUFFERS - 1].as_ptr();
        drop(buffered);
        assert_eq!(FREE_BUFFERS.with_borrow(Vec::len), MAX_FREE_BUFFERS);
        assert_eq!(Buffer::borrow().as_ptr(), last);
    }
}
