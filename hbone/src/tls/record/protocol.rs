//! The record protocol of both directions, without I/O: opens and seals records, and handles
//! post-handshake messages and alerts.
//!
//! ```text
//! receive   record ─ open ─┬─ application data ─▶ the reader
//!                          ├─ KeyUpdate ────────▶ next receiving key; our answer if requested
//!                          ├─ NewSessionTicket ─▶ the key schedule stores it
//!                          └─ alert ────────────▶ clean end after close_notify, otherwise an error
//! send      a KeyUpdate if one is due or the key reaches its limit, then application data
//! ```

use std::io::IoSlice;
use std::mem;

use rustls::{AlertDescription, ContentType, Error, InvalidMessage, PeerMisbehaved};

use super::aead::RecordKey;
use super::keys::{KeySchedule, Keys};
use super::messages::{self, Message, Messages};
use super::output::Output;
use super::{Failure, HEADER, MAX_CONTENT};

/// The maximum number of consecutive empty records, as in rustls. RFC 8446 section 5.1 allows empty
/// application data.
const MAX_EMPTY_RECORDS: u8 = 32;
/// The maximum number of `user_canceled` alerts, which do not end the connection. BoringSSL and
/// rustls have the same limit.
const MAX_WARNINGS: u8 = 4;
/// Alert levels. TLS 1.3 ignores them, except for `user_canceled`.
const WARNING: u8 = 1;
const FATAL: u8 = 2;
/// A slice up to this length gets its own record if a large slice follows, which is then sealed
/// without a copy. h2 passes the header of a large DATA frame as a slice of 256 bytes.
const MAX_SHORT_SLICE: usize = 1 << 10;

/// The content of an opened record.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Opened {
    /// Application data of this length, at the start of the inner plaintext.
    Data(usize),
    /// A message or alert, which is handled already.
    Control,
    /// `close_notify`: the peer sends no more data.
    Closed,
}

/// The record protocol state of both directions.
pub(super) struct RecordProtocol {
    sealing: RecordKey,
    opening: RecordKey,
    schedule: Box<dyn KeySchedule>,
    /// The maximum number of records per key.
    limit: u64,
    messages: Messages,
    /// The number of consecutive empty records.
    empty: u8,
    warnings: u8,
    /// True if a KeyUpdate must precede the next application data.
    update_due: bool,
    /// True if that KeyUpdate must request the peer's key update. Each receiving key causes one
    /// request.
    request_due: bool,
    /// True if an update of the current receiving key was requested.
    requested: bool,
}

impl RecordProtocol {
    pub(super) fn new(keys: Keys) -> Self {
        let Keys { sealing, opening, schedule, limit } = keys;
        let messages = Messages::new(schedule.takes_tickets());
        Self {
            sealing,
            opening,
            schedule,
            limit,
            messages,
            empty: 0,
            warnings: 0,
            update_due: false,
            request_due: false,
            requested: false,
        }
    }

    /// Opens a complete record in place. The plaintext starts after the record's header.
    pub(super) fn open_in_place(&mut self, record: &mut [u8]) -> Result<Opened, Failure> {
        let opened = self.opening.open_in_place(record);
        self.receive(opened.map_err(bad_record)?)
    }

    /// Opens a complete record into `plain`, whose length must be the length of the inner
    /// plaintext.
    pub(super) fn open_into(&mut self, record: &[u8], plain: &mut [u8]) -> Result<Opened, Failure> {
        self.opening.open_into(record, plain).map_err(bad_record)?;
        self.receive(plain)
    }

