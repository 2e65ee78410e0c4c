//! Performs a handshake with rustls, then converts the connection into a [`TlsStream`].
//!
//! rustls receives one record at a time, and no record after the handshake: the record layer opens
//! those.

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

/// The size of one read in bytes: a certificate chain and a hybrid key share fit.
const READ_SIZE: usize = 8 << 10;
/// The maximum number of bytes buffered for an unauthenticated peer. rustls allows messages of 64
/// KiB; the rest is for record headers and tags.
const MAX_INCOMING: usize = 96 << 10;
/// The bytes that were read after the handshake must fit into one buffer (`Input::new`).
const _: () = assert!(MAX_INCOMING + READ_SIZE <= super::buffer::SIZE);

/// A connection after its handshake, before the record layer starts.
pub(in crate::tls) struct FinishedHandshake<C, T> {
    connection: C,
    io: T,
    /// Bytes that were read after the last record of the handshake.
    leftover: Vec<u8>,
}

/// A failed handshake with its connection. The caller closes the connection such that the peer
/// receives the alert.
pub(in crate::tls) struct UnfinishedHandshake<T> {
    pub(in crate::tls) error: io::Error,
    pub(in crate::tls) io: T,
}

/// A rustls connection, of a client or of a server.
pub(in crate::tls) trait Handshake:
    DerefMut<Target = UnbufferedConnectionCommon<Self::Data>>
{
    type Data;
    type Schedule: KeySchedule + 'static;

    fn process<'c, 'i>(&'c mut self, records: &'i mut [u8])
    -> UnbufferedStatus<'c, 'i, Self::Data>;

    fn extract(self) -> Result<(ExtractedSecrets, Self::Schedule), Error>;
}

/// Performs a handshake over `io`. Returns after everything is sent, including the server's session
/// tickets.
pub(in crate::tls) async fn handshake<C: Handshake, T: AsyncRead + AsyncWrite + Unpin>(
    mut connection: C,
    mut io: T,
) -> Result<FinishedHandshake<C, T>, UnfinishedHandshake<T>> {
    let mut flights = Flights::default();
    loop {
        match flights.step(&mut connection) {
            Ok(Step::Continue) => continue,
            Ok(Step::Blocked | Step::FinishedHandshake) if !flights.outgoing.is_empty() => {
                if let Err(error) = send(&mut io, &flights.outgoing).await {
                    return Err(UnfinishedHandshake { error, io });
                }
                flights.outgoing.clear();
            }
            Ok(Step::Blocked) => {
                if let Err(error) = flights.receive(&mut io).await {
                    return Err(UnfinishedHandshake { error, io });
                }
            }
            Ok(Step::FinishedHandshake) => {
                return Ok(FinishedHandshake { connection, io, leftover: flights.incoming });
            }
            Err(error) => {
                flights.encode_alert(&mut connection);
                // Try once to send the alert. Do not wait for a peer that does not read.
                let _sent = poll_immediate(send(&mut io, &flights.outgoing)).await;
                let error = io::Error::new(io::ErrorKind::InvalidData, error);
                return Err(UnfinishedHandshake { error, io });
            }
        }
    }
}

impl<C: Handshake, T> FinishedHandshake<C, T> {
    /// The negotiated parameters and the peer's certificates.
    pub(in crate::tls) fn negotiated(&self) -> &CommonState {
        &self.connection
    }

    /// Extracts the traffic secrets and starts the record layer.
    pub(in crate::tls) fn into_stream(self) -> Result<TlsStream<T>, Error> {
        let suite = self.connection.negotiated_cipher_suite().and_then(|suite| suite.tls13());
        let limit = suite.ok_or(Error::HandshakeNotComplete)?.common.confidentiality_limit;
        self.into_limited_stream(limit)
    }

    /// Like [`into_stream`](Self::into_stream), with a limit on the number of records per key.
    pub(in crate::tls) fn into_limited_stream(self, limit: u64) -> Result<TlsStream<T>, Error> {
        let (secrets, schedule) = self.connection.extract()?;
        let keys = Keys::extracted(secrets, Box::new(schedule), limit)?;
        Ok(TlsStream::new(self.io, keys, &self.leftover))
    }
}

/// The handshake records of both directions that are buffered.
#[derive(Default)]
struct Flights {
    incoming: Vec<u8>,
    /// The number of bytes of `incoming` that rustls has received.
    passed: usize,
    /// The offset in `incoming` of the first record that rustls has not received completely.
    next: usize,
    outgoing: Vec<u8>,
}

enum Step {
    Continue,
    /// rustls needs more records from the peer.
    Blocked,
    FinishedHandshake,
}

impl Flights {
    fn step<C: Handshake>(&mut self, connection: &mut C) -> Result<Step, Error> {
        let records = self.incoming.get_mut(..self.passed).unwrap_or_default();
        let UnbufferedStatus { discard, state, .. } = connection.process(records);
        let step = match state? {
            ConnectionState::EncodeTlsData(data) => {
                encode(data, &mut self.outgoing)?;
                Step::Continue
            }
            ConnectionState::TransmitTlsData(data) => {
                // The caller sends `outgoing` before it reads again.
                data.done();
                Step::Continue
            }
            ConnectionState::BlockedHandshake => Step::Blocked,
            ConnectionState::WriteTraffic(_) => Step::FinishedHandshake,
            // Unreachable: rustls receives no record after the handshake, and early data is
            // disabled.
            _ => return Err(Error::General("more than the handshake was processed".into())),
        };
        self.discard(discard);
        if matches!(step, Step::Blocked) && self.pass_record() {
            return Ok(Step::Continue);
        }
        Ok(step)
    }

    fn discard(&mut self, length: usize) {
        self.incoming.drain(..length.min(self.incoming.len()));
        self.passed = self.passed.saturating_sub(length);
        self.next = self.next.saturating_sub(length);
    }

    /// Passes one more record to rustls, or the available part of it, so that rustls validates the
    /// header early. Returns false if there are no more bytes.
    fn pass_record(&mut self) -> bool {
        let unseen = self.incoming.get(self.next..).unwrap_or_default();
        let length = match unseen.first_chunk::<HEADER>() {
            Some([_, _, _, high, low]) => HEADER + usize::from(u16::from_be_bytes([*high, *low])),
            None => usize::MAX,
        };
        let before = self.passed;
        if length <= unseen.len() {
            self.next += length;
            self.passed = self.next;
        } else {
            self.passed = self.incoming.len();
        }
        self.passed > before
    }

    async fn receive(&mut self, io: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
        if self.incoming.len() >= MAX_INCOMING {
            let error = Error::from(InvalidMessage::HandshakePayloadTooLarge);
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
        self.incoming.reserve(READ_SIZE);
        if io.read_buf(&mut (&mut self.incoming).limit(READ_SIZE)).await? == 0 {
            let error = "the peer closed the connection during the handshake";
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, error));
        }
        self.pass_record();
        Ok(())
    }

    /// Encodes the alert that rustls queued with its error. Passes no records: rustls would process
    /// the invalid record again.
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
