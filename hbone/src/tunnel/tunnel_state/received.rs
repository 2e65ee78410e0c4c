//! The data that a stream has received and its application has not read yet.
//!
//! h2 returns slices of its read buffers, and a slice of one byte may keep a buffer of 256 KiB
//! alive. Data that stays unread for a while is therefore copied into small buffers. Data that is
//! read in time is never copied.
//!
//! `windows` decides when to copy.

use std::collections::VecDeque;
use std::mem::take;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use h2::RecvStream;

/// The length from which on a piece is not copied, except if the tunnel is crowded. h2's buffer is
/// at most a few times larger, and copying would cost more than it saves.
const MIN_UNCOPIED_PIECE: usize = 128 << 10;
/// The maximum length of a buffer that pieces are copied into.
const MAX_CHUNK: usize = 64 << 10;

/// The receiving half of a stream. Its reader and the connection's task share it.
#[derive(Debug, Default)]
pub(super) struct Received(Mutex<Option<Queue>>);

#[derive(Debug)]
struct Queue {
    recv: RecvStream,
    /// Copied data, which precedes the data in h2.
    copied: VecDeque<Bytes>,
    copied_bytes: usize,
    /// The length of the chunk that the reader is processing. Its flow-control credit is not
    /// returned yet.
    unreturned: usize,
    /// The number of bytes that have been in h2 since before the last check.
    stale: usize,
}

impl Received {
    pub(super) fn attach(&self, recv: RecvStream) {
        let (copied, copied_bytes, unreturned, stale) = (VecDeque::new(), 0, 0, 0);
        *self.queue() = Some(Queue { recv, copied, copied_bytes, unreturned, stale });
    }

    /// Drops the received data, and lets h2 drop further data.
    pub(super) fn detach(&self) {
        // Drop h2's last handle outside of the lock: dropping it runs h2's cleanup.
        let _queue = self.queue().take();
    }

    /// Returns the next chunk, which is never empty, and the flow-control credit of the previous
    /// one.
    pub(super) fn poll_read(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, h2::Error>>> {
        match &mut *self.queue() {
            Some(queue) => queue.poll_read(cx),
            None => Poll::Ready(None),
        }
    }

    /// Returns true if all data has been read and END_STREAM was received.
    pub(super) fn is_at_end(&self) -> bool {
        let queue = self.queue();
        queue.as_ref().is_none_or(|queue| queue.copied.is_empty() && queue.recv.is_end_stream())
    }

    /// Copies data that has been in h2 since before the last check. Returns the number of unread
    /// bytes.
    pub(super) fn copy_stale(&self, crowded: bool) -> usize {
        self.queue().as_mut().map_or(0, |queue| queue.copy_stale(crowded))
    }

    fn queue(&self) -> MutexGuard<'_, Option<Queue>> {
        // No code panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, h2::Error>>> {
        self.return_credit();
        let chunk = match self.copied.pop_front() {
            Some(chunk) => {
                self.copied_bytes -= chunk.len();
                chunk
            }
            None => match ready!(self.poll_piece(cx)) {
                Some(Ok(piece)) => piece,
                end => return Poll::Ready(end),
            },
        };
        self.unreturned = chunk.len();
        Poll::Ready(Some(Ok(chunk)))
    }

    /// Returns the next piece in h2's buffers. Skips empty frames, which often carry END_STREAM.
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, h2::Error>>> {
        loop {
            let piece = match ready!(self.recv.poll_data(cx)) {
                Some(Ok(piece)) => piece,
                end => return Poll::Ready(end),
            };
            self.stale = self.stale.saturating_sub(piece.len());
            if !piece.is_empty() {
                return Poll::Ready(Some(Ok(piece)));
            }
        }
    }

    fn return_credit(&mut self) {
        let credit = take(&mut self.unreturned);
        if credit > 0 {
            // Fails only for more credit than was received.
            let _returned = self.recv.flow_control().release_capacity(credit);
        }
    }

    fn copy_stale(&mut self, crowded: bool) -> usize {
        if self.stale > 0 {
            self.copy_pieces(crowded);
        }
        let unread = self.recv.flow_control().used_capacity();
        self.stale = unread.saturating_sub(self.unreturned + self.copied_bytes);
        unread
    }

    fn copy_pieces(&mut self, crowded: bool) {
        let mut chunk = Vec::new();
        while self.stale > 0 {
            let room = self.stale.min(MAX_CHUNK);
            // Never pending, because `stale` bytes are available: the reader's waker stays
            // registered.
            let polled = self.poll_piece(&mut Context::from_waker(Waker::noop()));
            let Poll::Ready(Some(Ok(piece))) = polled else { break };
            self.copied_bytes += piece.len();
            if piece.len() >= MIN_UNCOPIED_PIECE && !crowded {
                self.push(take(&mut chunk));
                self.copied.push_back(piece);
                continue;
            }
            if chunk.len() + piece.len() > chunk.capacity() {
                self.push(take(&mut chunk));
                chunk.reserve_exact(room.max(piece.len()));
            }
            chunk.extend_from_slice(&piece);
        }
        self.push(chunk);
    }

    fn push(&mut self, chunk: Vec<u8>) {
        if !chunk.is_empty() {
            self.copied.push_back(chunk.into());
        }
    }
}

#[cfg(test)]
mod tests;
