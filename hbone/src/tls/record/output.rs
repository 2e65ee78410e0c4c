//! Sealed records that have not been written yet.

use std::ops::Range;

use super::buffer::Buffer;
use super::{ALERT, sealed_length};

/// The send buffer of a connection: contiguous records. Borrows a [`Buffer`] only while it holds
/// records.
#[derive(Default)]
pub(super) struct Output {
    buffer: Option<Buffer>,
    /// Range in `buffer` of the records that have not been written.
    unwritten: Range<usize>,
}

impl Output {
    pub(super) fn unwritten(&self) -> &[u8] {
        let buffer = self.buffer.as_deref().unwrap_or_default();
        buffer.get(self.unwritten.clone()).unwrap_or_default()
    }

    /// Whether a record with up to `content` bytes fits, and an alert behind it.
    pub(super) fn fits(&mut self, content: usize) -> bool {
        self.room().len() >= sealed_length(content) + ALERT
    }

    /// Free space to seal into.
    pub(super) fn room(&mut self) -> &mut [u8] {
        let buffer = self.buffer.get_or_insert_with(Buffer::borrow);
        buffer.get_mut(self.unwritten.end..).unwrap_or_default()
    }

    /// Records that a record of this length was sealed into [`room`](Self::room).
    pub(super) fn filled(&mut self, length: usize) {
        self.unwritten.end += length;
    }

    /// Records that `length` bytes were written to the connection.
    pub(super) fn written(&mut self, length: usize) {
        self.unwritten.start += length;
        if self.unwritten.is_empty() {
            self.unwritten = 0..0;
            self.buffer = None;
        }
    }

    /// Returns an empty buffer to the thread.
    pub(super) fn release(&mut self) {
        if self.unwritten.is_empty() {
            self.written(0);
        }
    }
}
