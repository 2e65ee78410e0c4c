//! The part of rustls that the record layer uses after the handshake: next traffic keys, and
//! storage of session tickets.

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM};
use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{ConnectionTrafficSecrets, Error, ExtractedSecrets};

use super::aead::RecordKey;

/// The key schedule of one connection.
pub(in crate::tls) trait KeySchedule: Send + Sync {
    /// Derives the next sending key (RFC 8446 section 7.2).
    fn next_sealing(&mut self) -> Result<RecordKey, Error>;

    /// Derives the next receiving key.
    fn next_opening(&mut self) -> Result<RecordKey, Error>;

    /// Stores the body of a NewSessionTicket message, for the resumption of the session.
    fn keep_ticket(&mut self, message: &[u8]) -> Result<(), Error>;

    /// Whether the peer is a server, which may send tickets.
    fn takes_tickets(&self) -> bool;
}

/// The application traffic keys after the handshake, and the schedule of the later ones.
pub(super) struct Keys {
    pub(super) sealing: RecordKey,
    pub(super) opening: RecordKey,
    pub(super) schedule: Box<dyn KeySchedule>,
    /// Maximum number of records per key, for confidentiality.
    pub(super) limit: u64,
}

impl Keys {
    /// The keys of a finished handshake.
    pub(super) fn extracted(
        secrets: ExtractedSecrets,
        schedule: Box<dyn KeySchedule>,
        limit: u64,
    ) -> Result<Self, Error> {
        let ExtractedSecrets { tx, rx } = secrets;
        let (sealing, opening) = (record_key(tx)?, record_key(rx)?);
        Ok(Self { sealing, opening, schedule, limit })
    }
}

impl KeySchedule for KernelConnection<ClientConnectionData> {
    fn next_sealing(&mut self) -> Result<RecordKey, Error> {
        self.update_tx_secret().and_then(record_key)
    }

    fn next_opening(&mut self) -> Result<RecordKey, Error> {
        self.update_rx_secret().and_then(record_key)
    }

    fn keep_ticket(&mut self, message: &[u8]) -> Result<(), Error> {
        self.handle_new_session_ticket(message)
    }

    fn takes_tickets(&self) -> bool {
        true
    }
}

impl KeySchedule for KernelConnection<ServerConnectionData> {
    fn next_sealing(&mut self) -> Result<RecordKey, Error> {
        self.update_tx_secret().and_then(record_key)
    }

    fn next_opening(&mut self) -> Result<RecordKey, Error> {
        self.update_rx_secret().and_then(record_key)
    }

    fn keep_ticket(&mut self, _: &[u8]) -> Result<(), Error> {
        Err(Error::General("a ticket for a server".into()))
    }

    fn takes_tickets(&self) -> bool {
        false
    }
}

fn record_key((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> Result<RecordKey, Error> {
    match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv } => {
            RecordKey::new(&AES_128_GCM, key.as_ref(), iv, sequence)
        }
        ConnectionTrafficSecrets::Aes256Gcm { key, iv } => {
            RecordKey::new(&AES_256_GCM, key.as_ref(), iv, sequence)
        }
        // `provider` offers only AES-GCM.
        _ => Err(Error::General("a cipher other than AES-GCM was negotiated".into())),
    }
}
