//! Detects a peer that is silent while streams are open, by PING (RFC 9113 section 6.7).
//!
//! The connection's task polls [`Keepalive`] after the connection, and drops the connection when it
//! is ready.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep};

use crate::error::HboneError;
use crate::tunnel::settings::KeepaliveSettings;
use crate::tunnel::tunnel_state::TunnelState;

/// ```text
///          a stream is open            quiet for `settings.ping_after`: PING
/// Dormant ──────────────────▶ Watching ──────────────────────────────▶ Awaiting ──▶ dead
///    ▲                         │     ▲                                    │   no data for
///    └─────────────────────────┘     └────────────────────────────────────┘  `settings.timeout`
///      no stream is open                             PONG
/// ```
#[derive(Debug, Clone, Copy)]
enum State {
    Dormant,
    Watching { since: Instant },
    Awaiting { since: Instant },
}

/// The keepalive timer of one connection.
#[derive(Debug)]
pub(crate) struct Keepalive {
    settings: KeepaliveSettings,
    tunnel_state: Arc<TunnelState>,
    ping: PingPong,
    timer: Pin<Box<Sleep>>,
    state: State,
}

impl Keepalive {
    /// Returns `None` if the connection's only [`PingPong`] is already in use.
    pub(crate) fn new(
        settings: KeepaliveSettings,
        tunnel_state: Arc<TunnelState>,
        ping: Option<PingPong>,
    ) -> Option<Self> {
        let timer = Box::pin(tokio::time::sleep(settings.ping_after));
        Some(Self { settings, tunnel_state, ping: ping?, timer, state: State::Dormant })
    }

    /// Ready when the peer is dead. Poll it after the connection, which counts received data.
    pub(crate) fn poll_dead(
        &mut self,
        cx: &mut Context<'_>,
        has_streams: bool,
    ) -> Poll<HboneError> {
        loop {
            match self.state {
                State::Dormant if !has_streams => return Poll::Pending,
                State::Dormant => self.watch(Instant::now()),
                State::Watching { since } => {
                    ready!(self.timer.as_mut().poll(cx));
                    let idle_since = self.tunnel_state.last_received().max(since);
                    if !has_streams {
                        self.state = State::Dormant;
                    } else if idle_since.elapsed() < self.settings.ping_after {
                        self.watch(idle_since);
                    } else if self.ping.send_ping(Ping::opaque()).is_ok() {
                        self.await_pong(Instant::now());
                    } else {
                        // The connection is ending, and reports its own error.
                        return Poll::Pending;
                    }
                }
                State::Awaiting { since } => {
                    if self.ping.poll_pong(cx).is_ready() {
                        self.watch(Instant::now());
                        continue;
                    }
                    ready!(self.timer.as_mut().poll(cx));
                    let received_at = self.tunnel_state.last_received();
                    if received_at <= since {
                        let silent = received_at.elapsed();
                        return Poll::Ready(HboneError::Unresponsive { silent });
                    }
                    // Data arrived, but no PONG: the PONG is queued behind the data, and the peer
                    // is alive.
                    self.await_pong(received_at);
                }
            }
        }
    }

    fn watch(&mut self, since: Instant) {
        self.timer.as_mut().reset(since + self.settings.ping_after);
        self.state = State::Watching { since };
    }

    fn await_pong(&mut self, since: Instant) {
        self.timer.as_mut().reset(since + self.settings.timeout);
        self.state = State::Awaiting { since };
    }
}

#[cfg(test)]
mod tests;
