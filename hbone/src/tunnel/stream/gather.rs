//! Gathers an application's small writes into larger DATA frames, if single frames would cost the
//! peer too much memory.
//!
//! Each unread frame costs its receiver some hundred bytes besides its payload. h2 counts 256 bytes
//! less the frame's length, and closes a connection with more than 25,600 of these (versions 0.4.16
//! to 0.4.18; later versions use the connection window). 100 unread writes of one byte would then
//! end all streams of a tunnel.
//!
//! * While the connection is blocked, small writes are gathered: they would have to wait anyway.
//! * While the peer shows no sign that its application reads, small frames are sent at growing
//!   intervals. Another underpass, identified by its first window, counts up to 64 MiB, and
//!   receives small frames at once.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::tunnel::tunnel_state::{OpenStream, TunnelState};

/// A write of fewer bytes is small.
pub(super) const SMALL: usize = 1024;
/// The maximum number of bytes that a stream gathers.
const MAX_GATHERED: usize = 16 << 10;
/// The length from which on h2 counts no extra cost for a frame.
const FREE_FRAME_LENGTH: u64 = 256;
/// The debt of a tunnel above which its streams are paced. Small frames add to the debt, large ones
/// reduce it. h2 closes the connection at 25,600.
const PACE_ABOVE: u64 = 14_000;
/// The number of small frames that a stream may send without pacing, for example a request.
const FREE_FRAMES: u32 = 2;
const FIRST_PAUSE: Duration = Duration::from_millis(1);
/// The maximum pause, which a user hardly notices. A stream of 1 KiB/s then sends frames of 256
/// bytes, which have no extra cost.
const MAX_PAUSE: Duration = Duration::from_millis(250);
/// The debt above which pauses grow to [`MAX_SLOW_PAUSE`]: close to the limit of h2.
const SLOW_ABOVE: u64 = 20_000;
/// The maximum pause above [`SLOW_ABOVE`].
const MAX_SLOW_PAUSE: Duration = Duration::from_secs(1);

/// The gathered data and the debt of one stream. Boxed, because most streams have neither.
#[derive(Debug, Default)]
pub(super) struct Gather(Option<Box<State>>);

#[derive(Debug, Default)]
struct State {
    bytes: BytesMut,
    /// The cost of this stream's small frames in h2's accounting, since the peer last showed that
    /// it reads.
    debt: u64,
    /// The number of these small frames.
    frames: u32,
    /// The pause after the last one.
    pause: Duration,
    /// The time at which the next small frame may be sent.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Gather {
    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn len(&self) -> usize {
        self.0.as_ref().map_or(0, |state| state.bytes.len())
    }

    /// Takes bytes from the front of `data`. Returns their number.
    pub(super) fn add(&mut self, data: &mut Bytes) -> usize {
        let part = data.split_to(data.len().min(MAX_GATHERED.saturating_sub(self.len())));
        self.0.get_or_insert_default().bytes.extend_from_slice(&part);
        part.len()
    }

    /// Removes up to `length` gathered bytes.
    pub(super) fn take(&mut self, length: usize) -> Bytes {
        let Some(state) = &mut self.0 else { return Bytes::new() };
        let part = state.bytes.split_to(length.min(state.bytes.len())).freeze();
        if state.bytes.is_empty() {
            // Release the memory, which earlier data may have enlarged.
            state.bytes = BytesMut::new();
        }
        part
    }

    /// Ready when the gathered data and `more` should be sent as a frame.
    pub(super) fn poll_may_send_small_frame(
        &mut self,
        cx: &mut Context<'_>,
        stream: u32,
        open: &OpenStream,
        more: usize,
    ) -> Poll<()> {
        let length = self.len().saturating_add(more);
        if length >= MAX_GATHERED {
            return Poll::Ready(());
        }
        if open.tunnel_state().back_pressure().poll_writable(stream, cx).is_pending() {
            return Poll::Pending;
        }
        let Some(state) = self.0.as_mut().filter(|_| (length as u64) < FREE_FRAME_LENGTH) else {
            return Poll::Ready(());
        };
        if !state.update_pacing(open) {
            return Poll::Ready(());
        }
        state.timer.as_mut().map_or(Poll::Ready(()), |timer| timer.as_mut().poll(cx))
    }

    /// Counts a frame of `length` bytes that was sent.
    pub(super) fn sent(&mut self, open: &OpenStream, length: usize) {
        let (activity, length) = (open.tunnel_state().activity(), length as u64);
        if length == 0 || activity.accepts_small_frames() {
            return;
        }
        let Some(cost) = FREE_FRAME_LENGTH.checked_sub(length).filter(|cost| *cost > 0) else {
            activity.reduce_small_frame_debt(length - FREE_FRAME_LENGTH);
            return;
        };
        activity.add_small_frame_debt(cost);
        self.0.get_or_insert_default().sent(open, cost);
    }

    /// Subtracts the debt of the stream from that of the tunnel when the stream ends.
    pub(super) fn settle(&mut self, tunnel_state: &TunnelState) {
        if let Some(state) = &mut self.0 {
            state.settle(tunnel_state);
        }
    }
}

impl State {
    fn sent(&mut self, open: &OpenStream, cost: u64) {
        self.debt += cost;
        self.frames = self.frames.saturating_add(1);
        if self.update_pacing(open) {
            let is_slow = open.tunnel_state().activity().small_frame_debt() >= SLOW_ABOVE;
            let longest = if is_slow { MAX_SLOW_PAUSE } else { MAX_PAUSE };
            self.pause = (self.pause * 2).clamp(FIRST_PAUSE, longest);
            let due = Instant::now() + self.pause;
            match &mut self.timer {
                Some(timer) => timer.as_mut().reset(due),
                None => self.timer = Some(Box::pin(sleep_until(due))),
            }
        }
    }

    /// Returns true if small frames of this stream must be paced. Settles the debt if the peer
    /// reads.
    fn update_pacing(&mut self, open: &OpenStream) -> bool {
        let tunnel_state = open.tunnel_state();
        if self.frames < FREE_FRAMES || tunnel_state.activity().accepts_small_frames() {
            return false;
        }
        if open.take_peer_read() {
            self.settle(tunnel_state);
            return false;
        }
        tunnel_state.activity().small_frame_debt() >= PACE_ABOVE
    }

    fn settle(&mut self, tunnel_state: &TunnelState) {
        tunnel_state.activity().reduce_small_frame_debt(std::mem::take(&mut self.debt));
        (self.frames, self.pause, self.timer) = (0, Duration::ZERO, None);
    }
}

#[cfg(test)]
mod tests;
