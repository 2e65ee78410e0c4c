//! A tunnelled byte stream: DATA frames in, DATA frames out, and an end that is never mistaken.
//!
//! Not here: copying between a tunnel and a socket.

mod gather;
mod io;

use std::future::poll_fn;
use std::mem::take;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};

use self::gather::{Gather, SMALL};
pub use self::io::TunnelIo;
pub(crate) use self::io::carried_error;
use crate::distrust::Distrust;
use crate::link::{Link, OpenStream};
use crate::{HboneError, PeerIdentity};

/// One accepted CONNECT: two directions that end independently.
#[derive(Debug)]
pub struct TunnelStream {
    reader: TunnelReader,
    writer: TunnelWriter,
}

/// The direction from the peer.
///
/// Dropping it before the end does not stop the peer: abort the writer for that.
#[derive(Debug)]
pub struct TunnelReader {
    recv: RecvStream,
    /// Length of the chunk that the caller works on: its flow control credit is still ours.
    unreturned: usize,
    open: Arc<OpenStream>,
}

/// The direction to the peer. Dropping it before [`TunnelWriter::finish`] aborts the stream.
#[derive(Debug)]
pub struct TunnelWriter {
    send: SendStream<Bytes>,
    /// END_STREAM was sent.
    ended: bool,
    /// RST_STREAM was.
    aborted: bool,
    /// Small writes that have not been sent.
    gather: Gather,
    open: Arc<OpenStream>,
}

impl TunnelStream {
    pub(crate) fn new(send: SendStream<Bytes>, recv: RecvStream, open: OpenStream) -> Self {
        let open = Arc::new(open);
        let reader = TunnelReader::new(recv, open.clone());
        let gather = Gather::default();
        Self { reader, writer: TunnelWriter { send, ended: false, aborted: false, gather, open } }
    }

    /// Who is at the other end of the tunnel.
    pub fn peer(&self) -> &PeerIdentity {
        self.reader.link().peer()
    }

    /// Waits until the peer is not to be trusted any longer, as when its certificate is revoked. Reading tells that only behind what
    /// was received before, and writing only when there is something to write. Cancel-safe; may never return.
    pub fn distrusted(&self) -> Distrust {
        self.reader.link().distrusted()
    }

    /// The two directions. The stream counts as open until both are dropped.
    pub fn split(self) -> (TunnelReader, TunnelWriter) {
        (self.reader, self.writer)
    }
}

impl TunnelReader {
    fn new(mut recv: RecvStream, open: Arc<OpenStream>) -> Self {
        open.link().unread().add(recv.flow_control(), &open);
        Self { recv, unreturned: 0, open }
    }

    /// The next chunk, never empty; `None` after END_STREAM and only then. Cancel-safe.
    ///
    /// The peer may send as much again as the chunk was long when the next one is asked for: whoever does not
    /// read holds the peer back.
    ///
    /// # Errors
    /// [`HboneError::Reset`] for any RST_STREAM, [`HboneError::Lost`] or its cause when the connection ended:
    /// what was read so far may be a part only.
    pub async fn read(&mut self) -> Result<Option<Bytes>, HboneError> {
        poll_fn(|cx| self.poll_read(cx)).await
    }

    /// [`TunnelReader::read`] for who is no `async fn`.
    ///
    /// # Errors
    /// As there.
    pub fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, HboneError>> {
        self.return_credit();
        loop {
            match ready!(self.recv.poll_data(cx)) {
                // END_STREAM often comes on an empty frame.
                Some(Ok(chunk)) if chunk.is_empty() => {}
                Some(Ok(chunk)) => {
                    self.unreturned = chunk.len();
                    self.link().activity().count_useful(chunk.len());
                    // Most answers follow a request that was read.
                    self.open.note_sign_of_reading();
                    return Poll::Ready(Ok(Some(chunk)));
                }
                Some(Err(error)) => return Poll::Ready(Err(self.link().stream_error(error))),
                None => return Poll::Ready(Ok(None)),
            }
        }
    }

