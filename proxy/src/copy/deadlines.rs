//! How long a connection may move nothing, and how its sockets outlive conntrack when one side has ended.
//!
//! Nothing here is done for a byte: a timer looks at how many have moved.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until};
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
    /// Watches over a connection of which both sides may still send, and which has moved so many bytes; nothing, and no timer, if it
    /// may rest for ever.
    pub(super) fn idle(&self, moved: u64) -> Option<Box<Watch>> {
        let rest = Rest::new(self.idle?, moved, idle_timeout);
        Some(Watch::new(Some(rest), None, self.probes))
    }

    /// The same for a connection of which one side has ended, from now on; its sockets are probed in time.
    pub(super) fn half_closed(&self, moved: u64) -> Box<Watch> {
        let half_close = self.half_close.filter(|limit| self.idle.is_none_or(|idle| *limit < idle));
        let rest = match (half_close, self.idle) {
            (Some(limit), _) => Some(Rest::new(limit, moved, half_close_timeout)),
            (None, Some(limit)) => Some(Rest::new(limit, moved, idle_timeout)),
            (None, None) => None,
        };
        Watch::new(rest, Some(Instant::now() + self.probes.after), self.probes)
    }
}

fn idle_timeout(after: Duration) -> ProxyError {
    ProxyError::IdleTimeout { after }
}

fn half_close_timeout(after: Duration) -> ProxyError {
    ProxyError::HalfCloseTimeout { after }
}

/// What is to be done for a connection at some later time, by one timer.
pub(super) struct Watch {
    /// Set for the first of the times below.
    timer: Pin<Box<Sleep>>,
    rest: Option<Rest>,
    probe_at: Option<Instant>,
    probes: Probes,
}

/// How long nothing has moved.
struct Rest {
    limit: Duration,
    late: fn(Duration) -> ProxyError,
    look_at: Instant,
    seen: u64,
    quiet: u32,
}

impl Watch {
    fn new(rest: Option<Rest>, probe_at: Option<Instant>, probes: Probes) -> Box<Self> {
        let due = first(rest.as_ref(), probe_at).unwrap_or_else(Instant::now);
        Box::new(Self { timer: Box::pin(sleep_until(due)), rest, probe_at, probes })
    }

    /// Ready when the connection, which has moved so many bytes so far, has rested for too long.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        moved: u64,
        sockets: &[Option<&TcpStream>],
    ) -> Poll<ProxyError> {
        while let Some(due) = first(self.rest.as_ref(), self.probe_at) {
            if self.timer.deadline() != due {
                self.timer.as_mut().reset(due);
            }
            ready!(self.timer.as_mut().poll(cx));
            let now = Instant::now();
            if self.probe_at.take_if(|at| *at <= now).is_some() {
                let Probes { first, every, .. } = self.probes;
                sockets.iter().flatten().for_each(|socket| probe_every(socket, first, every));
            }
            if let Some(rest) = self.rest.as_mut().filter(|rest| rest.look_at <= now)
                && rest.is_over(now, moved)
            {
                return Poll::Ready((rest.late)(rest.limit));
            }
        }
        Poll::Pending
    }
}

impl Rest {
    fn new(limit: Duration, moved: u64, late: fn(Duration) -> ProxyError) -> Self {
        Self { limit, late, look_at: Instant::now() + limit / LOOKS, seen: moved, quiet: 0 }
    }

    /// Looks whether anything has moved since the last look: whether that has been too long ago, by up to a quarter more.
    fn is_over(&mut self, now: Instant, moved: u64) -> bool {
        self.quiet = if moved == self.seen { self.quiet + 1 } else { 0 };
        (self.seen, self.look_at) = (moved, now + self.limit / LOOKS);
        self.quiet == LOOKS
    }
}

/// When something is to be done.
fn first(rest: Option<&Rest>, probe_at: Option<Instant>) -> Option<Instant> {
    [rest.map(|rest| rest.look_at), probe_at].into_iter().flatten().min()
}
