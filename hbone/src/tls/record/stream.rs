//! A TLS connection after its handshake, as a plaintext stream.

use std::fmt;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustls::{AlertDescription, Error};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::Failure;
use super::input::Input;
use super::keys::Keys;
use super::output::Output;
use super::protocol::{Opened, RecordProtocol};
use super::{HEADER, TAG};

/// A plaintext stream that reads and writes TLS 1.3 records over `io`.
///
/// A write seals its data into the send buffer. A flush sends the buffer; so does a write if the
/// buffer is full.
pub(crate) struct TlsStream<T> {
    io: T,
    input: Input,
    output: Output,
    protocol: RecordProtocol,
    reading: Reading,
    /// True once close_notify is sealed.
    closed: bool,
}

#[derive(Debug)]
enum Reading {
    Open,
    Closed,
    /// The connection ended without close_notify.
    Cut,
    /// The peer violated the protocol or sent a fatal alert, or the key schedule failed.
    Failed(Error),
}

impl<T> TlsStream<T> {
    /// `leftover`: the bytes that were read after the handshake.
    pub(super) fn new(io: T, keys: Keys, leftover: &[u8]) -> Self {
        let protocol = RecordProtocol::new(keys);
        let (input, output) = (Input::new(leftover), Output::default());
        Self { io, input, output, protocol, reading: Reading::Open, closed: false }
    }

    /// The result of a read at the end of the stream. `None` while the stream is open.
    fn end(&self) -> Option<io::Result<()>> {
        match &self.reading {
            Reading::Open => None,
            Reading::Closed => Some(Ok(())),
            Reading::Cut => Some(Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the peer closed the connection without close_notify",
            ))),
            Reading::Failed(error) => Some(Err(invalid(error.clone()))),
        }
    }

    /// The memory of the receive side in bytes.
    #[cfg(any(test, feature = "fuzz"))]
    pub(super) fn buffered(&self) -> usize {
        self.input.buffered()
    }

    fn check_writable(&self) -> io::Result<()> {
        match &self.reading {
            Reading::Failed(error) => Err(invalid(error.clone())),
            _ if self.closed => Err(io::ErrorKind::BrokenPipe.into()),
            _ => Ok(()),
        }
    }

    /// Opens the next record: into `buf` if it fits, otherwise in place. Returns `false` if no
    /// record is complete.
    ///
    /// If this read has `delivered` data already, a record that does not fit into `buf` is left for
    /// the next read: h2 decodes the header of a DATA frame first, and then reads with a buffer for
    /// the whole frame.
    fn open(&mut self, buf: &mut ReadBuf<'_>, delivered: bool) -> Result<bool, Failure> {
        let Some(record) = self.input.record()? else {
            return Ok(false);
        };
        let length = record.len();
        let inner = length - HEADER - TAG;
        if delivered && buf.remaining() < inner {
            return Ok(false);
        }
        let opened = if buf.remaining() >= inner {
            let opened = self.protocol.open_into(record, buf.initialize_unfilled_to(inner))?;
            if let Opened::Data(content) = opened {
                buf.advance(content);
            }
            self.input.take_record(length);
            opened
        } else {
            let opened = self.protocol.open_in_place(record)?;
            let content = if let Opened::Data(content) = opened { content } else { 0 };
            self.input.keep_plain(length, content);
            opened
        };
        if opened == Opened::Closed {
            // RFC 8446 section 6.1: ignore later records.
            self.reading = Reading::Closed;
            self.input.discard();
        }
        Ok(true)
    }

    fn deliver_plain(&mut self, buf: &mut ReadBuf<'_>) {
        let plain = self.input.plain();
        let length = plain.len().min(buf.remaining());
        buf.put_slice(plain.get(..length).unwrap_or_default());
        self.input.take_plain(length);
    }

    /// Ends the connection, and seals the alert.
    fn fail(&mut self, failure: Failure) {
        if let Some(alert) = failure.alert
            && !self.closed
        {
            // Fails only after 2^64 records.
            let _sealed = self.protocol.seal_alert(alert, &mut self.output);
        }
        self.reading = Reading::Failed(failure.error);
        self.input.discard();
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> TlsStream<T> {
    /// Reads from the connection.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut room = ReadBuf::new(self.input.room());
        let polled = Pin::new(&mut self.io).poll_read(cx, &mut room);
        let length = room.filled().len();
        match polled {
            Poll::Ready(Ok(())) if length == 0 => {
                self.reading = Reading::Cut;
                self.input.discard();
            }
            Poll::Ready(Ok(())) => self.input.filled(length),
            Poll::Pending | Poll::Ready(Err(_)) => self.input.release(),
        }
        polled
    }

    /// Writes all sealed records.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.output.unwritten().is_empty() {
            let written = ready!(Pin::new(&mut self.io).poll_write(cx, self.output.unwritten()))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.output.written(written);
        }
        self.output.release();
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsStream<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        loop {
            this.deliver_plain(buf);
            let delivered = buf.filled().len() > before;
            if buf.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            if let Some(end) = this.end() {
                // Deliver data before the end.
                return Poll::Ready(if delivered { Ok(()) } else { end });
            }
            match this.open(buf, delivered) {
                Ok(true) => {}
                Ok(false) if delivered => return Poll::Ready(Ok(())),
                Ok(false) => ready!(this.poll_fill(cx))?,
                Err(failure) => {
                    this.fail(failure);
                    // Try once to send the alert.
                    let _sent = this.poll_drain(cx);
                }
            }
        }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TlsStream<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.check_writable()?;
        let length = bufs.iter().map(|buf| buf.len()).sum();
        if length == 0 {
            return Poll::Ready(Ok(0));
        }
        if !this.output.fits(length) {
            ready!(this.poll_drain(cx))?;
        }
        let sealed = this.protocol.seal(bufs, &mut this.output);
        Poll::Ready(sealed.map_err(|error| {
            // Sealed records can still be flushed.
            this.fail(Failure { alert: None, error: error.clone() });
            invalid(error)
        }))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_drain(cx))?;
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.check_writable().is_ok() {
            let close = AlertDescription::CloseNotify;
            this.protocol.seal_alert(close, &mut this.output).map_err(invalid)?;
            this.closed = true;
        }
        ready!(this.poll_drain(cx))?;
        match ready!(Pin::new(&mut this.io).poll_shutdown(cx)) {
            // The peer has already reset the connection.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Poll::Ready(Ok(())),
            ended => Poll::Ready(ended),
        }
    }
}

impl<T> fmt::Debug for TlsStream<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsStream").field("reading", &self.reading).finish_non_exhaustive()
    }
}

/// Wraps an error like tokio-rustls. `known_error` unwraps it.
fn invalid(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
