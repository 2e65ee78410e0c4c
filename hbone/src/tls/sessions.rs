//! Session resumption: stores the tickets that a client receives, and creates the tickets that a
//! server issues.
//!
//! A client's tickets belong to one peer. Tickets never outlive their generation of credentials.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use rustls::NamedGroup;
use rustls::client::{ClientSessionStore, Tls12ClientSessionValue, Tls13ClientSessionValue};
use rustls::crypto::aws_lc_rs::Ticketer;
use rustls::server::ProducesTickets;
use rustls_pki_types::ServerName;

use super::tls_error;
use crate::clock;
use crate::error::HboneError;

/// The maximum number of stored tickets per peer: the number of tunnels that can be opened at once
/// without a full handshake.
const MAX_TICKETS: usize = 4;

/// The maximum size of a session in a ticket, in bytes. Most of it is the client's certificate
/// chain. A ticket near the protocol's limit of 64 KiB would cost more than a handshake.
const MAX_SESSION_BYTES: usize = 16 << 10;

/// The stored sessions with one peer.
#[derive(Debug)]
pub(super) struct Sessions(Mutex<SessionState>);

#[derive(Debug)]
struct SessionState {
    /// In the order of arrival. rustls uses each ticket once (RFC 8446 appendix C.4).
    tickets: VecDeque<Tls13ClientSessionValue>,
    /// The earliest expiry of the certificates of the original handshakes.
    expires: SystemTime,
    group: Option<NamedGroup>,
}

impl Sessions {
    pub(super) fn new(expires: SystemTime) -> Self {
        Self(Mutex::new(SessionState { tickets: VecDeque::new(), expires, group: None }))
    }

    /// Records a full handshake. Its session may be resumed until a certificate of either side
    /// expires.
    pub(super) fn record_handshake(&self, expires: SystemTime) {
        let mut state = self.state();
        // Several servers may share an address, so the stored tickets may belong to different
        // certificates.
        let others = if state.tickets.is_empty() { expires } else { state.expires };
        state.expires = expires.min(others);
    }

    pub(super) fn clear(&self) {
        self.state().tickets.clear();
    }

    fn state(&self) -> MutexGuard<'_, SessionState> {
        // No code panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ClientSessionStore for Sessions {
    fn set_kx_hint(&self, _: ServerName<'static>, group: NamedGroup) {
        self.state().group = Some(group);
    }

    fn kx_hint(&self, _: &ServerName<'_>) -> Option<NamedGroup> {
        self.state().group
    }

    fn set_tls12_session(&self, _: ServerName<'static>, _: Tls12ClientSessionValue) {}

    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        None
    }

    fn remove_tls12_session(&self, _: &ServerName<'static>) {}

    fn insert_tls13_ticket(&self, _: ServerName<'static>, ticket: Tls13ClientSessionValue) {
        let mut state = self.state();
        if state.tickets.len() >= MAX_TICKETS {
            state.tickets.pop_front();
        }
        state.tickets.push_back(ticket);
    }

    fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        let mut state = self.state();
        if state.expires <= clock::now() {
            state.tickets.clear();
        }
        state.tickets.pop_back()
    }
}

/// Encrypts sessions into tickets. Unlike sessions stored at the server, tickets use no memory that
/// peers could exhaust, and no shared lock. They expire with our certificate.
#[derive(Debug)]
pub(super) struct Tickets {
    keys: Arc<dyn ProducesTickets>,
    expires: SystemTime,
}

impl Tickets {
    /// Creates a source of tickets that are valid until `expires`. Their keys rotate every few
    /// hours.
    pub(super) fn new(expires: SystemTime) -> Result<Self, HboneError> {
        Ok(Self { keys: Ticketer::new().map_err(tls_error)?, expires })
    }

    /// The remaining validity in seconds.
    fn remaining(&self) -> u32 {
        let remaining = self.expires.duration_since(clock::now()).unwrap_or_default();
        u32::try_from(remaining.as_secs()).unwrap_or(u32::MAX)
    }
}

impl ProducesTickets for Tickets {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        self.keys.lifetime().min(self.remaining())
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let fits = plain.len() <= MAX_SESSION_BYTES;
        if self.remaining() == 0 || !fits { None } else { self.keys.encrypt(plain) }
    }

    fn decrypt(&self, cipher: &[u8]) -> Option<Vec<u8>> {
        if self.remaining() == 0 { None } else { self.keys.decrypt(cipher) }
    }
}

#[cfg(test)]
mod tests;
