//! TLS 1.3 record layer of a tunnel (RFC 8446 sections 4.6, 5 and 6): reads and writes every record
//! after the handshake.
//!
//! rustls performs the handshake, verifies certificates and derives keys. `handshake` drives rustls
//! over the connection and then extracts its traffic secrets. Afterwards rustls only derives the
//! next traffic secret and stores session tickets (`keys`). rustls 0.24 will have a split mode with
//! the caller's buffers, which can replace this module.
//!
//! ```text
//! TlsStream ─┬─ Input           bytes of the peer ──▶ single records, to the reader or in place
//!            ├─ RecordProtocol  both keys, key updates, tickets, alerts: no I/O
//!            └─ Output          plaintext of the writer ──▶ contiguous records, one write call
//! ```
//!
//! Input and output borrow a buffer from their thread only while they hold bytes (`buffer`). An
//! idle tunnel holds no buffer, and the few buffers of a thread stay in its L2 cache.
//!
//! A protocol violation ends the connection with the alert of RFC 8446 section 6.2. A failed
//! connection neither reads nor writes.

mod aead;
mod buffer;
mod handshake;
mod input;
mod keys;
mod messages;
mod output;
#[cfg(any(test, feature = "fuzz"))]
mod peer;
mod protocol;
#[cfg(any(test, feature = "fuzz"))]
mod script;
mod stream;

use rustls::{AlertDescription, Error, PeerMisbehaved};

pub(super) use self::handshake::{FinishedHandshake, UnfinishedHandshake, handshake};
#[cfg(feature = "fuzz")]
pub(crate) use self::script::run as run_script;
pub(crate) use self::stream::TlsStream;

/// Length of a record header: opaque type, legacy version, length.
const HEADER: usize = 5;
/// Length of an AES-GCM tag.
const TAG: usize = 16;
/// Bytes after the content of an unpadded record: the content type and the tag.
const TRAILER: usize = 1 + TAG;
/// RFC 8446 section 5.1: maximum content of a record.
const MAX_CONTENT: usize = 1 << 14;
/// RFC 8446 section 5.2: maximum length field of a record.
const MAX_BODY: usize = MAX_CONTENT + 256;
/// Length of the largest record that we write.
const MAX_SEALED: usize = HEADER + MAX_CONTENT + TRAILER;

/// Maximum length of a record with up to `content` bytes and of a KeyUpdate before it.
const fn sealed_length(content: usize) -> usize {
    let content = if content < MAX_CONTENT { content } else { MAX_CONTENT };
    HEADER + content + TRAILER + KEY_UPDATE
}

/// Length of a sealed KeyUpdate.
const KEY_UPDATE: usize = HEADER + 5 + TRAILER;
/// Length of a sealed alert.
const ALERT: usize = HEADER + 2 + TRAILER;
const _: () = assert!(sealed_length(usize::MAX) == MAX_SEALED + KEY_UPDATE);

/// A fatal error, and the alert that reports it to the peer.
#[derive(Debug)]
struct Failure {
    /// `None` after a fatal alert of the peer: RFC 8446 section 6.2 forbids an answer.
    alert: Option<AlertDescription>,
    error: Error,
}

impl Failure {
    fn new(alert: AlertDescription, error: impl Into<Error>) -> Self {
        Self { alert: Some(alert), error: error.into() }
    }

    fn unexpected(error: PeerMisbehaved) -> Self {
        Self::new(AlertDescription::UnexpectedMessage, error)
    }
}

#[cfg(test)]
mod tests;
