//! Moving bytes between an application's connection and what carries them on: a tunnel or another connection.
//!
//! Both directions run until both have ended (half-open is a state like any other) or one breaks. FIN becomes END_STREAM
//! and END_STREAM becomes FIN; whatever else ends a side aborts the other one: TCP RST and RST_STREAM, never a FIN.
//! Sockets come here such that closing them is a reset (`accept.rs`, `dial.rs`); only a good end takes that back.

use std::io;

use bytes::{Bytes, BytesMut};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use underpass_hbone::{TunnelReader, TunnelStream, TunnelWriter};
use underpass_interception::end_on_close;

use crate::drain::Drain;
use crate::error::ProxyError;
use crate::live::Revocation;
use crate::record::ConnectionRecord;

/// What a connection's first read may take: most requests fit, and thousands of quiet connections stay cheap.
const FIRST_READ: usize = 4 * 1024;
/// What a busy connection's read may take: large enough to make system calls rare, small enough to stay in L2. Half of it
/// cost a fifth more CPU in bulk, twice of it gained nothing that could be told from noise.
const LARGEST_READ: usize = 128 * 1024;

/// One proxied connection while its bytes move: what is counted, and what may cut it short.
pub(crate) struct Flow<'a> {
    pub(crate) record: &'a ConnectionRecord,
    pub(crate) drain: &'a Drain,
    pub(crate) revocation: &'a mut Revocation,
}

impl Flow<'_> {
    /// Copies between a client's connection and the tunnel that leads to its destination.
    pub(crate) async fn into_tunnel(
        self,
        client: TcpStream,
        tunnel: TunnelStream,
    ) -> Result<(), ProxyError> {
        let received = |bytes| self.record.received(bytes);
        let sent = |bytes| self.record.sent(bytes);
        self.through_tunnel(client, ProxyError::Client, tunnel, received, sent).await
    }

    /// Copies between the tunnel that a client came through and the application.
    pub(crate) async fn out_of_tunnel(
        self,
        tunnel: TunnelStream,
        app: TcpStream,
    ) -> Result<(), ProxyError> {
        let received = |bytes| self.record.received(bytes);
        let sent = |bytes| self.record.sent(bytes);
        self.through_tunnel(app, ProxyError::Upstream, tunnel, sent, received).await
    }

    async fn through_tunnel(
        self,
        mut stream: TcpStream,
        broke: fn(io::Error) -> ProxyError,
        tunnel: TunnelStream,
        into_tunnel: impl Fn(usize),
        out_of_tunnel: impl Fn(usize),
    ) -> Result<(), ProxyError> {
        let distrusted = tunnel.distrusted();
        let (mut reader, mut writer) = tunnel.split();
        let outcome = {
            let (read, write) = stream.split();
            let there = pump(TcpSource::new(read, broke), &mut writer, into_tunnel);
            let back = pump(&mut reader, TcpSink { stream: write, broke }, out_of_tunnel);
            let both = self.drain.or_abort(async { tokio::try_join!(there, back) });
            let both = self.revocation.or_end(both);
            tokio::select! {
                outcome = both => outcome,
                reason = distrusted => Err(ProxyError::Tunnel(reason)),
            }
        };
        match outcome {
            Ok(_) => end_on_close(&stream),
            Err(_) => writer.abort(),
        }
        outcome.map(|_| ())
    }

    /// Copies between a client's connection and one to its destination.
    pub(crate) async fn through_tcp(
        self,
        mut client: TcpStream,
        mut upstream: TcpStream,
    ) -> Result<(), ProxyError> {
        let outcome = {
            let (read, write) = client.split();
            let from_client = TcpSource::new(read, ProxyError::Client);
            let to_client = TcpSink { stream: write, broke: ProxyError::Client };
            let (read, write) = upstream.split();
            let from_upstream = TcpSource::new(read, ProxyError::Upstream);
            let to_upstream = TcpSink { stream: write, broke: ProxyError::Upstream };
            let there = pump(from_client, to_upstream, |bytes| self.record.received(bytes));
            let back = pump(from_upstream, to_client, |bytes| self.record.sent(bytes));
            let both = self.drain.or_abort(async { tokio::try_join!(there, back) });
            self.revocation.or_end(both).await
        };
        if outcome.is_ok() {
            end_on_close(&client);
            end_on_close(&upstream);
        }
        outcome.map(|_| ())
    }
}

