//! Reassembles post-handshake messages (RFC 8446 section 4.6). A message may span records, and a
//! record may contain several messages.

use std::mem;

use rustls::{AlertDescription, ContentType, Error, HandshakeType, InvalidMessage, PeerMisbehaved};

use super::Failure;

/// The length of a handshake header: type and 24-bit length.
const HEADER: usize = 4;
/// The maximum length of a message, as in rustls. A ticket has at most 64 KiB.
const MAX_LENGTH: usize = 0xffff;
/// The maximum number of consecutive messages without application data. BoringSSL and rustls have
/// the same limit for key updates.
const MAX_CONSECUTIVE_MESSAGES: u8 = 32;

/// A post-handshake message.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Message<'a> {
    NewSessionTicket(&'a [u8]),
    KeyUpdate { requested: bool },
}

/// Reassembles the post-handshake messages of one connection.
#[derive(Debug)]
pub(super) struct Messages {
    /// True if the peer is a server, which may send tickets.
    allows_tickets: bool,
    /// An incomplete message, which the next record continues.
    partial: Vec<u8>,
    in_a_row: u8,
}

impl Messages {
    pub(super) fn new(allows_tickets: bool) -> Self {
        Self { allows_tickets, partial: Vec::new(), in_a_row: 0 }
    }

    /// Returns true after an incomplete message: the next record must continue it.
    pub(super) fn is_partial(&self) -> bool {
        !self.partial.is_empty()
    }

    /// Resets the limit of consecutive messages, after application data.
    pub(super) fn reset_consecutive(&mut self) {
        self.in_a_row = 0;
    }

    /// Receives the content of a handshake record. Passes each complete message to `take`.
    pub(super) fn receive(
        &mut self,
        content: &[u8],
        take: impl FnMut(Message<'_>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        if content.is_empty() {
            // RFC 8446 section 5.4: a handshake record must not be empty.
            let error = InvalidMessage::InvalidEmptyPayload;
            return Err(Failure::new(AlertDescription::UnexpectedMessage, error));
        }
        if !self.is_partial() {
            let taken = self.take_whole(content, take)?;
            self.partial.extend_from_slice(content.get(taken..).unwrap_or_default());
            return Ok(());
        }
        let mut partial = mem::take(&mut self.partial);
        partial.extend_from_slice(content);
        let taken = self.take_whole(&partial, take)?;
        if taken < partial.len() {
            partial.drain(..taken);
            self.partial = partial;
        }
        Ok(())
    }

    /// Passes all complete messages to `take`. Returns their total length.
    fn take_whole(
        &mut self,
        content: &[u8],
        mut take: impl FnMut(Message<'_>) -> Result<(), Failure>,
    ) -> Result<usize, Failure> {
        let mut rest = content;
        while let Some((kind, body, after)) = self.split(rest)? {
            self.in_a_row += 1;
            if self.in_a_row > MAX_CONSECUTIVE_MESSAGES {
                return Err(Failure::unexpected(PeerMisbehaved::TooManyKeyUpdateRequests));
            }
            let message = match kind {
                HandshakeType::KeyUpdate => key_update(body)?,
                _ => Message::NewSessionTicket(body),
            };
            // RFC 8446 section 5.1: a record must end after a key update.
            if kind == HandshakeType::KeyUpdate && !after.is_empty() {
                return Err(Failure::unexpected(PeerMisbehaved::KeyEpochWithPendingFragment));
            }
            take(message)?;
            rest = after;
        }
        Ok(content.len() - rest.len())
    }

    /// Splits the first message into type and body, and returns the bytes after it. `None` if the
    /// message is incomplete. Validates type and length as soon as they are available.
    #[expect(clippy::type_complexity, reason = "read in one place only")]
    fn split<'a>(
        &self,
        content: &'a [u8],
    ) -> Result<Option<(HandshakeType, &'a [u8], &'a [u8])>, Failure> {
        let Some(kind) = content.first().copied().map(HandshakeType::from) else {
            return Ok(None);
        };
        let expected = match kind {
            HandshakeType::KeyUpdate => true,
            HandshakeType::NewSessionTicket => self.allows_tickets,
            _ => false,
        };
        if !expected {
            return Err(self.inappropriate(kind));
        }
        let Some((&[_, high, middle, low], rest)) = content.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes([0, high, middle, low]);
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let fits = match kind {
            HandshakeType::KeyUpdate => length == 1,
            _ => length <= MAX_LENGTH,
        };
        if !fits {
            let error = InvalidMessage::HandshakePayloadTooLarge;
            return Err(Failure::new(AlertDescription::DecodeError, error));
        }
        Ok(rest.split_at_checked(length).map(|(body, after)| (kind, body, after)))
    }

    fn inappropriate(&self, got_type: HandshakeType) -> Failure {
        let expect_types = if self.allows_tickets {
            vec![HandshakeType::NewSessionTicket, HandshakeType::KeyUpdate]
        } else {
            vec![HandshakeType::KeyUpdate]
        };
        let error = Error::InappropriateHandshakeMessage { expect_types, got_type };
        Failure::new(AlertDescription::UnexpectedMessage, error)
    }
}

fn key_update(body: &[u8]) -> Result<Message<'_>, Failure> {
    match body {
        [0] => Ok(Message::KeyUpdate { requested: false }),
        [1] => Ok(Message::KeyUpdate { requested: true }),
        _ => {
            Err(Failure::new(AlertDescription::IllegalParameter, InvalidMessage::InvalidKeyUpdate))
        }
    }
}

/// Encodes a KeyUpdate record: its content type and content.
pub(super) fn encode_key_update(request: bool) -> (ContentType, [u8; HEADER + 1]) {
    (ContentType::Handshake, [u8::from(HandshakeType::KeyUpdate), 0, 0, 1, u8::from(request)])
}
