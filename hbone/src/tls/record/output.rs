//! The sealed records of a connection that are not written yet.

use std::ops::Range;

use super::buffer::Buffer;
use super::{ALERT, sealed_length};

/// The send buffer of a connection: consecutive records. Borrows a [`Buffer`] only while it
/// contains records.
#[derive(Default)]
pub(super) struct Output {
    buffer: Option<Buffer>,
    /// The range in `buffer` of the records that are not written yet.
    unwritten: Range<usize>,
}

impl Output {
    pub(super) fn unwritten(&self) -> &[u8] {
        let buffer = self.buffer.as_deref().unwrap_or_default();
        buffer.get(self.unwritten.clone()).unwrap_or_default()
    }

    /// Returns true if a record with `content` bytes fits, and an alert after it.
    pub(super) fn fits(&mut self, content: usize) -> bool {
        self.room().len() >= sealed_length(content) + ALERT
    }

    /// The free space to seal records into.
    pub(super) fn room(&mut self) -> &mut [u8] {
        let buffer = self.buffer.get_or_insert_with(Buffer::borrow);
        buffer.get_mut(self.unwritten.end..).unwrap_or_default()
    }

    /// Marks `length` bytes of [`room`](Self::room) as a sealed record.
    pub(super) fn filled(&mut self, length: usize) {
        self.unwritten.end += length;
    }

    /// Marks `length` bytes as written to the connection.
    pub(super) fn written(&mut self, length: usize) {
        self.unwritten.start += length;
        if self.unwritten.is_empty() {
            self.unwritten = 0..0;
            self.buffer = None;
        }
    }

    /// Returns the buffer to the thread if it is empty.
    pub(super) fn release(&mut self) {
        if self.unwritten.is_empty() {
            self.written(0);
        }
    }
}