    /// Handles an inner plaintext: content, type and padding.
    fn receive(&mut self, plain: &[u8]) -> Result<Opened, Failure> {
        if plain.len() > MAX_CONTENT + 1 {
            let error = Error::PeerSentOversizedRecord;
            return Err(Failure::new(AlertDescription::RecordOverflow, error));
        }
        self.request_update_at_limit();
        let last = plain.iter().rposition(|byte| *byte != 0);
        let typed = last.and_then(|last| plain.get(..=last)?.split_last());
        let Some((kind, content)) = typed else {
            return Err(Failure::unexpected(PeerMisbehaved::IllegalTlsInnerPlaintext));
        };
        let kind = ContentType::from(*kind);
        if self.messages.is_partial() && kind != ContentType::Handshake {
            let error = PeerMisbehaved::MessageInterleavedWithHandshakeMessage;
            return Err(Failure::unexpected(error));
        }
        match kind {
            ContentType::ApplicationData => self.receive_data(content.len()),
            ContentType::Handshake => self.receive_messages(content),
            ContentType::Alert => self.receive_alert(content),
            got_type => Err(Failure::new(
                AlertDescription::UnexpectedMessage,
                Error::InappropriateMessage {
                    expect_types: vec![ContentType::ApplicationData, ContentType::Handshake],
                    got_type,
                },
            )),
        }
    }

    fn receive_data(&mut self, length: usize) -> Result<Opened, Failure> {
        if length > 0 {
            self.empty = 0;
            self.messages.reset_consecutive();
        } else {
            self.empty += 1;
            if self.empty > MAX_EMPTY_RECORDS {
                return Err(Failure::unexpected(PeerMisbehaved::TooManyEmptyFragments));
            }
        }
        Ok(Opened::Data(length))
    }

    fn receive_messages(&mut self, content: &[u8]) -> Result<Opened, Failure> {
        let Self { messages, schedule, opening, update_due, request_due, requested, .. } = self;
        messages.receive(content, |message| {
            match message {
                Message::NewSessionTicket(ticket) => {
                    schedule.keep_ticket(ticket).map_err(bad_ticket)?
                }
                Message::KeyUpdate { requested: is_answer_requested } => {
                    *opening = schedule.next_opening().map_err(internal)?;
                    (*requested, *request_due) = (false, false);
                    // RFC 8446 section 4.6.3: one KeyUpdate answers several requests, before the
                    // next application data.
                    *update_due |= is_answer_requested;
                }
            }
            Ok(())
        })?;
        Ok(Opened::Control)
    }

    fn receive_alert(&mut self, content: &[u8]) -> Result<Opened, Failure> {
        let &[level, description] = content else {
            let error = InvalidMessage::TrailingData("alert");
            return Err(Failure::new(AlertDescription::DecodeError, error));
        };
        let description = AlertDescription::from(description);
        let error = Error::AlertReceived(description);
        match (level, description) {
            (WARNING | FATAL, AlertDescription::CloseNotify) => Ok(Opened::Closed),
            (WARNING, AlertDescription::UserCanceled) => {
                self.warnings += 1;
                if self.warnings > MAX_WARNINGS {
                    return Err(Failure::unexpected(PeerMisbehaved::TooManyWarningAlertsReceived));
                }
                Ok(Opened::Control)
            }
            (WARNING | FATAL, _) => Err(Failure { alert: None, error }),
            _ => Err(Failure::new(AlertDescription::IllegalParameter, error)),
        }
    }

    /// Requests a key update once the peer has used its key for `limit` records.
    fn request_update_at_limit(&mut self) {
        if self.opening.sequence() >= self.limit && !self.requested {
            self.requested = true;
            self.request_due = true;
            self.update_due = true;
        }
    }

