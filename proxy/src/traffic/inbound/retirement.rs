//! Retires peers' tunnels by GOAWAY: before the first of both certificates expires, at the maximum
//! age, after a long time without streams, or when the proxy closes. A peer that also runs
//! underpass stops using a tunnel at the same age.
//!
//! ztunnel fails a request that it sends while GOAWAY is on its way. So GOAWAY waits for a moment
//! without streams, when a new one is least likely. A tunnel that always has streams gets it after
//! another tenth of the age.
//!
//! The tunnel itself refuses streams after expiry.

use std::pin::Pin;
use std::time::{Duration, SystemTime};

use tokio::time::{Instant, Sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use underpass_hbone::{Incoming, ServerTunnel};

use crate::node::Node;
use crate::observe::metrics;

/// The interval of checks once a tunnel is due.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// The interval of checks while the proxy closes. They continue for [`CLOSING_DURATION`].
const CLOSING_CHECK_INTERVAL: Duration = Duration::from_millis(20);
const CLOSING_DURATION: Duration = Duration::from_secs(1);
/// The number of checks per idle timeout. A tunnel retires at most one check interval late.
const IDLE_CHECKS: u32 = 8;

/// The retirement timer of one tunnel.
pub(super) struct Retirement {
    timer: Pin<Box<Sleep>>,
    plan: Plan,
    is_closing: bool,
    is_drained: bool,
}

/// The times at which a tunnel retires.
#[derive(Debug)]
struct Plan {
    due: Instant,
    deadline: Instant,
    /// The idle timeout.
    idle: Duration,
    check_interval: Duration,
    reason: &'static str,
}

/// The result of a check.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Retire(&'static str),
    CheckAgain(Instant),
}

impl Retirement {
    pub(super) fn new(node: &Node, tunnel: &ServerTunnel) -> Self {
        let valid = tunnel.usable_until().duration_since(SystemTime::now()).unwrap_or_default();
        let plan = Plan::new(valid, node.tunnels.max_age, node.timeouts.tunnel_idle);
        let first = plan.due.min(Instant::now() + plan.idle);
        let timer = Box::pin(sleep_until(first));
        Self { timer, plan, is_closing: false, is_drained: false }
    }

    /// Waits for the next CONNECT request. Sends GOAWAY when the tunnel is due.
    pub(super) async fn next_request(
        &mut self,
        closing: &CancellationToken,
        tunnel: &mut ServerTunnel,
    ) -> Option<Incoming> {
        while !self.is_drained {
            tokio::select! {
                request = tunnel.next() => return request,
                () = closing.cancelled(), if !self.is_closing => self.close_soon(),
                () = &mut self.timer => match self.plan.check(Instant::now(), tunnel.idle()) {
                    Verdict::CheckAgain(at) => self.timer.as_mut().reset(at),
                    Verdict::Retire(reason) => {
                        metrics::tunnel_closed(reason);
                        tunnel.drain();
                        self.is_drained = true;
                    }
                }
            }
        }
        tunnel.next().await
    }

    fn close_soon(&mut self) {
        let now = Instant::now();
        self.plan.close_soon(now);
        self.timer.as_mut().reset(now);
        self.is_closing = true;
    }
}

impl Plan {
    /// A plan for certificates that are `valid` for this time. It leaves a tenth of that time, or
    /// of the age, to find a moment without streams. Half of that is for the peer's
    /// acknowledgement.
    fn new(valid: Duration, max_age: Duration, idle: Duration) -> Self {
        let now = Instant::now();
        let margin = max_age / 10;
        let lead = margin.min(valid / 10);
        let (before_expiry, age) = (valid.saturating_sub(lead), max_age);
        let reason = if before_expiry < age { "expiry" } else { "age" };
        let due = before_expiry.min(age);
        let deadline = (due + margin).min(valid.saturating_sub(lead / 2));
        Self {
            due: now + due,
            deadline: now + deadline,
            idle,
            check_interval: CHECK_INTERVAL,
            reason,
        }
    }

    fn close_soon(&mut self, now: Instant) {
        self.due = self.due.min(now);
        self.deadline = self.deadline.min(now + CLOSING_DURATION);
        self.check_interval = CLOSING_CHECK_INTERVAL;
        self.reason = "drain";
    }

    /// `idle` is the time without streams; `None` while there is one.
    fn check(&self, now: Instant, idle: Option<Duration>) -> Verdict {
        if now >= self.due && (idle.is_some() || now >= self.deadline) {
            return Verdict::Retire(self.reason);
        }
        if now >= self.due {
            return Verdict::CheckAgain(self.deadline.min(now + self.check_interval));
        }
        let check_after = match idle.map(|idle| self.idle.saturating_sub(idle)) {
            Some(Duration::ZERO) => return Verdict::Retire("idle"),
            Some(rest) => rest,
            None => (self.idle / IDLE_CHECKS).max(CLOSING_CHECK_INTERVAL),
        };
        Verdict::CheckAgain(self.due.min(now + check_after))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);
    const HOUR: Duration = Duration::from_secs(3600);
    const DAY: Duration = Duration::from_secs(24 * 3600);

    /// The time and the reason of the retirement of a tunnel without streams since `idle_from`.
    fn retires(plan: &Plan, start: Instant, idle_from: Duration) -> (Duration, &'static str) {
        let mut now = start + plan.idle.min(plan.due - start);
        loop {
            let idle = now.checked_duration_since(start + idle_from);
            match plan.check(now, idle) {
                Verdict::Retire(reason) => return (now - start, reason),
                Verdict::CheckAgain(at) => {
                    assert!(at > now);
                    now = at;
                }
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn tunnel_retires_before_its_certificate_expires() {
        let start = Instant::now();
        for valid in [Duration::from_secs(10), MINUTE, HOUR] {
            let plan = Plan::new(valid, HOUR, DAY);
            let (quiet, reason) = retires(&plan, start, Duration::ZERO);
            assert_eq!((quiet, reason), (valid - valid / 10, "expiry"));
            let (busy, reason) = retires(&plan, start, DAY);
            assert!(busy >= quiet && busy < valid, "{busy:?} of {valid:?}");
            assert_eq!(reason, "expiry");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn tunnel_retires_at_maximum_age_and_busy_one_a_tenth_later() {
        let (start, plan) = (Instant::now(), Plan::new(DAY, HOUR, DAY));
        assert_eq!(retires(&plan, start, Duration::ZERO), (HOUR, "age"));
        assert_eq!(retires(&plan, start, DAY), (HOUR + HOUR / 10, "age"));
    }

    #[tokio::test(start_paused = true)]
    async fn tunnel_without_streams_retires_when_idle() {
        let (start, plan) = (Instant::now(), Plan::new(DAY, HOUR, 8 * MINUTE));
        assert_eq!(retires(&plan, start, Duration::ZERO), (8 * MINUTE, "idle"));
        let (after, reason) = retires(&plan, start, 20 * MINUTE);
        assert!(after >= 28 * MINUTE && after <= 29 * MINUTE, "{after:?}");
        assert_eq!(reason, "idle");
    }

    #[tokio::test(start_paused = true)]
    async fn tunnel_retires_at_once_when_the_proxy_closes() {
        let (start, mut plan) = (Instant::now(), Plan::new(DAY, HOUR, MINUTE));
        plan.close_soon(start);
        assert_eq!(plan.check(start, Some(Duration::ZERO)), Verdict::Retire("drain"));
        let (busy, reason) = retires(&plan, start, DAY);
        assert_eq!((busy, reason), (CLOSING_DURATION, "drain"));
    }
}