/// Moves bytes from `from` to `to` until the one ends well, and then ends the other well.
async fn pump(
    mut from: impl Source,
    mut to: impl Sink,
    moved: impl Fn(usize),
) -> Result<(), ProxyError> {
    while let Some(data) = from.read().await? {
        let bytes = data.len();
        to.write(data).await?;
        moved(bytes);
    }
    to.finish().await
}

/// Where bytes come from.
trait Source {
    /// The next bytes, never empty; `None` after a clean end (FIN, END_STREAM).
    async fn read(&mut self) -> Result<Option<Bytes>, ProxyError>;
}

/// Where bytes go.
trait Sink {
    /// Takes all of `data`, waiting for room.
    async fn write(&mut self, data: Bytes) -> Result<(), ProxyError>;
    /// Ends this direction cleanly (FIN, END_STREAM); the other one goes on.
    async fn finish(&mut self) -> Result<(), ProxyError>;
}

impl Source for &mut TunnelReader {
    async fn read(&mut self) -> Result<Option<Bytes>, ProxyError> {
        TunnelReader::read(self).await.map_err(ProxyError::Tunnel)
    }
}

impl Sink for &mut TunnelWriter {
    async fn write(&mut self, data: Bytes) -> Result<(), ProxyError> {
        TunnelWriter::write(self, data).await.map_err(ProxyError::Tunnel)
    }

    async fn finish(&mut self) -> Result<(), ProxyError> {
        TunnelWriter::finish(self).map_err(ProxyError::Tunnel)
    }
}

struct TcpSink<'a> {
    stream: WriteHalf<'a>,
    /// What an error of this connection is: the client's or the upstream's.
    broke: fn(io::Error) -> ProxyError,
}

impl Sink for TcpSink<'_> {
    async fn write(&mut self, data: Bytes) -> Result<(), ProxyError> {
        self.stream.write_all(&data).await.map_err(self.broke)
    }

    async fn finish(&mut self) -> Result<(), ProxyError> {
        self.stream.shutdown().await.map_err(self.broke)
    }
}

/// Reads a connection into a buffer that grows while the connection is busy and is not held while it is idle.
struct TcpSource<'a> {
    stream: ReadHalf<'a>,
    broke: fn(io::Error) -> ProxyError,
    buffer: BytesMut,
    size: usize,
}

impl<'a> TcpSource<'a> {
    fn new(stream: ReadHalf<'a>, broke: fn(io::Error) -> ProxyError) -> Self {
        Self { stream, broke, buffer: BytesMut::new(), size: FIRST_READ }
    }

    /// Makes room for a read. What was read before is written by now, as a rule, and its memory is used again.
    fn make_room(&mut self) -> usize {
        if self.buffer.capacity() < self.size / 2 {
            self.buffer.reserve(self.size);
        }
        self.buffer.capacity()
    }

    /// Doubles after a read that filled its room, halves after one that used less than a quarter of it.
    fn adapt(&mut self, read: usize, room: usize) {
        if read >= room {
            self.size = (self.size * 2).min(LARGEST_READ);
        } else if read < self.size / 4 {
            self.size = (self.size / 2).max(FIRST_READ);
        }
    }
}

impl Source for TcpSource<'_> {
    async fn read(&mut self) -> Result<Option<Bytes>, ProxyError> {
        loop {
            let room = self.make_room();
            match self.stream.try_read_buf(&mut self.buffer) {
                Ok(0) => return Ok(None),
                Ok(read) => {
                    self.adapt(read, room);
                    return Ok(Some(self.buffer.split().freeze()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // An idle connection holds no buffer.
                    self.buffer = BytesMut::new();
                    self.stream.readable().await.map_err(self.broke)?;
                }
                Err(error) => return Err((self.broke)(error)),
            }
        }
    }
}
