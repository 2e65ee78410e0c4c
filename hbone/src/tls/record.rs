//! The TLS 1.3 record layer of a tunnel (RFC 8446 sections 4.6 and 5): what reads and writes records once the handshake is done.
//!
//! rustls handshakes, verifies certificates and derives keys. `handshake` drives it over the connection and then takes its
//! secrets; from there on nothing else sees a record. `keys` is all that the record layer needs of rustls afterwards (the next
//! traffic secret, a ticket to keep), so that rustls' split mode with the caller's buffers can replace this module once a release
//! has it (0.24).
//!
//! ```text
//! TlsStream ─┬─ Input    bytes of the peer ──▶ one record at a time, opened into the reader's buffer or in place
//!            ├─ Records  both keys, key updates, tickets, alerts: no I/O
//!            └─ Output   plaintext of the writer ──▶ records side by side, written by one call
//! ```
//!
//! Input and output borrow a buffer from their thread for as long as they hold bytes (`buffer`): a tunnel that waits holds none,
//! and the few that are used stay in the cache.
//!
//! Every violation ends the connection with the alert of RFC 8446 section 6.2. A connection that failed neither reads nor
//! writes again.

mod aead;
mod buffer;
mod handshake;
mod input;
mod keys;
mod messages;
mod output;
#[cfg(any(test, feature = "fuzz"))]
mod peer;
mod records;
#[cfg(any(test, feature = "fuzz"))]
mod script;
mod stream;

use rustls::{AlertDescription, Error, PeerMisbehaved};

pub(super) use self::handshake::{Finished, Unfinished, handshake};
#[cfg(feature = "fuzz")]
pub(crate) use self::script::run as run_script;
pub(crate) use self::stream::TlsStream;

/// Opaque type, legacy version, length.
const HEADER: usize = 5;
/// Of AES-GCM.
const TAG: usize = 16;
/// What a record has after its content if it is not padded: the type and the tag.
const TRAILER: usize = 1 + TAG;
/// RFC 8446 section 5.1: the most content of a record.
const MAX_CONTENT: usize = 1 << 14;
/// RFC 8446 section 5.2: the most that a record has after its header.
const MAX_BODY: usize = MAX_CONTENT + 256;
/// The largest record that we write.
const MAX_SEALED: usize = HEADER + MAX_CONTENT + TRAILER;

/// Why the connection must end, and what the peer is sent about it.
#[derive(Debug)]
struct Failure {
    /// `None` after a fatal alert of the peer: nothing may be sent any more.
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
