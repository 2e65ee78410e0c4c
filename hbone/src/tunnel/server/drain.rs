//! What ends a tunnel whose client does not end it: a drain that it does not acknowledge, and
//! requests that are refused again and again.
//!
//! Not here: sending GOAWAY. The tunnel does.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep};

use crate::limits::token_bucket::TokenBucket;
use crate::tunnel::tunnel_state::TunnelState;

/// How long a client may open streams after GOAWAY: h2 sends the one that names the last stream
/// only when the client has acknowledged a PING (RFC 9113 section 6.8), which may wait behind bulk
/// as long as keepalive's answer.
const ACKNOWLEDGE_TIMEOUT: Duration = Duration::from_secs(30);
/// How often an overdue drain looks for the end of the last stream.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Refused requests (4xx, or REFUSED_STREAM after a drain) that a client may have at once, and in a
/// second after that. A client that a policy refuses, and that tries again for each of its
/// application's connections, is drained, not closed.
const REFUSED: u64 = 1000;
const REFUSED_PER_SECOND: u64 = 20;

/// A drain under way.
#[derive(Debug)]
pub(super) struct Drain {
    timer: Pin<Box<Sleep>>,
    /// Whether the client has had its time to acknowledge.
    pub(super) is_overdue: bool,
}

impl Drain {
    pub(super) fn new() -> Self {
        Self { timer: Box::pin(sleep(ACKNOWLEDGE_TIMEOUT)), is_overdue: false }
    }

    /// Ready when the drain is overdue and no stream is left.
    pub(super) fn poll_over(&mut self, cx: &mut Context<'_>, has_streams: bool) -> Poll<()> {
        while !self.is_overdue || has_streams {
            ready!(self.timer.as_mut().poll(cx));
            self.is_overdue = true;
            self.timer.as_mut().reset(Instant::now() + CHECK_INTERVAL);
        }
        Poll::Ready(())
    }
}

/// How many requests of one client were refused.
#[derive(Debug)]
pub(super) struct Refusals {
    seen: u64,
    budget: TokenBucket,
}

impl Default for Refusals {
    fn default() -> Self {
        Self { seen: 0, budget: TokenBucket::new(REFUSED, REFUSED_PER_SECOND) }
    }
}

impl Refusals {
    /// Counts those since the last call; whether an honest client may have as many.
    pub(super) fn are_bearable(&mut self, tunnel_state: &TunnelState) -> bool {
        let refused = tunnel_state.activity().refused();
        let new = refused.saturating_sub(self.seen);
        self.seen = refused;
        new == 0 || self.budget.take(new, tunnel_state.age(), 0)
    }

    /// Counts from now on as from the beginning.
    pub(super) fn restart(&mut self, tunnel_state: &TunnelState) {
        *self = Self { seen: tunnel_state.activity().refused(), ..Self::default() };
    }
}
