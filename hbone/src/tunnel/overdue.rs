//! Enforces the deadline for unfinished frames, header blocks, and the first SETTINGS of a peer.
//!
//! `inspect` detects them. The connection's task polls [`Overdue`] after the connection, and closes
//! it.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Sleep, sleep_until};

use crate::tunnel::inspect::TunnelLimit;
use crate::tunnel::tunnel_state::TunnelState;

/// The deadline for a peer's unfinished frame.
#[derive(Debug)]
pub(crate) struct Overdue {
    tunnel_state: Arc<TunnelState>,
    after: Duration,
    /// Present only while a frame is unfinished.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Overdue {
    pub(crate) fn new(tunnel_state: Arc<TunnelState>, after: Duration) -> Self {
        Self { tunnel_state, after, timer: None }
    }

    /// Ready when the peer has exceeded a limit or this deadline. While a stream is open, a DATA
    /// frame may take any time: flow control limits it, and keepalive detects a dead peer.
    pub(crate) fn poll_exceeded(
        &mut self,
        cx: &mut Context<'_>,
        has_streams: bool,
    ) -> Poll<TunnelLimit> {
        if let Some(limit) = self.tunnel_state.exceeded() {
            return Poll::Ready(limit);
        }
        let Some(since) = self.tunnel_state.unfinished_since(has_streams) else {
            self.timer = None;
            return Poll::Pending;
        };
        let due = since + self.after;
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(due)));
        if timer.deadline() != due {
            timer.as_mut().reset(due);
        }
        ready!(timer.as_mut().poll(cx));
        let limit = TunnelLimit::UnfinishedFrame;
        self.tunnel_state.exceed(limit);
        Poll::Ready(limit)
    }
}
