//! A tunnelled byte stream with tokio's I/O traits, for a second tunnel inside of it.
//!
//! To copy to a socket, use [`TunnelReader`] and [`TunnelWriter`], which need no copy in between.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{SMALL, TunnelReader, TunnelStream, TunnelWriter};
use crate::error::HboneError;
use crate::tunnel::tunnel_state::OpenStream;

/// The maximum number of bytes that an outer stream discards while it waits for its end: a few
/// stream windows, which an aborted inner stream may have left in flight.
const LINGER_BYTES: usize = 16 << 20;

/// A [`TunnelStream`] with tokio's I/O traits. Receiving END_STREAM reads as the end; shutting down
/// sends END_STREAM.
///
/// Any other end is an error of kind `ConnectionReset` or `ConnectionAborted` that contains the
/// [`HboneError`]. A write takes as much as the peer's window and the send buffer allow. Dropping
/// it before the shutdown aborts the stream.
#[derive(Debug)]
pub struct TunnelIo {
    reader: TunnelReader,
    writer: TunnelWriter,
    /// The unread rest of the last chunk.
    unread: Bytes,
    /// True if a shutdown completes only after the peer has ended its direction too.
    lingers: bool,
    /// The number of bytes discarded while waiting for the peer's end.
    lingered: usize,
}

impl TunnelStream {
    /// Wraps the stream in tokio's I/O traits.
    pub fn into_io(self) -> TunnelIo {
        let (reader, writer) = self.split();
        TunnelIo { reader, writer, unread: Bytes::new(), lingers: false, lingered: 0 }
    }

    /// Wraps the stream as the connection of an inner tunnel. Also returns its state, which signals
    /// revocation.
    ///
    /// A shutdown completes only after the peer has ended its direction too: h2 drops a connection
    /// right after its shutdown, which would reset the stream and could lose data in flight.
    pub(crate) fn into_carrier(self) -> (TunnelIo, Arc<OpenStream>) {
        let open = self.reader.open.clone();
        (TunnelIo { lingers: true, ..self.into_io() }, open)
    }
}

impl TunnelIo {
    /// Sends the buffers as one DATA frame, so that a batch of TLS records arrives together.
    fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let wanted = bufs.iter().map(|buf| buf.len()).sum();
        if wanted == 0 {
            return Poll::Ready(Ok(0));
        }
        if wanted < SMALL {
            // While this is pending, TLS gathers more data, so that the next write is larger.
            ready!(self.writer.poll_may_send_small_frame(cx, wanted));
        }
        let capacity = ready!(self.writer.poll_capacity(cx, wanted)).map_err(io_error)?;
        let length = capacity.min(wanted);
        let mut frame = BytesMut::with_capacity(length);
        for buf in bufs {
            frame.put(buf.take(length - frame.len()));
        }
        self.writer.send(frame.freeze(), false).map_err(io_error)?;
        Poll::Ready(Ok(length))
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(chunk) = ready!(self.reader.poll_read(cx)).map_err(io_error)? {
            self.lingered = self.lingered.saturating_add(chunk.len());
            if self.lingered > LINGER_BYTES {
                return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for TunnelIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.unread.is_empty() {
            match ready!(self.reader.poll_read(cx)).map_err(io_error)? {
                Some(chunk) => self.unread = chunk,
                None => return Poll::Ready(Ok(())),
            }
        }
        let length = buf.remaining().min(self.unread.len());
        buf.put_slice(&self.unread.split_to(length));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TunnelIo {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_frame(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_frame(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// The task that drives the connection sends the queued data.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.writer.finish().map_err(io_error)?;
        if self.lingers { self.poll_end(cx) } else { Poll::Ready(Ok(())) }
    }
}

fn io_error(error: HboneError) -> io::Error {
    let kind = match error {
        HboneError::Reset { .. } => io::ErrorKind::ConnectionReset,
        _ => io::ErrorKind::ConnectionAborted,
    };
    io::Error::new(kind, error)
}

#[cfg(test)]
mod tests;
