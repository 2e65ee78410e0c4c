//! A tunnelled byte stream in DATA frames, with a reliable distinction between end and abort.
//!
//! Not here: copying between a tunnel and a socket.

mod gather;
mod io;

use std::future::poll_fn;
use std::mem::take;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream, StreamId};

use self::gather::{Gather, SMALL};
pub use self::io::TunnelIo;
use crate::error::HboneError;
use crate::tls::PeerIdentity;
use crate::tunnel::tunnel_state::{OpenStream, RevocationSignal, TunnelState};

/// An accepted CONNECT request: two directions that end independently.
#[derive(Debug)]
pub struct TunnelStream {
    reader: TunnelReader,
    writer: TunnelWriter,
}

/// The receiving direction.
///
/// Dropping it before the end does not stop the peer; abort the writer for that.
#[derive(Debug)]
pub struct TunnelReader {
    stream: StreamId,
    open: Arc<OpenStream>,
}

/// The sending direction. Dropping it before [`TunnelWriter::finish`] aborts the stream.
#[derive(Debug)]
pub struct TunnelWriter {
    send: SendStream<Bytes>,
    /// END_STREAM was sent.
    ended: bool,
    /// RST_STREAM was sent.
    aborted: bool,
    /// Small writes that have not been sent.
    gather: Gather,
    open: Arc<OpenStream>,
}

impl TunnelStream {
    /// A stream whose request was accepted.
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

    /// Completes when the peer is no longer trusted, for example when its certificate is revoked.
    /// Reads report that only after all received data, and writes only if there is data to write.
    /// Cancel-safe; may never complete.
    pub fn revocation(&self) -> RevocationSignal {
        self.reader.tunnel_state().revocation()
    }

    /// The two directions. The stream counts as open until both are dropped.
    pub fn split(self) -> (TunnelReader, TunnelWriter) {
        (self.reader, self.writer)
    }
}

impl TunnelReader {
    /// Starts to receive. Data before the request is accepted is bounded in the same way.
    pub(crate) fn new(recv: RecvStream, open: OpenStream) -> Self {
        let (stream, open) = (recv.stream_id(), Arc::new(open));
        open.receive(recv);
        Self { stream, open }
    }

    /// The next chunk, never empty; `None` after END_STREAM and only then. Cancel-safe.
    ///
    /// Reading the next chunk returns the flow control credit of this one: a reader that stops
    /// blocks the peer.
    ///
    /// # Errors
    /// [`HboneError::Reset`] for any RST_STREAM, [`HboneError::Lost`] or its cause if the
    /// connection ended: the data read so far may be incomplete.
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

    /// Whether all data has been read, and END_STREAM was received.
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
    /// Queues all of `data` without a copy; waits for the peer's window and our own buffer.
    ///
    /// Not cancel-safe: a part may have been sent.
    ///
    /// # Errors
    /// As [`TunnelReader::read`]; also when the stream was finished or aborted before.
    pub async fn write(&mut self, mut data: Bytes) -> Result<(), HboneError> {
        while !data.is_empty() {
            poll_fn(|cx| self.poll_send(cx, &mut data, false)).await?;
        }
        Ok(())
    }

    /// Queues as much from the front of `data`, which must not be empty, as there is room for;
    /// returns how much. If it is the `last`, its final frame carries END_STREAM too, and nothing
    /// may be written after it.
    ///
    /// Small writes may be gathered (`gather.rs`): call [`TunnelWriter::poll_flush`] when there is
    /// no more data for now.
    ///
    /// # Errors
    /// As [`TunnelWriter::write`].
    pub fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        data: &mut Bytes,
        last: bool,
    ) -> Poll<Result<usize, HboneError>> {
        if !last && data.len() < SMALL && self.poll_due(cx, data.len()).is_pending() {
            return Poll::Ready(Ok(self.gather.add(data)));
        }
        ready!(self.poll_writable(cx))?;
        if !last && !self.gather.is_empty() && data.len() < SMALL {
            // One frame for both. Data without room stays gathered.
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

    /// Sends gathered data when it is due. Ready when nothing is left.
    ///
    /// # Errors
    /// As [`TunnelWriter::write`].
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), HboneError>> {
        if self.gather.is_empty() {
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_due(cx, 0));
        ready!(self.poll_writable(cx))?;
        self.poll_gathered(cx)
    }

    /// Ready while the connection is not blocked. Until then the caller must keep its data and read
    /// no more: h2 would hold the entire read buffer of each piece.
    fn poll_writable(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), HboneError>> {
        let stream = self.send.stream_id().as_u32();
        if self.tunnel_state().back_pressure().poll_writable(stream, cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        self.poll_closed(cx).map(Err)
    }

    /// Ready when a small frame of `length` bytes, besides gathered data, may be sent.
    fn poll_due(&mut self, cx: &mut Context<'_>, length: usize) -> Poll<()> {
        self.gather.poll_due(cx, self.send.stream_id().as_u32(), &self.open, length)
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
        // Send the rest without waiting for room, because it is small.
        let rest = self.gather.take(usize::MAX);
        self.send(rest, true)
    }

    /// Sends RST_STREAM(CONNECT_ERROR) for both directions and drops queued data; also after
    /// [`TunnelWriter::finish`]. RFC 9113 section 8.5 specifies this code for a TCP connection that
    /// was reset.
    pub fn abort(&mut self) {
        self.aborted = true;
        self.send.send_reset(Reason::CONNECT_ERROR);
    }

    /// Waits until the peer aborts the stream or the connection ends, for times without data to
    /// write. Cancel-safe; never returns if both directions end cleanly.
    pub async fn closed(&mut self) -> HboneError {
        poll_fn(|cx| self.poll_closed(cx)).await
    }

    /// The number of bytes that may be sent now, which may exceed `wanted`; never 0.
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
                Some(Err(error)) => return Poll::Ready(Err(self.refusal(error))),
                None => return Poll::Ready(Err(self.refusal(Reason::STREAM_CLOSED.into()))),
            }
        }
    }

    fn send(&mut self, frame: Bytes, end: bool) -> Result<(), HboneError> {
        let length = frame.len();
        self.tunnel_state().activity().count_useful(length);
        self.gather.sent(&self.open, length);
        self.send.send_data(frame, end).map_err(|error| self.refusal(error))?;
        self.ended = end;
        Ok(())
    }

    /// h2 reports only that the stream is closed; its reason is queried separately.
    fn refusal(&mut self, error: h2::Error) -> HboneError {
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
