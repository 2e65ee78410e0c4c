//! A tunnelled byte stream in DATA frames. Its end and its abort are always distinguishable.
//!
//! The caller copies between a tunnel and a socket.

mod gather;
mod io;

use std::future::poll_fn;
use std::mem::take;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream, StreamId};
use tokio::time::Instant;

use self::gather::{Gather, SMALL};
pub use self::io::TunnelIo;
use crate::error::HboneError;
use crate::tls::PeerIdentity;
use crate::tunnel::tunnel_state::{OpenStream, RevocationSignal, TunnelState};

/// A byte stream in a tunnel: two directions that end independently.
#[derive(Debug)]
pub struct TunnelStream {
    reader: TunnelReader,
    writer: TunnelWriter,
}

/// The receiving direction.
///
/// Dropping it does not stop the peer from sending: abort the writer for that.
#[derive(Debug)]
pub struct TunnelReader {
    stream: StreamId,
    open: Arc<OpenStream>,
}

/// The sending direction. Dropping it before [`TunnelWriter::finish`] aborts the stream.
#[derive(Debug)]
pub struct TunnelWriter {
    send: SendStream<Bytes>,
    /// True once END_STREAM is sent.
    ended: bool,
    /// True once RST_STREAM is sent.
    aborted: bool,
    /// Small writes that are not sent yet.
    gather: Gather,
    open: Arc<OpenStream>,
}

impl TunnelStream {
    /// Creates a stream for an accepted request.
    pub(crate) fn new(send: SendStream<Bytes>, reader: TunnelReader) -> Self {
        let open = reader.open.clone();
        open.count();
        let gather = Gather::default();
        Self { reader, writer: TunnelWriter { send, ended: false, aborted: false, gather, open } }
    }

    /// The identity of the peer.
    pub fn peer(&self) -> &PeerIdentity {
        self.reader.tunnel_state().peer()
    }

    /// The start and the end of the TLS handshake of the stream's tunnel.
    pub fn handshake(&self) -> [Instant; 2] {
        self.reader.tunnel_state().handshake()
    }

    /// Returns a signal that completes when the peer is no longer trusted, for example when its
    /// certificate is revoked. Reads report this only after all received data, and writes only when
    /// there is data to write. Cancel-safe.
    pub fn revocation(&self) -> RevocationSignal {
        self.reader.tunnel_state().revocation()
    }

    /// Splits the stream into its directions. It counts as open until both are dropped.
    pub fn split(self) -> (TunnelReader, TunnelWriter) {
        (self.reader, self.writer)
    }
}

impl TunnelReader {
    /// Starts to receive. Data that arrives before the request is accepted counts against the same
    /// windows.
    pub(crate) fn new(recv: RecvStream, open: OpenStream) -> Self {
        let (stream, open) = (recv.stream_id(), Arc::new(open));
        open.receive(recv);
        Self { stream, open }
    }

    /// Reads the next chunk, which is never empty. `None` means END_STREAM. Cancel-safe.
    ///
    /// The next call returns the flow-control credit of this chunk, so that a reader that stops
    /// also stops the peer.
    ///
    /// # Errors
    /// [`HboneError::Reset`] for any RST_STREAM. [`HboneError::Lost`] or its cause if the
    /// connection ended: the received data may be incomplete.
    pub async fn read(&mut self) -> Result<Option<Bytes>, HboneError> {
        poll_fn(|cx| self.poll_read(cx)).await
    }

    /// [`TunnelReader::read`] as a poll function.
    ///
    /// # Errors
    /// Like [`TunnelReader::read`].
    pub fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, HboneError>> {
        match ready!(self.open.poll_received(cx)) {
            Some(Ok(chunk)) => {
                self.tunnel_state().activity().count_useful(chunk.len());
                // Received data usually means that the peer's application has read our request.
                self.open.record_peer_read();
                Poll::Ready(Ok(Some(chunk)))
            }
            Some(Err(error)) => Poll::Ready(Err(self.tunnel_state().stream_error(error))),
            None => Poll::Ready(Ok(None)),
        }
    }

    /// Returns true if all data has been read and END_STREAM was received.
    pub fn is_at_end(&self) -> bool {
        self.open.is_at_end()
    }

    pub(crate) fn tunnel_state(&self) -> &Arc<TunnelState> {
        self.open.tunnel_state()
    }
}

impl Drop for TunnelReader {
    fn drop(&mut self) {
        self.open.stop_receiving(self.stream);
    }
}

impl TunnelWriter {
    /// Queues `data` without a copy. Waits for the peer's window and for buffer space.
    ///
    /// Not cancel-safe: a part may have been sent.
    ///
    /// # Errors
    /// Those of [`TunnelReader::read`], and an error if the stream was finished or aborted before.
    pub async fn write(&mut self, mut data: Bytes) -> Result<(), HboneError> {
        while !data.is_empty() {
            poll_fn(|cx| self.poll_send(cx, &mut data, false)).await?;
        }
        Ok(())
    }

