//! Sealed records that wait for their system call.

use std::ops::Range;

use super::buffer::Buffer;
use super::records::{ALERT, sealed_length};

/// Records side by side. Holds a buffer only while it holds records.
#[derive(Default)]
pub(super) struct Output {
    buffer: Option<Buffer>,
    /// In `buffer`: what was not written.
    unwritten: Range<usize>,
}

impl Output {
    pub(super) fn unwritten(&self) -> &[u8] {
        let buffer = self.buffer.as_deref().unwrap_or_default();
        buffer.get(self.unwritten.clone()).unwrap_or_default()
    }

    /// Whether there is room for the next record of so much content, or for a full one, and for an alert after it.
    pub(super) fn fits(&mut self, content: usize) -> bool {
        self.room().len() >= sealed_length(content) + ALERT
    }

    /// Where to seal to.
    pub(super) fn room(&mut self) -> &mut [u8] {
        let buffer = self.buffer.get_or_insert_with(Buffer::borrow);
        buffer.get_mut(self.unwritten.end..).unwrap_or_default()
    }

    /// Notes that a record of this length was sealed to the room.
    pub(super) fn filled(&mut self, length: usize) {
        self.unwritten.end += length;
    }

    /// Notes that the connection has taken so much.
    pub(super) fn written(&mut self, length: usize) {
        self.unwritten.start += length;
        if self.unwritten.is_empty() {
            self.unwritten = 0..0;
            self.buffer = None;
        }
    }

    /// Gives back a buffer that nothing was sealed to.
    pub(super) fn release(&mut self) {
        if self.unwritten.is_empty() {
            self.written(0);
        }
    }
}
