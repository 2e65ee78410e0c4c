//! What a stream has received and its application has not read yet.
//!
//! h2 hands out slices of the buffers that it reads the connection into, and a buffer lives as long
//! as its last slice: one byte may hold 256 KiB. Data that is not read for a while is therefore
//! taken out of h2 and copied into buffers of its own size. Data that is read in time is never
//! copied.
//!
//! Not here: when to do that (`windows.rs`).

use std::collections::VecDeque;
use std::mem::take;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use h2::RecvStream;

/// Pieces of this length or more stay in h2's buffer, which is at most a few times as large, unless
/// the tunnel is crowded: copying them would cost bulk more than it saves.
const LARGE_PIECE: usize = 128 << 10;
/// Maximum length of a buffer that pieces are copied into.
const CHUNK: usize = 64 << 10;

/// The receiving half of one stream. Its reader and the task that drives the connection share it.
#[derive(Debug, Default)]
pub(super) struct Received(Mutex<Option<Queue>>);

#[derive(Debug)]
struct Queue {
    recv: RecvStream,
    /// Data that precedes what h2 has.
    copied: VecDeque<Bytes>,
    copied_bytes: usize,
    /// Length of the chunk that the reader works on: its flow control credit is still ours.
    unreturned: usize,
    /// How much of what h2 has was there at the last look already, in bytes.
    stale: usize,
}

impl Received {
    pub(super) fn attach(&self, recv: RecvStream) {
        let (copied, copied_bytes, unreturned, stale) = (VecDeque::new(), 0, 0, 0);
        *self.queue() = Some(Queue { recv, copied, copied_bytes, unreturned, stale });
    }

    /// Drops what was received, and lets h2 drop what follows.
    pub(super) fn detach(&self) {
        // h2 cleans up after its last handle: not under our lock.
        let _queue = self.queue().take();
    }

    /// The next chunk, never empty, and returns the credit of the one before.
    pub(super) fn poll_read(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, h2::Error>>> {
        match &mut *self.queue() {
            Some(queue) => queue.poll_read(cx),
            None => Poll::Ready(None),
        }
    }

    /// Whether everything has been read, and END_STREAM follows.
    pub(super) fn is_at_end(&self) -> bool {
        let queue = self.queue();
        queue.as_ref().is_none_or(|queue| queue.copied.is_empty() && queue.recv.is_end_stream())
    }

    /// Copies what h2 had at the last look and still has: how much is held in all, in bytes.
    pub(super) fn look(&self, crowded: bool) -> usize {
        self.queue().as_mut().map_or(0, |queue| queue.look(crowded))
    }

    fn queue(&self) -> MutexGuard<'_, Option<Queue>> {
        // Nothing panics while it is held.
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

    /// The next piece in h2's buffers, never empty: END_STREAM often comes on an empty frame.
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
            // Fails only for more than was received.
            let _returned = self.recv.flow_control().release_capacity(credit);
        }
    }

    fn look(&mut self, crowded: bool) -> usize {
        if self.stale > 0 {
            self.copy_stale(crowded);
        }
        let held = self.recv.flow_control().used_capacity();
        self.stale = held.saturating_sub(self.unreturned + self.copied_bytes);
        held
    }

    fn copy_stale(&mut self, crowded: bool) {
        let mut chunk = Vec::new();
        while self.stale > 0 {
            let room = self.stale.min(CHUNK);
            // Never pending, so that the reader's waker stays in place: `stale` bytes are there.
            let polled = self.poll_piece(&mut Context::from_waker(Waker::noop()));
            let Poll::Ready(Some(Ok(piece))) = polled else { break };
            self.copied_bytes += piece.len();
            if piece.len() >= LARGE_PIECE && !crowded {
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