    /// Whether all that the peer sent has been read, and END_STREAM is known to be behind it.
    pub fn is_at_end(&self) -> bool {
        self.recv.is_end_stream()
    }

    fn return_credit(&mut self) {
        let credit = take(&mut self.unreturned);
        if credit > 0 {
            // Fails only for more than was received.
            let _returned = self.recv.flow_control().release_capacity(credit);
        }
    }

    fn link(&self) -> &Arc<Link> {
        self.open.link()
    }
}

impl Drop for TunnelReader {
    fn drop(&mut self) {
        self.link().unread().remove(self.recv.stream_id());
    }
}

impl TunnelWriter {
    /// Queues all of `data`, waiting for the peer's window and our own buffer; nothing is copied.
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

    /// Queues as much from the front of `data`, which must not be empty, as there is room for, and says how much that was.
    /// If it is the `last`, the frame with the end of it carries END_STREAM too: nothing may be written after that.
    ///
    /// Small writes may be gathered (`gather.rs`): call [`TunnelWriter::poll_flush`] when there is
    /// nothing more to write for now.
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
        if !last && !self.gather.is_empty() && data.len() < SMALL {
            // One frame for both. What finds no room stays gathered.
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

    /// Sends what was gathered, when it is time. Ready when nothing is left.
    ///
    /// # Errors
    /// As [`TunnelWriter::write`].
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), HboneError>> {
        if self.gather.is_empty() {
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_due(cx, 0));
        self.poll_gathered(cx)
    }

    /// Ready when a frame of `length` bytes may be sent beside what is gathered, though it is
    /// small.
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

    /// Sends END_STREAM, unless it was sent: the peer reads a clean end behind all that was written. The other direction goes on.
    ///
    /// # Errors
    /// As [`TunnelWriter::write`].
    pub fn finish(&mut self) -> Result<(), HboneError> {
        if self.ended {
            return Ok(());
        }
        // Without waiting for room: it is little.
        let rest = self.gather.take(usize::MAX);
        self.send(rest, true)
    }

    /// Sends RST_STREAM(CONNECT_ERROR) for both directions, dropping what is queued; also after
    /// [`TunnelWriter::finish`]. The code is RFC 9113 section 8.5's for a TCP connection that was reset.
    pub fn abort(&mut self) {
        self.aborted = true;
        self.send.send_reset(Reason::CONNECT_ERROR);
    }

    /// Waits until the peer aborted the stream or the connection ended: for when there is nothing to write.
    /// Cancel-safe; never returns if both directions end well.
    pub async fn closed(&mut self) -> HboneError {
        poll_fn(|cx| self.poll_closed(cx)).await
    }

    /// How much may be sent now, of the `wanted` bytes or more; never 0.
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
        self.link().activity().count_useful(length);
        self.gather.sent(&self.open, length);
        self.send.send_data(frame, end).map_err(|error| self.refusal(error))?;
        self.ended = end;
        Ok(())
    }

    /// h2 only says that a closed stream cannot be written to; why it is closed is asked separately.
    fn refusal(&mut self, error: h2::Error) -> HboneError {
        match self.poll_closed(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(reason) => reason,
            Poll::Pending => self.link().stream_error(error),
        }
    }

    /// [`TunnelWriter::closed`] for who is no `async fn`.
    pub fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<HboneError> {
        self.send.poll_reset(cx).map(|closed| match closed {
            Ok(reason) => HboneError::Reset { reason },
            Err(error) => self.link().stream_error(error),
        })
    }

    fn link(&self) -> &Link {
        self.open.link()
    }
}

impl Drop for TunnelWriter {
    fn drop(&mut self) {
        self.gather.settle(self.open.link());
        self.open.link().back_pressure().forget(self.send.stream_id().as_u32());
        if !self.ended && !self.aborted {
            self.abort();
        }
    }
}

#[cfg(test)]
mod tests;
