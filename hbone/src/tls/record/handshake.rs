//! Drives rustls through a handshake, and takes over from it.
//!
//! rustls gets one record at a time and none after the one that ends the handshake: all that follows is ours to open.

use std::io;
use std::ops::DerefMut;

use bytes::BufMut as _;
use futures_util::future::poll_immediate;
use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncodeTlsData, InsufficientSizeError, UnbufferedConnectionCommon,
    UnbufferedStatus,
};
use rustls::{CommonState, Error, ExtractedSecrets, InvalidMessage};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::HEADER;
use super::keys::{KeySchedule, Keys};
use super::stream::TlsStream;

/// A flight of handshake messages with a chain of certificates and a hybrid key share.
const READ: usize = 8 << 10;
/// The most that is held of a peer that has not authenticated itself: a message of 64 KiB, which rustls allows, and the overhead
/// of records that are not very small.
const MAX_INCOMING: usize = 96 << 10;

/// A finished handshake.
pub(in crate::tls) struct Finished<C, T> {
    connection: C,
    io: T,
    /// What was read after the end of the handshake.
    early: Vec<u8>,
}

/// Why there is no handshake, and the connection if it can still be closed in an orderly way.
pub(in crate::tls) struct Unfinished<T> {
    pub(in crate::tls) error: io::Error,
    pub(in crate::tls) io: T,
}

/// What both sides' connections have in common.
pub(in crate::tls) trait Handshake:
    DerefMut<Target = UnbufferedConnectionCommon<Self::Data>>
{
    type Data;
    type Schedule: KeySchedule + 'static;

    fn process<'c, 'i>(&'c mut self, records: &'i mut [u8])
    -> UnbufferedStatus<'c, 'i, Self::Data>;

    fn extract(self) -> Result<(ExtractedSecrets, Self::Schedule), Error>;
}

/// Handshakes over `io`, and sends all that is to be sent for it, tickets included.
pub(in crate::tls) async fn handshake<C: Handshake, T: AsyncRead + AsyncWrite + Unpin>(
    mut connection: C,
    mut io: T,
) -> Result<Finished<C, T>, Unfinished<T>> {
    let mut flights = Flights::default();
    loop {
        match flights.step(&mut connection) {
            Ok(Step::Again) => continue,
            Ok(Step::Blocked | Step::Finished) if !flights.outgoing.is_empty() => {
                if let Err(error) = send(&mut io, &flights.outgoing).await {
                    return Err(Unfinished { error, io });
                }
                flights.outgoing.clear();
            }
            Ok(Step::Blocked) => {
                if let Err(error) = flights.receive(&mut io).await {
                    return Err(Unfinished { error, io });
                }
            }
            Ok(Step::Finished) => {
                return Ok(Finished { connection, io, early: flights.incoming });
            }
            Err(error) => {
                flights.encode_alert(&mut connection);
                // The one attempt to say why.
                let _sent = poll_immediate(send(&mut io, &flights.outgoing)).await;
                let error = io::Error::new(io::ErrorKind::InvalidData, error);
                return Err(Unfinished { error, io });
            }
        }
    }
}

impl<C: Handshake, T> Finished<C, T> {
    /// What was negotiated, and who the peer is.
    pub(in crate::tls) fn facts(&self) -> &CommonState {
        &self.connection
    }

    /// The connection as a stream of plaintext.
    pub(in crate::tls) fn into_stream(self) -> Result<TlsStream<T>, Error> {
        let suite = self.connection.negotiated_cipher_suite().and_then(|suite| suite.tls13());
        let limit = suite.ok_or(Error::HandshakeNotComplete)?.common.confidentiality_limit;
        self.into_limited_stream(limit)
    }

    /// The same, whose keys may protect so many records.
    pub(in crate::tls) fn into_limited_stream(self, limit: u64) -> Result<TlsStream<T>, Error> {
        let (secrets, schedule) = self.connection.extract()?;
        let keys = Keys::extracted(secrets, Box::new(schedule), limit)?;
        Ok(TlsStream::new(self.io, keys, &self.early))
    }
}

/// What goes to and fro.
#[derive(Default)]
struct Flights {
    incoming: Vec<u8>,
    /// How much of `incoming` rustls may see: a record more at each step, or a part of one.
    shown: usize,
    /// Where the first record starts that rustls has not seen all of.
    next: usize,
    outgoing: Vec<u8>,
}

