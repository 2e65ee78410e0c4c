//! Moving bytes between an application's connection and what carries them on: a tunnel or another connection.
//!
//! Both directions run until both have ended (half-open is a state like any other) or one breaks. FIN becomes END_STREAM
//! and END_STREAM becomes FIN; whatever else ends a side aborts the other one: TCP RST and RST_STREAM, never a FIN.

use std::io;

use bytes::{Bytes, BytesMut};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use underpass_hbone::{TunnelReader, TunnelStream, TunnelWriter};
use underpass_interception::reset_on_close;

use crate::drain::Drain;
use crate::error::ProxyError;
use crate::record::ConnectionRecord;

/// What a connection's first read may take: most requests fit, and thousands of quiet connections stay cheap.
const FIRST_READ: usize = 4 * 1024;
/// What a busy connection's read may take: large enough to make system calls rare, small enough to stay in L2.
const LARGEST_READ: usize = 128 * 1024;

/// One proxied connection while its bytes move: who is at which end, what is counted, and what may cut it short.
#[derive(Clone, Copy)]
pub(crate) struct Flow<'a> {
    record: &'a ConnectionRecord,
    drain: &'a Drain,
    app_is_client: bool,
}

impl<'a> Flow<'a> {
    /// The application's connection is the client's: outbound, and inbound in plain.
    pub(crate) fn from_client(record: &'a ConnectionRecord, drain: &'a Drain) -> Self {
        Self { record, drain, app_is_client: true }
    }

    /// The application's connection is the upstream: inbound through a tunnel.
    pub(crate) fn to_upstream(record: &'a ConnectionRecord, drain: &'a Drain) -> Self {
        Self { record, drain, app_is_client: false }
    }

    /// Copies between the application and a tunnel.
    pub(crate) async fn through_tunnel(
        self,
        mut app: TcpStream,
        tunnel: TunnelStream,
    ) -> Result<(), ProxyError> {
        let (mut reader, mut writer) = tunnel.split();
        let outcome = {
            let (app_reader, app_writer) = app.split();
            let out = self.to_tunnel(app_reader, &mut writer);
            let back = self.from_tunnel(&mut reader, app_writer);
            self.drain.or_abort(async { tokio::try_join!(out, back) }).await
        };
        if outcome.is_err() {
            writer.abort();
            reset_on_close(&app).ok();
        }
        outcome.map(|_| ())
    }

    /// Copies between the client and an upstream connection.
    pub(crate) async fn through_tcp(
        self,
        mut client: TcpStream,
        mut upstream: TcpStream,
    ) -> Result<(), ProxyError> {
        let outcome = {
            let (client_reader, client_writer) = client.split();
            let (upstream_reader, upstream_writer) = upstream.split();
            let (client_broke, upstream_broke) = (ProxyError::Client, ProxyError::Upstream);
            let out = pump(client_reader, upstream_writer, client_broke, upstream_broke, |bytes| {
                self.record.received(bytes);
            });
            let back = pump(upstream_reader, client_writer, upstream_broke, client_broke, |bytes| {
                self.record.sent(bytes);
            });
            self.drain.or_abort(async { tokio::try_join!(out, back) }).await
        };
        if outcome.is_err() {
            reset_on_close(&client).ok();
            reset_on_close(&upstream).ok();
        }
        outcome.map(|_| ())
    }

    async fn to_tunnel(
        &self,
        app: ReadHalf<'_>,
        tunnel: &mut TunnelWriter,
    ) -> Result<(), ProxyError> {
        let mut source = Source::new(app);
        while let Some(data) = source.read().await.map_err(|error| self.app_broke(error))? {
            let bytes = data.len();
            tunnel.write(data).await.map_err(ProxyError::Tunnel)?;
            if self.app_is_client { self.record.received(bytes) } else { self.record.sent(bytes) }
        }
        tunnel.finish().map_err(ProxyError::Tunnel)
    }

    async fn from_tunnel(
        &self,
        tunnel: &mut TunnelReader,
        mut app: WriteHalf<'_>,
    ) -> Result<(), ProxyError> {
        while let Some(data) = tunnel.read().await.map_err(ProxyError::Tunnel)? {
            app.write_all(&data).await.map_err(|error| self.app_broke(error))?;
            let bytes = data.len();
            if self.app_is_client { self.record.sent(bytes) } else { self.record.received(bytes) }
        }
        app.shutdown().await.map_err(|error| self.app_broke(error))
    }

    fn app_broke(&self, error: io::Error) -> ProxyError {
        if self.app_is_client { ProxyError::Client(error) } else { ProxyError::Upstream(error) }
    }
}

async fn pump(
    from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    read_error: fn(io::Error) -> ProxyError,
    write_error: fn(io::Error) -> ProxyError,
    moved: impl Fn(usize),
) -> Result<(), ProxyError> {
    let mut source = Source::new(from);
    while let Some(data) = source.read().await.map_err(read_error)? {
        to.write_all(&data).await.map_err(write_error)?;
        moved(data.len());
    }
    to.shutdown().await.map_err(write_error)
}

/// Reads a connection into buffers that grow while it is busy and are not held while it is idle.
struct Source<'a> {
    stream: ReadHalf<'a>,
    size: usize,
}

impl<'a> Source<'a> {
    fn new(stream: ReadHalf<'a>) -> Self {
        Self { stream, size: FIRST_READ }
    }

    /// The next bytes; `None` once the peer has sent FIN.
    async fn read(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            let mut buffer = BytesMut::with_capacity(self.size);
            match self.stream.try_read_buf(&mut buffer) {
                Ok(0) => return Ok(None),
                Ok(read) => {
                    self.adapt(read);
                    return Ok(Some(buffer.freeze()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    drop(buffer);
                    self.stream.readable().await?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Doubles after a read that filled the buffer, halves after one that used less than a quarter of it.
    fn adapt(&mut self, read: usize) {
        if read >= self.size {
            self.size = (self.size * 2).min(LARGEST_READ);
        } else if read < self.size / 4 {
            self.size = (self.size / 2).max(FIRST_READ);
        }
    }
}
