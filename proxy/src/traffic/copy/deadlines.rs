//! Idle deadlines of a connection, and keepalive probes that keep a half-closed one in conntrack.
//!
//! No code here runs per byte: a timer compares the connection's byte counter with its last value.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until};
use underpass_config::Timeouts;
use underpass_interception::enable_keepalive;

use crate::error::ProxyError;

/// The number of checks per idle deadline. The deadline fires at most one check interval late.
const CHECKS_PER_DEADLINE: u32 = 4;

/// The maximum times without a moved byte.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadlines {
    pub(crate) idle: Option<Duration>,
    pub(crate) half_close: Option<Duration>,
    pub(crate) probes: Probes,
}

/// The times of TCP keepalive probes on a half-closed connection.
///
/// After a FIN, conntrack removes a connection that is silent for 60 s
/// (`nf_conntrack_tcp_timeout_close_wait`). The address translation of a redirected connection is
/// then lost, and so are later packets (ztunnel #1699). A probe and its answer end the silence.
/// Probes also detect a peer that closed its socket instead of only shutting it down: its kernel
/// forgets the connection after 60 s (`tcp_fin_timeout`) and answers the next probe with RST.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Probes {
    /// The delay after the first FIN. Most connections have ended by then.
    pub(crate) after: Duration,
    /// The silence before the first probe. With `after` it is half of conntrack's timeout.
    pub(crate) first: Duration,
    /// The interval between probes.
    pub(crate) every: Duration,
}

impl Probes {
    /// The times for Linux's default timeouts.
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
    /// The timer of a connection that is open in both directions and has moved `moved` bytes;
    /// `None` without an idle deadline.
    pub(super) fn idle(&self, moved: u64) -> Option<Box<IdleTimer>> {
        let deadline = IdleDeadline::new(self.idle?, moved, idle_timeout);
        Some(IdleTimer::new(Some(deadline), None, self.probes))
    }

    /// The timer of a connection that is half-closed from now on. It also starts the probes.
    pub(super) fn half_closed(&self, moved: u64) -> Box<IdleTimer> {
        let half_close = self.half_close.filter(|limit| self.idle.is_none_or(|idle| *limit < idle));
        let deadline = match (half_close, self.idle) {
            (Some(limit), _) => Some(IdleDeadline::new(limit, moved, half_close_timeout)),
            (None, Some(limit)) => Some(IdleDeadline::new(limit, moved, idle_timeout)),
            (None, None) => None,
        };
        IdleTimer::new(deadline, Some(Instant::now() + self.probes.after), self.probes)
    }
}

fn idle_timeout(after: Duration) -> ProxyError {
    ProxyError::IdleTimeout { after }
}

fn half_close_timeout(after: Duration) -> ProxyError {
    ProxyError::HalfCloseTimeout { after }
}

/// The deadline of a connection and the start of its probes, on one timer.
pub(super) struct IdleTimer {
    /// Fires at the earlier of the next check and `probe_at`.
    timer: Pin<Box<Sleep>>,
    deadline: Option<IdleDeadline>,
    probe_at: Option<Instant>,
    probes: Probes,
}

/// Expires after `limit` without a moved byte.
struct IdleDeadline {
    limit: Duration,
    error: fn(Duration) -> ProxyError,
    check_at: Instant,
    /// The byte counter at the last check.
    moved: u64,
    /// The number of consecutive checks with an unchanged counter.
    idle_checks: u32,
}

impl IdleTimer {
    fn new(deadline: Option<IdleDeadline>, probe_at: Option<Instant>, probes: Probes) -> Box<Self> {
        let due = next_due(deadline.as_ref(), probe_at).unwrap_or_else(Instant::now);
        Box::new(Self { timer: Box::pin(sleep_until(due)), deadline, probe_at, probes })
    }

    /// Ready when the deadline has expired. `moved` is the connection's byte counter.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        moved: u64,
        sockets: &[Option<&TcpStream>],
    ) -> Poll<ProxyError> {
        while let Some(due) = next_due(self.deadline.as_ref(), self.probe_at) {
            if self.timer.deadline() != due {
                self.timer.as_mut().reset(due);
            }
            ready!(self.timer.as_mut().poll(cx));
            let now = Instant::now();
            if self.probe_at.take_if(|at| *at <= now).is_some() {
                let Probes { first, every, .. } = self.probes;
                sockets.iter().flatten().for_each(|socket| enable_keepalive(socket, first, every));
            }
            if let Some(deadline) = self.deadline.as_mut().filter(|one| one.check_at <= now)
                && deadline.is_expired(now, moved)
            {
                return Poll::Ready((deadline.error)(deadline.limit));
            }
        }
        Poll::Pending
    }
}

impl IdleDeadline {
    fn new(limit: Duration, moved: u64, error: fn(Duration) -> ProxyError) -> Self {
        Self {
            limit,
            error,
            check_at: Instant::now() + limit / CHECKS_PER_DEADLINE,
            moved,
            idle_checks: 0,
        }
    }

    /// Compares the byte counter with its last value. Expires up to a quarter of the limit late.
    fn is_expired(&mut self, now: Instant, moved: u64) -> bool {
        self.idle_checks = if moved == self.moved { self.idle_checks + 1 } else { 0 };
        (self.moved, self.check_at) = (moved, now + self.limit / CHECKS_PER_DEADLINE);
        self.idle_checks == CHECKS_PER_DEADLINE
    }
}

/// The next time at which the timer must fire.
fn next_due(deadline: Option<&IdleDeadline>, probe_at: Option<Instant>) -> Option<Instant> {
    [deadline.map(|deadline| deadline.check_at), probe_at].into_iter().flatten().min()
}
