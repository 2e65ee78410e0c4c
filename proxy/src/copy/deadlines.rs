//! How long a connection may move nothing, and how its sockets outlive conntrack when one side has ended.
//!
//! Nothing here is done for a byte: a timer looks at how many have moved.

use std::convert::Infallible;
use std::future::pending;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::sleep;
use underpass_config::Timeouts;
use underpass_interception::probe_every;

use crate::error::ProxyError;

/// How often a deadline looks: this many times while it lasts, and so late by one of them at most.
const LOOKS: u32 = 4;

/// How long a connection may move nothing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadlines {
    pub(crate) idle: Option<Duration>,
    pub(crate) half_close: Option<Duration>,
    pub(crate) probes: Probes,
}

/// When and how often a half-closed connection is probed.
///
/// After a FIN, conntrack forgets a connection that is silent for 60 s (`nf_conntrack_tcp_timeout_close_wait`), and with it where
/// redirected packets belong: what comes later is lost (ztunnel #1699). Probes and their answers are no silence. They also find
/// out who did not shut down but close: its kernel forgets the connection after 60 s (`tcp_fin_timeout`), and then resets it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Probes {
    /// How long after the first FIN this begins: most connections have ended by then.
    pub(crate) after: Duration,
    /// The silence before the first probe; with `after`, half of what conntrack bears.
    pub(crate) first: Duration,
    pub(crate) every: Duration,
}

impl Probes {
    /// By Linux's defaults.
    pub(crate) const CONNTRACK: Self = Self {
        after: Duration::from_secs(10),
        first: Duration::from_secs(20),
        every: Duration::from_secs(10),
    };
}

impl From<&Timeouts> for Deadlines {
    fn from(timeouts: &Timeouts) -> Self {
        let Timeouts { idle, half_close, .. } = *timeouts;
        Self { idle, half_close, probes: Probes::CONNTRACK }
    }
}

impl Deadlines {
    /// Waits until a connection is idle of which both sides may still send; for ever, and without a timer, if it may be that.
    pub(super) async fn idle(&self, moved: impl Fn() -> u64) -> ProxyError {
        let Some(after) = self.idle else {
            return pending().await;
        };
        Box::pin(stalled(after, moved)).await;
        ProxyError::IdleTimeout { after }
    }

    /// The same for a connection of which one side has ended, from now on; its `sockets` are probed in time.
    pub(super) async fn half_closed(
        &self,
        sockets: &[&TcpStream],
        moved: impl Fn() -> u64,
    ) -> ProxyError {
        let probing = async {
            sleep(self.probes.after).await;
            for socket in sockets {
                probe_every(socket, self.probes.first, self.probes.every);
            }
            pending::<Infallible>().await
        };
        let late = async {
            let half_close =
                self.half_close.filter(|limit| self.idle.is_none_or(|idle| *limit < idle));
            let Some(after) = half_close else {
                return self.idle(moved).await;
            };
            stalled(after, moved).await;
            ProxyError::HalfCloseTimeout { after }
        };
        tokio::select! {
            late = late => late,
            never = probing => match never {},
        }
    }
}

/// Waits until `moved` has stayed the same for `limit`, or up to a quarter longer.
async fn stalled(limit: Duration, moved: impl Fn() -> u64) {
    let look = limit / LOOKS;
    let (mut seen, mut quiet) = (moved(), 0);
    while quiet < LOOKS {
        sleep(look).await;
        let now = moved();
        quiet = if now == seen { quiet + 1 } else { 0 };
        seen = now;
    }
}