    /// Queues as much from the front of `data` as there is space for, and returns the number of
    /// bytes. `data` must not be empty. If `last` is true, the final frame also carries END_STREAM,
    /// and nothing may be written after it.
    ///
    /// May gather small writes: call [`TunnelWriter::poll_flush`] when there is no more data for
    /// now.
    ///
    /// # Errors
    /// As [`TunnelWriter::write`].
    pub fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        data: &mut Bytes,
        last: bool,
    ) -> Poll<Result<usize, HboneError>> {
        if !last
            && data.len() < SMALL
            && self.poll_may_send_small_frame(cx, data.len()).is_pending()
        {
            return Poll::Ready(Ok(self.gather.add(data)));
        }
        ready!(self.poll_writable(cx))?;
        if !last && !self.gather.is_empty() && data.len() < SMALL {
            // Gathered data and new data share a frame. Data for which there is no space stays
            // gathered.
            let added = self.gather.add(data);
            if added > 0 {
                return match self.poll_gathered(cx) {
                    Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
                    Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(added)),
                };
            }
        }
        ready!(self.poll_gathered(cx))?;
        self.poll_send(cx, data, last)
    }

    /// Sends gathered data when it is due. Ready when no gathered data is left.
    ///
    /// # Errors
    /// As [`TunnelWriter::write`].
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), HboneError>> {
        if self.gather.is_empty() {
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_may_send_small_frame(cx, 0));
        ready!(self.poll_writable(cx))?;
        self.poll_gathered(cx)
    }

    /// Ready while the connection is not blocked. While it is pending, the caller must keep its
    /// data and read no more: h2 would keep the entire read buffer for each small piece.
    fn poll_writable(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), HboneError>> {
        let stream = self.send.stream_id().as_u32();
        if self.tunnel_state().back_pressure().poll_writable(stream, cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        self.poll_closed(cx).map(Err)
    }

    /// Ready when a small frame may be sent: `length` bytes and the gathered data.
    fn poll_may_send_small_frame(&mut self, cx: &mut Context<'_>, length: usize) -> Poll<()> {
        self.gather.poll_may_send_small_frame(
            cx,
            self.send.stream_id().as_u32(),
            &self.open,
            length,
        )
    }

    fn poll_gathered(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), HboneError>> {
        while !self.gather.is_empty() {
            let capacity = ready!(self.poll_capacity(cx, self.gather.len()))?;
            let frame = self.gather.take(capacity);
            self.send(frame, false)?;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        data: &mut Bytes,
        last: bool,
    ) -> Poll<Result<usize, HboneError>> {
        let capacity = ready!(self.poll_capacity(cx, data.len()))?;
        let frame = if capacity < data.len() { data.split_to(capacity) } else { take(data) };
        let length = frame.len();
        self.send(frame, last && data.is_empty())?;
        Poll::Ready(Ok(length))
    }

    /// Sends END_STREAM once: the peer reads a clean end after all written data. The other
    /// direction stays open.
    ///
    /// # Errors
    /// As [`TunnelWriter::write`].
    pub fn finish(&mut self) -> Result<(), HboneError> {
        if self.ended {
            return Ok(());
        }
        // Send the gathered data without waiting for space, because it is small.
        let rest = self.gather.take(usize::MAX);
        self.send(rest, true)
    }

    /// Sends RST_STREAM(CONNECT_ERROR) for both directions, and drops queued data. Also possible
    /// after [`TunnelWriter::finish`]. RFC 9113 section 8.5 requires this code for a reset TCP
    /// connection.
    pub fn abort(&mut self) {
        self.aborted = true;
        self.send.send_reset(Reason::CONNECT_ERROR);
    }

    /// Waits until the peer aborts the stream or the connection ends. Callers without data to write
    /// use it. Never returns if both directions end cleanly. Cancel-safe.
    pub async fn closed(&mut self) -> HboneError {
        poll_fn(|cx| self.poll_closed(cx)).await
    }

    /// Waits for space to send. Returns the number of bytes, which is never 0 and may exceed
    /// `wanted`.
    fn poll_capacity(
        &mut self,
        cx: &mut Context<'_>,
        wanted: usize,
    ) -> Poll<Result<usize, HboneError>> {
        self.send.reserve_capacity(wanted);
        loop {
            let capacity = self.send.capacity();
            if capacity > 0 {
                return Poll::Ready(Ok(capacity));
            }
            match ready!(self.send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(self.closing_error(error))),
                None => return Poll::Ready(Err(self.closing_error(Reason::STREAM_CLOSED.into()))),
            }
        }
    }

    fn send(&mut self, frame: Bytes, end: bool) -> Result<(), HboneError> {
        let length = frame.len();
        self.tunnel_state().activity().count_useful(length);
        self.gather.sent(&self.open, length);
        self.send.send_data(frame, end).map_err(|error| self.closing_error(error))?;
        self.ended = end;
        Ok(())
    }

    /// The reason why the stream is closed. h2 returns only that it is closed.
    fn closing_error(&mut self, error: h2::Error) -> HboneError {
        match self.poll_closed(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(reason) => reason,
            Poll::Pending => self.tunnel_state().stream_error(error),
        }
    }

    /// [`TunnelWriter::closed`] as a poll function.
    pub fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<HboneError> {
        self.send.poll_reset(cx).map(|closed| match closed {
            Ok(reason) => HboneError::Reset { reason },
            Err(error) => self.tunnel_state().stream_error(error),
        })
    }

    fn tunnel_state(&self) -> &TunnelState {
        self.open.tunnel_state()
    }
}

impl Drop for TunnelWriter {
    fn drop(&mut self) {
        self.gather.settle(self.open.tunnel_state());
        self.open.tunnel_state().back_pressure().remove_stream(self.send.stream_id().as_u32());
        if !self.ended && !self.aborted {
            self.abort();
        }
    }
}

#[cfg(test)]
mod tests;
