//! Gives up a peer that begins a frame, a header block or HTTP/2 itself and does not finish it.
//!
//! Not here: what is unfinished (`inspect.rs`), and closing the connection. Its owner polls
//! [`Overdue`] after the connection.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Sleep, sleep_until};

use crate::inspect::TunnelLimit;
use crate::tunnel_state::TunnelState;

/// The deadline of what one peer has begun.
#[derive(Debug)]
pub(crate) struct Overdue {
    tunnel_state: Arc<TunnelState>,
    after: Duration,
    /// Only while something is unfinished.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Overdue {
    pub(crate) fn new(tunnel_state: Arc<TunnelState>, after: Duration) -> Self {
        Self { tunnel_state, after, timer: None }
    }

    /// Ready when the peer has exceeded a limit, this deadline included. While a stream is open a
    /// DATA frame may take as long as the network needs: flow control bounds it, and keepalive
    /// notices a peer that is gone.
    pub(crate) fn poll_exceeded(
        &mut self,
        cx: &mut Context<'_>,
        streams_open: bool,
    ) -> Poll<TunnelLimit> {
        if let Some(limit) = self.tunnel_state.exceeded() {
            return Poll::Ready(limit);
        }
        let Some(since) = self.tunnel_state.unfinished_since(streams_open) else {
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
