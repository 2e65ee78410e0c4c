//! The received bytes of a connection: unopened records, and opened plaintext that the reader has
//! not taken yet.

use std::mem;
use std::ops::Range;

use rustls::{AlertDescription, ContentType, Error};

use super::buffer::{Buffer, SIZE};
use super::{Failure, HEADER, MAX_BODY, TAG};

/// The minimum free space at the end of the buffer. If less is free, the unopened bytes move to the
/// front before the next read.
const ENOUGH_ROOM: usize = SIZE / 2;

/// The receive buffer of a connection. Borrows a [`Buffer`] only while it contains data.
#[derive(Default)]
pub(super) struct Input {
    buffer: Option<Buffer>,
    /// The range in `buffer` of the unopened records.
    unread: Range<usize>,
    /// The range in `buffer` of opened plaintext, before `unread`.
    plain: Range<usize>,
    /// An incomplete record, stored here while the thread uses `buffer` for other tunnels.
    partial: Vec<u8>,
}

impl Input {
    /// `leftover`: the bytes that were read after the handshake, fewer than [`SIZE`].
    pub(super) fn new(leftover: &[u8]) -> Self {
        let mut input = Self::default();
        if !leftover.is_empty() {
            let mut buffer = Buffer::borrow();
            if let Some(front) = buffer.get_mut(..leftover.len()) {
                front.copy_from_slice(leftover);
                input.unread = 0..leftover.len();
            }
            input.buffer = Some(buffer);
        }
        input
    }

    /// The opened plaintext that the reader has not taken yet.
    pub(super) fn plain(&self) -> &[u8] {
        let buffer = self.buffer.as_deref().unwrap_or_default();
        buffer.get(self.plain.clone()).unwrap_or_default()
    }

    pub(super) fn take_plain(&mut self, length: usize) {
        self.plain.start += length;
    }

    /// The next complete record. `None` if it is incomplete. Validates the header as soon as it is
    /// available.
    pub(super) fn record(&mut self) -> Result<Option<&mut [u8]>, Failure> {
        let buffer = self.buffer.as_deref_mut().unwrap_or_default();
        let unread = buffer.get_mut(self.unread.clone()).unwrap_or_default();
        let Some(length) = body_length(unread)? else {
            return Ok(None);
        };
        Ok(unread.get_mut(..HEADER + length))
    }

    /// Consumes a record of this length.
    pub(super) fn take_record(&mut self, length: usize) {
        self.unread.start += length;
    }

    /// Consumes a record that was opened in place. Keeps its `content` bytes of plaintext for the
    /// reader.
    pub(super) fn keep_plain(&mut self, length: usize, content: usize) {
        let start = self.unread.start + HEADER;
        self.plain = start..start + content;
        self.take_record(length);
    }

    /// The free space to read into. Never empty: the caller reads only if no complete record and no
    /// plaintext is left.
    pub(super) fn room(&mut self) -> &mut [u8] {
        let buffer = self.buffer.get_or_insert_with(Buffer::borrow);
        if !self.partial.is_empty() {
            let partial = mem::take(&mut self.partial);
            if let Some(front) = buffer.get_mut(..partial.len()) {
                front.copy_from_slice(&partial);
                self.unread = 0..partial.len();
            }
        } else if self.unread.is_empty() {
            self.unread = 0..0;
        } else if buffer.len() - self.unread.end < ENOUGH_ROOM {
            buffer.copy_within(self.unread.clone(), 0);
            self.unread = 0..self.unread.len();
        }
        self.plain = 0..0;
        buffer.get_mut(self.unread.end..).unwrap_or_default()
    }

    /// Marks `length` bytes of [`room`](Self::room) as read.
    pub(super) fn filled(&mut self, length: usize) {
        self.unread.end += length;
    }

    /// Returns the buffer to the thread if it contains no complete record and no plaintext.
    pub(super) fn release(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.partial = buffer.get(self.unread.clone()).unwrap_or_default().to_vec();
            self.unread = 0..0;
        }
    }

    /// Drops all unopened records, after close_notify or a failure.
    pub(super) fn discard(&mut self) {
        self.unread.end = self.unread.start;
        self.partial = Vec::new();
        if self.plain.is_empty() {
            self.buffer = None;
            self.unread = 0..0;
        }
    }

    #[cfg(any(test, feature = "fuzz"))]
    pub(super) fn buffered(&self) -> usize {
        self.buffer.as_deref().map_or(0, <[u8]>::len) + self.partial.capacity()
    }
}

/// The length field of the record at the start of `unread`. `None` if the record is incomplete.
fn body_length(unread: &[u8]) -> Result<Option<usize>, Failure> {
    let Some((&[kind, _, _, high, low], rest)) = unread.split_first_chunk::<HEADER>() else {
        return Ok(None);
    };
    // All records after the handshake are encrypted. The AEAD authenticates the legacy version.
    if kind != u8::from(ContentType::ApplicationData) {
        return Err(Failure::new(
            AlertDescription::UnexpectedMessage,
            Error::InappropriateMessage {
                expect_types: vec![ContentType::ApplicationData],
                got_type: ContentType::from(kind),
            },
        ));
    }
    let length = usize::from(u16::from_be_bytes([high, low]));
    match length {
        ..TAG => Err(Failure::new(AlertDescription::BadRecordMac, Error::DecryptError)),
        TAG..=MAX_BODY => Ok((rest.len() >= length).then_some(length)),
        _ => Err(Failure::new(AlertDescription::RecordOverflow, Error::PeerSentOversizedRecord)),
    }
}