enum Step {
    /// There is more to do.
    Again,
    /// The peer is to send more.
    Blocked,
    Finished,
}

impl Flights {
    fn step<C: Handshake>(&mut self, connection: &mut C) -> Result<Step, Error> {
        let records = self.incoming.get_mut(..self.shown).unwrap_or_default();
        let UnbufferedStatus { discard, state, .. } = connection.process(records);
        let step = match state? {
            ConnectionState::EncodeTlsData(data) => {
                encode(data, &mut self.outgoing)?;
                Step::Again
            }
            ConnectionState::TransmitTlsData(data) => {
                // They are sent before anything else is read.
                data.done();
                Step::Again
            }
            ConnectionState::BlockedHandshake => Step::Blocked,
            ConnectionState::WriteTraffic(_) => Step::Finished,
            // Application data and alerts after the handshake, which are not shown; early data, which is not offered.
            _ => return Err(Error::General("more than the handshake was processed".into())),
        };
        self.discard(discard);
        if matches!(step, Step::Blocked) && self.show() {
            return Ok(Step::Again);
        }
        Ok(step)
    }

    fn discard(&mut self, length: usize) {
        self.incoming.drain(..length.min(self.incoming.len()));
        self.shown = self.shown.saturating_sub(length);
        self.next = self.next.saturating_sub(length);
    }

    /// Shows one more record, or what has come of it, which lets rustls judge its header. Whether that is more than before.
    fn show(&mut self) -> bool {
        let unseen = self.incoming.get(self.next..).unwrap_or_default();
        let length = match unseen.first_chunk::<HEADER>() {
            Some([_, _, _, high, low]) => HEADER + usize::from(u16::from_be_bytes([*high, *low])),
            None => usize::MAX,
        };
        let before = self.shown;
        if length <= unseen.len() {
            self.next += length;
            self.shown = self.next;
        } else {
            self.shown = self.incoming.len();
        }
        self.shown > before
    }

    async fn receive(&mut self, io: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
        if self.incoming.len() >= MAX_INCOMING {
            let error = Error::from(InvalidMessage::HandshakePayloadTooLarge);
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
        self.incoming.reserve(READ);
        if io.read_buf(&mut (&mut self.incoming).limit(READ)).await? == 0 {
            let error = "the peer closed the connection during the handshake";
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, error));
        }
        self.show();
        Ok(())
    }

    /// What rustls says about its error, which it has queued. Nothing is shown to it after that: it would look at it again.
    fn encode_alert<C: Handshake>(&mut self, connection: &mut C) {
        while connection.wants_write() {
            let encoded = match connection.process(&mut []).state {
                Ok(ConnectionState::EncodeTlsData(data)) => encode(data, &mut self.outgoing),
                _ => return,
            };
            if encoded.is_err() {
                return;
            }
        }
    }
}

fn encode<D>(mut data: EncodeTlsData<'_, D>, outgoing: &mut Vec<u8>) -> Result<(), Error> {
    let start = outgoing.len();
    let failed = |_| Error::General("a handshake message cannot be encoded".into());
    let length = match data.encode(&mut []) {
        Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) => {
            outgoing.resize(start + required_size, 0);
            data.encode(outgoing.get_mut(start..).unwrap_or_default()).map_err(failed)?
        }
        encoded => encoded.map_err(failed)?,
    };
    outgoing.truncate(start + length);
    Ok(())
}

async fn send(io: &mut (impl AsyncWrite + Unpin), flight: &[u8]) -> io::Result<()> {
    io.write_all(flight).await?;
    io.flush().await
}

impl Handshake for UnbufferedClientConnection {
    type Data = ClientConnectionData;
    type Schedule = rustls::kernel::KernelConnection<ClientConnectionData>;

    fn process<'c, 'i>(
        &'c mut self,
        records: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(records)
    }

    fn extract(self) -> Result<(ExtractedSecrets, Self::Schedule), Error> {
        self.dangerous_into_kernel_connection()
    }
}

impl Handshake for UnbufferedServerConnection {
    type Data = ServerConnectionData;
    type Schedule = rustls::kernel::KernelConnection<ServerConnectionData>;

    fn process<'c, 'i>(
        &'c mut self,
        records: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(records)
    }

    fn extract(self) -> Result<(ExtractedSecrets, Self::Schedule), Error> {
        self.dangerous_into_kernel_connection()
    }
}
