//! What the record layer needs of rustls once the handshake is done: the next key of each direction, and a place for tickets.

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM};
use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{ConnectionTrafficSecrets, Error, ExtractedSecrets};

use super::aead::RecordKey;

/// The side of the connection that knows its secrets.
pub(in crate::tls) trait KeySchedule: Send + Sync {
    /// The next key to seal with (RFC 8446 section 7.2).
    fn next_sealing(&mut self) -> Result<RecordKey, Error>;

    /// The next key to open with.
    fn next_opening(&mut self) -> Result<RecordKey, Error>;

    /// Keeps a ticket, for later connections to resume the session with.
    fn keep_ticket(&mut self, message: &[u8]) -> Result<(), Error>;

    /// Whether the peer may send tickets: only a server does.
    fn takes_tickets(&self) -> bool;
}

/// The first keys of both directions, and where the next ones come from.
pub(super) struct Keys {
    pub(super) sealing: RecordKey,
    pub(super) opening: RecordKey,
    pub(super) schedule: Box<dyn KeySchedule>,
    /// How many records one key may protect.
    pub(super) limit: u64,
}

impl Keys {
    /// Those of a finished handshake.
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
        // `provider` offers no other.
        _ => Err(Error::General("a cipher other than AES-GCM was negotiated".into())),
    }
}
