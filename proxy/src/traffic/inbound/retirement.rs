//! When a peer's tunnel takes no new streams any longer: shortly before the first of both
//! certificates expires, at the maximum age, at which a peer like ours has let it go by itself, or
//! when it has had no stream for long; at once if the proxy closes.
//!
//! A stock ztunnel fails a request that it opens while GOAWAY is on its way. So it is sent when no
//! stream is open, when a new one is least likely; only a tunnel that is never without one gets it
//! in the middle of them, after another tenth of the age.
//!
//! Not here: streams after expiry, which the tunnel itself refuses.

use std::pin::Pin;
use std::time::{Duration, SystemTime};

use tokio::time::{Instant, Sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use underpass_hbone::{Incoming, ServerTunnel};

use crate::node::Node;
use crate::observe::metrics;

/// How often a tunnel that is due is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// The same when the proxy closes, and for how long then.
const LOOK_IN_HASTE: Duration = Duration::from_millis(20);
const HASTE: Duration = Duration::from_secs(1);
/// How often a tunnel that had streams is looked at for having none: an idle one goes at most this
/// part later.
const IDLE_LOOKS: u32 = 8;

/// The watch over one tunnel.
pub(super) struct Retirement {
    timer: Pin<Box<Sleep>>,
    plan: Plan,
    hastened: bool,
    drained: bool,
}

/// The times at which a tunnel retires.
#[derive(Debug)]
struct Plan {
    due: Instant,
    at_the_latest: Instant,
    /// How long it may be without streams.
    idle: Duration,
    look: Duration,
    why: &'static str,
}

/// What a look at a tunnel has found.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Retire(&'static str),
    LookAgain(Instant),
}

impl Retirement {
    pub(super) fn new(node: &Node, tunnel: &ServerTunnel) -> Self {
        let valid = tunnel.usable_until().duration_since(SystemTime::now()).unwrap_or_default();
        let plan = Plan::new(valid, node.tunnels.max_age, node.timeouts.tunnel_idle);
        let first = plan.due.min(Instant::now() + plan.idle);
        let timer = Box::pin(sleep_until(first));
        Self { timer, plan, hastened: false, drained: false }
    }

    /// The next CONNECT request; once the tunnel is due, a GOAWAY asks the peer to send no more.
    pub(super) async fn next_request(
        &mut self,
        closing: &CancellationToken,
        tunnel: &mut ServerTunnel,
    ) -> Option<Incoming> {
        while !self.drained {
            tokio::select! {
                request = tunnel.next() => return request,
                () = closing.cancelled(), if !self.hastened => self.hasten(),
                () = &mut self.timer => match self.plan.judge(Instant::now(), tunnel.idle()) {
                    Verdict::LookAgain(at) => self.timer.as_mut().reset(at),
                    Verdict::Retire(why) => {
                        metrics::tunnel_closed(why);
                        tunnel.drain();
                        self.drained = true;
                    }
                }
            }
        }
        tunnel.next().await
    }

    fn hasten(&mut self) {
        let now = Instant::now();
        self.plan.hasten(now);
        self.timer.as_mut().reset(now);
        self.hastened = true;
    }
}

impl Plan {
    /// For certificates that are `valid` for so long. Before they expire a tenth of that time, or
    /// of the age, is left to find a moment without streams, and half of that for the peer to
    /// acknowledge.
    fn new(valid: Duration, max_age: Duration, idle: Duration) -> Self {
        let now = Instant::now();
        let slack = max_age / 10;
        let lead = slack.min(valid / 10);
        let (before_expiry, age) = (valid.saturating_sub(lead), max_age);
        let why = if before_expiry < age { "expiry" } else { "age" };
        let due = before_expiry.min(age);
        let at_the_latest = (due + slack).min(valid.saturating_sub(lead / 2));
        Self { due: now + due, at_the_latest: now + at_the_latest, idle, look: LOOK, why }
    }

    fn hasten(&mut self, now: Instant) {
        self.due = self.due.min(now);
        self.at_the_latest = self.at_the_latest.min(now + HASTE);
        self.look = LOOK_IN_HASTE;
        self.why = "drain";
    }

    /// `idle`: for how long there has been no stream; `None` while there is one.
    fn judge(&self, now: Instant, idle: Option<Duration>) -> Verdict {
        if now >= self.due && (idle.is_some() || now >= self.at_the_latest) {
            return Verdict::Retire(self.why);
        }
        if now >= self.due {
            return Verdict::LookAgain(self.at_the_latest.min(now + self.look));
        }
        let look = match idle.map(|idle| self.idle.saturating_sub(idle)) {
            Some(Duration::ZERO) => return Verdict::Retire("idle"),
            Some(rest) => rest,
            None => (self.idle / IDLE_LOOKS).max(LOOK_IN_HASTE),
        };
        Verdict::LookAgain(self.due.min(now + look))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);
    const HOUR: Duration = Duration::from_secs(3600);
    const DAY: Duration = Duration::from_secs(24 * 3600);

    /// When a tunnel retires that is without streams from `idle_from` on, and why.
    fn retires(plan: &Plan, start: Instant, idle_from: Duration) -> (Duration, &'static str) {
        let mut now = start + plan.idle.min(plan.due - start);
        loop {
            let idle = now.checked_duration_since(start + idle_from);
            match plan.judge(now, idle) {
                Verdict::Retire(why) => return (now - start, why),
                Verdict::LookAgain(at) => {
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
            let (quiet, why) = retires(&plan, start, Duration::ZERO);
            assert_eq!((quiet, why), (valid - valid / 10, "expiry"));
            let (busy, why) = retires(&plan, start, DAY);
            assert!(busy >= quiet && busy < valid, "{busy:?} of {valid:?}");
            assert_eq!(why, "expiry");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn tunnel_retires_at_its_age_and_busy_one_a_tenth_later() {
        let (start, plan) = (Instant::now(), Plan::new(DAY, HOUR, DAY));
        assert_eq!(retires(&plan, start, Duration::ZERO), (HOUR, "age"));
        assert_eq!(retires(&plan, start, DAY), (HOUR + HOUR / 10, "age"));
    }

    #[tokio::test(start_paused = true)]
    async fn tunnel_without_streams_retires_when_idle() {
        let (start, plan) = (Instant::now(), Plan::new(DAY, HOUR, 8 * MINUTE));
        assert_eq!(retires(&plan, start, Duration::ZERO), (8 * MINUTE, "idle"));
        let (after, why) = retires(&plan, start, 20 * MINUTE);
        assert!(after >= 28 * MINUTE && after <= 29 * MINUTE, "{after:?}");
        assert_eq!(why, "idle");
    }

    #[tokio::test(start_paused = true)]
    async fn tunnel_retires_at_once_when_the_proxy_closes() {
        let (start, mut plan) = (Instant::now(), Plan::new(DAY, HOUR, MINUTE));
        plan.hasten(start);
        assert_eq!(plan.judge(start, Some(Duration::ZERO)), Verdict::Retire("drain"));
        let (busy, why) = retires(&plan, start, DAY);
        assert_eq!((busy, why), (HASTE, "drain"));
    }
}
