//! Ends a tunnel that its client keeps open: after a drain that the client does not acknowledge, or
//! after too many refused requests.
//!
//! `server` sends GOAWAY.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep};

use crate::limits::token_bucket::TokenBucket;
use crate::tunnel::tunnel_state::TunnelState;

/// The time in which a client may open streams after GOAWAY. h2 sends the final GOAWAY only after
/// the client's answer to a PING (RFC 9113 section 6.8), which may be queued behind bulk data.
const ACKNOWLEDGE_TIMEOUT: Duration = Duration::from_secs(30);
/// The interval at which an overdue drain checks for open streams.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// The allowed number of refused requests (4xx, or REFUSED_STREAM after a drain): a burst, and a
/// rate per second. A client whose requests are denied by policies, and which retries for each
/// connection of its application, is drained but not closed.
const REFUSAL_BURST: u64 = 1000;
const REFUSALS_PER_SECOND: u64 = 20;

/// A drain in progress.
#[derive(Debug)]
pub(super) struct Drain {
    timer: Pin<Box<Sleep>>,
    /// True once the time to acknowledge has passed.
    pub(super) is_overdue: bool,
}

impl Drain {
    pub(super) fn new() -> Self {
        Self { timer: Box::pin(sleep(ACKNOWLEDGE_TIMEOUT)), is_overdue: false }
    }

    /// Ready if the drain is overdue and no stream is open.
    pub(super) fn poll_over(&mut self, cx: &mut Context<'_>, has_streams: bool) -> Poll<()> {
        while !self.is_overdue || has_streams {
            ready!(self.timer.as_mut().poll(cx));
            self.is_overdue = true;
            self.timer.as_mut().reset(Instant::now() + CHECK_INTERVAL);
        }
        Poll::Ready(())
    }
}

/// Counts a client's refused requests.
#[derive(Debug)]
pub(super) struct Refusals {
    seen: u64,
    budget: TokenBucket,
}

impl Default for Refusals {
    fn default() -> Self {
        Self { seen: 0, budget: TokenBucket::new(REFUSAL_BURST, REFUSALS_PER_SECOND) }
    }
}

impl Refusals {
    /// Counts refused requests since the last call. Returns true if they are within the limit.
    pub(super) fn are_within_limit(&mut self, tunnel_state: &TunnelState) -> bool {
        let refused = tunnel_state.activity().refused();
        let new = refused.saturating_sub(self.seen);
        self.seen = refused;
        new == 0 || self.budget.take(new, tunnel_state.age(), 0)
    }

    /// Discards the count so far.
    pub(super) fn restart(&mut self, tunnel_state: &TunnelState) {
        *self = Self { seen: tunnel_state.activity().refused(), ..Self::default() };
    }
}
