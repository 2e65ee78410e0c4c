//! The parts of rustls that the record layer uses after the handshake: derives traffic keys, and
//! stores session tickets.

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM};
use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{ConnectionTrafficSecrets, Error, ExtractedSecrets};

use super::aead::RecordKey;

/// The key schedule of one connection (RFC 8446 section 7).
pub(in crate::tls) trait KeySchedule: Send + Sync {
    /// Derives the next key for sending (RFC 8446 section 7.2).
    fn next_sealing(&mut self) -> Result<RecordKey, Error>;

    /// Derives the next key for receiving.
    fn next_opening(&mut self) -> Result<RecordKey, Error>;

    /// Stores the body of a NewSessionTicket message, to resume the session later.
    fn keep_ticket(&mut self, message: &[u8]) -> Result<(), Error>;

    /// Returns true if the peer is a server, which may send tickets.
    fn takes_tickets(&self) -> bool;
}

/// The traffic keys after the handshake, and the schedule that derives later keys.
pub(super) struct Keys {
    pub(super) sealing: RecordKey,
    pub(super) opening: RecordKey,
    pub(super) schedule: Box<dyn KeySchedule>,
    /// The maximum number of records per key, for confidentiality (RFC 8446 section 5.5).
    pub(super) limit: u64,
}

impl Keys {
    /// Converts the secrets of a finished handshake.
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
        // Unreachable: `provider` offers only AES-GCM.
        _ => Err(Error::General("a cipher other than AES-GCM was negotiated".into())),
    }
}
