//! What came from the peer and was not delivered: whole and partial records, and the plaintext of one that did not fit.

use std::mem;
use std::ops::Range;

use rustls::{AlertDescription, ContentType, Error};

use super::buffer::{Buffer, SIZE};
use super::{Failure, HEADER, MAX_BODY, TAG};

/// While as much is free behind the last bytes, more is read there, and what is unread is not moved to the front.
const ENOUGH_ROOM: usize = SIZE / 2;

/// The bytes of a peer. Holds a buffer only while it holds bytes that may be taken now.
#[derive(Default)]
pub(super) struct Input {
    buffer: Option<Buffer>,
    /// In `buffer`: what was not taken.
    unread: Range<usize>,
    /// In `buffer`, before `unread`: content of an opened record.
    plain: Range<usize>,
    /// The start of a record whose rest the peer has not sent yet, when `buffer` was given back.
    partial: Vec<u8>,
}

impl Input {
    /// With what was read together with the end of the handshake, which is less than a buffer.
    pub(super) fn new(early: &[u8]) -> Self {
        let mut input = Self::default();
        if !early.is_empty() {
            let mut buffer = Buffer::borrow();
            if let Some(front) = buffer.get_mut(..early.len()) {
                front.copy_from_slice(early);
                input.unread = 0..early.len();
            }
            input.buffer = Some(buffer);
        }
        input
    }

    /// Opened content that waits to be delivered.
    pub(super) fn plain(&self) -> &[u8] {
        let buffer = self.buffer.as_deref().unwrap_or_default();
        buffer.get(self.plain.clone()).unwrap_or_default()
    }

    pub(super) fn take_plain(&mut self, length: usize) {
        self.plain.start += length;
    }

    /// The next record, if it is whole. Judges its header as soon as that is there.
    pub(super) fn record(&mut self) -> Result<Option<&mut [u8]>, Failure> {
        let buffer = self.buffer.as_deref_mut().unwrap_or_default();
        let unread = buffer.get_mut(self.unread.clone()).unwrap_or_default();
        let Some(length) = body_length(unread)? else {
            return Ok(None);
        };
        Ok(unread.get_mut(..HEADER + length))
    }

    /// Takes a record of this length.
    pub(super) fn take_record(&mut self, length: usize) {
        self.unread.start += length;
    }

    /// The same, and keeps `content` bytes of content that it has after its header.
    pub(super) fn keep_plain(&mut self, length: usize, content: usize) {
        let start = self.unread.start + HEADER;
        self.plain = start..start + content;
        self.take_record(length);
    }

    /// Where to read to. At most a partial record is unread by then, and no plaintext, so that there is always room.
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

    /// Notes that `length` bytes were read to the room.
    pub(super) fn filled(&mut self, length: usize) {
        self.unread.end += length;
    }

    /// Gives the buffer back while nothing comes.
    pub(super) fn release(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.partial = buffer.get(self.unread.clone()).unwrap_or_default().to_vec();
            self.unread = 0..0;
        }
    }

    /// Drops all that is unread: the peer has said that it is done, or it has failed.
    pub(super) fn discard(&mut self) {
        self.unread.end = self.unread.start;
        self.partial = Vec::new();
        if self.plain.is_empty() {
            self.buffer = None;
            self.unread = 0..0;
        }
    }

    #[cfg(any(test, feature = "fuzz"))]
    pub(super) fn held(&self) -> usize {
        self.buffer.as_deref().map_or(0, <[u8]>::len) + self.partial.capacity()
    }
}

/// How long the record is that starts here, without its header; `None` if that is not known yet, or not all of it has come.
fn body_length(unread: &[u8]) -> Result<Option<usize>, Failure> {
    let Some((&[kind, _, _, high, low], rest)) = unread.split_first_chunk::<HEADER>() else {
        return Ok(None);
    };
    // After the handshake every record is encrypted, which it claims by this type. The AEAD judges the version.
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