    /// Seals data of `pieces` into `output` until it is full. Returns the number of bytes, which is
    /// zero only if no record fits.
    pub(super) fn seal(
        &mut self,
        pieces: &[IoSlice<'_>],
        output: &mut Output,
    ) -> Result<usize, Error> {
        let mut plain = PlaintextCursor::new(pieces);
        let all = plain.left;
        while plain.left > 0 && output.fits(plain.left) {
            if self.update_due || self.sealing.sequence().saturating_add(1) >= self.limit {
                self.seal_key_update(output)?;
            }
            let room = output.room();
            let sealed = match plain.next_record() {
                Record::Piece(content) => {
                    self.sealing.seal(ContentType::ApplicationData, content, room)?
                }
                Record::Gather(length) => {
                    let slot = room.get_mut(HEADER..HEADER + length).ok_or(Error::EncryptError)?;
                    plain.copy_to(slot);
                    self.sealing.seal_in_place(ContentType::ApplicationData, length, room)?
                }
            };
            output.filled(sealed);
        }
        Ok(all - plain.left)
    }

    fn seal_key_update(&mut self, output: &mut Output) -> Result<(), Error> {
        let request = mem::take(&mut self.request_due);
        let (kind, message) = messages::encode_key_update(request);
        let sealed = self.sealing.seal(kind, &message, output.room())?;
        output.filled(sealed);
        self.sealing = self.schedule.next_sealing()?;
        self.update_due = false;
        Ok(())
    }

    /// Seals an alert. [`Output::fits`] keeps space for one.
    pub(super) fn seal_alert(
        &mut self,
        description: AlertDescription,
        output: &mut Output,
    ) -> Result<(), Error> {
        let level = if description == AlertDescription::CloseNotify { WARNING } else { FATAL };
        let content = [level, u8::from(description)];
        let sealed = self.sealing.seal(ContentType::Alert, &content, output.room())?;
        output.filled(sealed);
        Ok(())
    }
}

fn bad_record(error: Error) -> Failure {
    Failure::new(AlertDescription::BadRecordMac, error)
}

fn bad_ticket(error: Error) -> Failure {
    let alert = match error {
        Error::InvalidMessage(_) => AlertDescription::DecodeError,
        Error::PeerMisbehaved(_) => AlertDescription::IllegalParameter,
        _ => AlertDescription::InternalError,
    };
    Failure::new(alert, error)
}

fn internal(error: Error) -> Failure {
    Failure::new(AlertDescription::InternalError, error)
}

/// The content of the next record.
enum Record<'a> {
    /// The content is in one slice and need not be copied.
    Piece(&'a [u8]),
    /// The content is this many bytes from several slices, which must be copied together.
    Gather(usize),
}

/// A cursor over the slices to be sealed.
struct PlaintextCursor<'a> {
    /// The rest of the current slice.
    piece: &'a [u8],
    pieces: std::slice::Iter<'a, IoSlice<'a>>,
    /// The number of bytes left in all slices.
    left: usize,
}

impl<'a> PlaintextCursor<'a> {
    fn new(pieces: &'a [IoSlice<'a>]) -> Self {
        let left = pieces.iter().map(|piece| piece.len()).sum();
        Self { piece: &[], pieces: pieces.iter(), left }
    }

    /// Selects the content of the next record. Takes it if it is in one slice; otherwise the caller
    /// must copy it.
    fn next_record(&mut self) -> Record<'a> {
        self.skip_empty();
        let next = self.pieces.as_slice().first().map_or(0, |next| next.len());
        let is_separate = self.piece.len() <= MAX_SHORT_SLICE && next >= MAX_CONTENT;
        if self.piece.len() < MAX_CONTENT.min(self.left) && !is_separate {
            return Record::Gather(self.left.min(MAX_CONTENT));
        }
        Record::Piece(self.take(MAX_CONTENT))
    }

    fn copy_to(&mut self, mut slot: &mut [u8]) {
        while !slot.is_empty() && self.left > 0 {
            self.skip_empty();
            let piece = self.take(slot.len());
            let (front, rest) = slot.split_at_mut(piece.len());
            front.copy_from_slice(piece);
            slot = rest;
        }
    }

    fn take(&mut self, at_most: usize) -> &'a [u8] {
        let length = self.piece.len().min(at_most);
        let (taken, rest) = self.piece.split_at(length);
        self.piece = rest;
        self.left -= length;
        taken
    }

    fn skip_empty(&mut self) {
        while self.piece.is_empty()
            && let Some(next) = self.pieces.next()
        {
            self.piece = next;
        }
    }
}
