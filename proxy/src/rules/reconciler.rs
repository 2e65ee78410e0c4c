//! Reconciles the rules: repairs changes by other programs, and applies changed settings.
//!
//! ```text
//! verify ── same ──────────────▶ wait for a change
//!   └─ different ─▶ block ─▶ repair ─▶ verify ── same, no fight ─▶ unblock
//!                     ▲                  └─ a fight ─▶ wait (back-off)
//!                     │                                   ▼
//!                     └────────── different ─────────── verify ── same for CALM ─▶ unblock
//! ```
//!
//! The blackhole is installed from the detection of a difference until the rules are verified, so
//! that no traffic leaves in plaintext. Repairs never stop: in a fight with another program they
//! only slow down.
//!
//! Not here: comparing, installing and blocking (the interception crate).

use std::collections::VecDeque;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use underpass_config::{Hint as _, InterceptionSettings};
use underpass_interception::{
    Changes, Difference, Interception, InterceptionError, NamespaceAccess,
};

/// This many repairs within [`WINDOW`] are a fight with another program.
const FIGHT: usize = 3;
const WINDOW: Duration = Duration::from_secs(10);
/// The pause after a repair in a fight: doubled each time, between these bounds.
const FIRST_PAUSE: Duration = Duration::from_millis(25);
const LONGEST_PAUSE: Duration = Duration::from_millis(400);
/// A fight ends when the rules have been intact for this long.
const INTACT_TIME: Duration = Duration::from_secs(2);
/// The pause before the next attempt after a failure.
const RETRY: Duration = Duration::from_secs(1);

/// A change in the state of the rules.
#[derive(Debug)]
pub(crate) enum Event {
    /// Repaired a change by another program. `fight`: the blackhole is still installed.
    Repaired { difference: Difference, took: Duration, fight: bool },
    /// Applied changed settings. `blocked`: the blackhole is still installed.
    Followed { rules: usize, blocked: bool },
    /// The rules are verified after a fight or a failure, and the blackhole is removed.
    Intact,
    /// Another program changes the rules repeatedly. Reported once for each fight.
    Fight { difference: Difference },
    /// The rules could not be read or repaired. The next attempt is after `pause`.
    Failed { error: InterceptionError, pause: Duration },
}

impl Event {
    /// Whether the rules are installed and the blackhole is not.
    pub(crate) fn is_intact(&self) -> bool {
        match self {
            Self::Repaired { fight, .. } => !fight,
            Self::Followed { blocked, .. } => !blocked,
            Self::Intact => true,
            Self::Fight { .. } | Self::Failed { .. } => false,
        }
    }
}

/// Reconciles the rules of one network namespace.
#[derive(Debug)]
pub(crate) struct RuleReconciler {
    interception: Interception,
    changes: Changes,
    repairs: Repairs,
    /// When to verify without a notification.
    verify_at: Option<Instant>,
    /// Whether the last event said that the rules are not intact.
    lost: bool,
    /// Whether the blackhole may be installed.
    blocked: bool,
    /// A fight that has not been reported yet.
    unreported: Option<Difference>,
}

impl RuleReconciler {
    /// Subscribes to changes: no later change is missed.
    pub(crate) async fn new(interception: Interception) -> Result<Self, InterceptionError> {
        let changes = interception.changes().await?;
        Ok(Self {
            interception,
            changes,
            repairs: Repairs::default(),
            verify_at: Some(Instant::now()),
            lost: false,
            blocked: false,
            unreported: None,
        })
    }

    /// The network namespace of the rules.
    pub(crate) fn access(&self) -> NamespaceAccess {
        self.interception.access().clone()
    }

    /// Waits for the next event. Cancelling it does not stop a started operation on the rules
    /// ([`NamespaceAccess::finish`]).
    pub(crate) async fn next(
        &mut self,
        settings: &mut watch::Receiver<InterceptionSettings>,
    ) -> Event {
        loop {
            let outcome = self.step(settings).await;
            match outcome {
                Ok(None) => {}
                Ok(Some(event)) => {
                    self.lost = !event.is_intact();
                    return event;
                }
                Err(error) => {
                    self.lost = true;
                    self.verify_at = Some(Instant::now() + RETRY);
                    return Event::Failed { error, pause: RETRY };
                }
            }
        }
    }

    /// Reports the rules as intact once they are verified.
    pub(crate) fn assume_lost(&mut self) {
        self.lost = true;
    }

    /// Verifies the rules at the next call of [`next`](Self::next).
    pub(crate) fn verify_now(&mut self) {
        self.verify_at = Some(Instant::now());
    }

    /// Handles one change of the rules, change of the settings, or end of a pause.
    async fn step(
        &mut self,
        settings: &mut watch::Receiver<InterceptionSettings>,
    ) -> Result<Option<Event>, InterceptionError> {
        if let Some(difference) = self.unreported.take() {
            return Ok(Some(Event::Fight { difference }));
        }
        let pause = async {
            match self.verify_at {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let pausing = self.verify_at.is_some();
        tokio::select! {
            () = pause => self.verify().await,
            changed = self.changes.next(), if !pausing => {
                changed?;
                self.verify().await
            }
            Ok(()) = settings.changed() => {
                let settings = settings.borrow_and_update().clone();
                self.follow(&settings).await.map(Some)
            }
        }
    }

    async fn verify(&mut self) -> Result<Option<Event>, InterceptionError> {
        self.verify_at = None;
        let began = Instant::now();
        let difference = loop {
            if self.interception.follow_ipv6().await? {
                tracing::info!(
                    "IPv6 is enabled on the loopback interface now: its routes are installed"
                );
            }
            match self.interception.verify().await? {
                None => return self.accept_intact().await,
                Some(_) if self.interception.ipv6_has_changed().await? => {}
                Some(difference) => break difference,
            }
        };
        // Block before repairing: until the repair is done, traffic is not caught.
        self.block().await;
        self.interception.repair().await?;
        let pause = self.repairs.add(Instant::now());
        if pause.is_zero() && self.interception.verify().await?.is_none() {
            self.unblock().await?;
            let took = began.elapsed();
            return Ok(Some(Event::Repaired { difference, took, fight: false }));
        }
        self.verify_at = Some(Instant::now() + pause);
        if self.repairs.report_fight() {
            self.unreported = Some(difference.clone());
        }
        Ok(Some(Event::Repaired { difference, took: began.elapsed(), fight: true }))
    }

    /// The rules are intact. Ends a fight after [`INTACT_TIME`].
    async fn accept_intact(&mut self) -> Result<Option<Event>, InterceptionError> {
        let now = Instant::now();
        if let Some(calm) = self.repairs.calm_at().filter(|calm| *calm > now) {
            self.verify_at = Some(calm.min(now + LONGEST_PAUSE));
            return Ok(None);
        }
        self.repairs.end_fight();
        if self.blocked {
            self.unblock().await?;
        }
        Ok(self.lost.then_some(Event::Intact))
    }

    /// Installs the blackhole. Repairs continue without it if the kernel refuses it.
    async fn block(&mut self) {
        self.blocked = true;
        if let Err(error) = self.interception.block().await {
            let (error, hint) = (crate::error::chain(&error), error.hint());
            tracing::error!(
                error,
                hint = hint.as_deref(),
                "cannot install the blackhole: traffic may leave in plaintext until the rules are repaired"
            );
        }
    }

    async fn unblock(&mut self) -> Result<(), InterceptionError> {
        self.interception.unblock().await?;
        self.blocked = false;
        Ok(())
    }

    async fn follow(
        &mut self,
        settings: &InterceptionSettings,
    ) -> Result<Event, InterceptionError> {
        // A later verification retries a failed installation. In a fight the blackhole keeps the
        // exemptions of the old settings until it is removed.
        self.interception = self.interception.with_settings(settings);
        self.interception.repair().await?;
        let rules = self.interception.plan().rules().len();
        Ok(Event::Followed { rules, blocked: self.blocked })
    }
}

/// The repairs of the last [`WINDOW`], which distinguish a fight from a single change.
#[derive(Debug, Default)]
struct Repairs {
    times: VecDeque<Instant>,
    pause: Duration,
    reported: bool,
}

impl Repairs {
    /// Counts a repair and returns the pause after it: zero outside of a fight.
    fn add(&mut self, now: Instant) -> Duration {
        self.times.push_back(now);
        while self.times.front().is_some_and(|first| now.duration_since(*first) > WINDOW) {
            self.times.pop_front();
        }
        // Older repairs do not influence the result.
        if self.times.len() > FIGHT {
            self.times.pop_front();
        }
        if self.pause.is_zero() && self.times.len() < FIGHT {
            return Duration::ZERO;
        }
        self.pause = (self.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        self.pause
    }

    /// When the fight ends if the rules stay intact; `None` outside of a fight.
    fn calm_at(&self) -> Option<Instant> {
        let last = self.times.back().filter(|_| !self.pause.is_zero());
        last.map(|last| *last + INTACT_TIME)
    }

    /// Whether there is a fight that is not yet reported; marks it as reported.
    fn report_fight(&mut self) -> bool {
        !self.pause.is_zero() && !std::mem::replace(&mut self.reported, true)
    }

    fn end_fight(&mut self) {
        if !self.pause.is_zero() {
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_settings_do_not_end_a_fight() {
        assert!(Event::Followed { rules: 1, blocked: false }.is_intact());
        assert!(!Event::Followed { rules: 1, blocked: true }.is_intact());
    }

    #[test]
    fn slows_repairs_in_a_fight_and_never_ends_them() {
        let mut repairs = Repairs::default();
        let mut now = Instant::now();
        let mut pauses = Vec::new();
        for _ in 0..1000 {
            let pause = repairs.add(now);
            now += pause;
            pauses.push(pause.as_millis());
        }
        assert_eq!(pauses[..8], [0, 0, 25, 50, 100, 200, 400, 400]);
        assert!(pauses[8..].iter().all(|pause| *pause == 400), "{pauses:?}");
    }

    #[test]
    fn repairs_occasional_changes_at_once() {
        let mut repairs = Repairs::default();
        let start = Instant::now();
        for change in 0..100 {
            assert_eq!(repairs.add(start + WINDOW * change), Duration::ZERO);
            assert_eq!(repairs.calm_at(), None);
        }
    }

    #[test]
    fn ends_a_fight_after_calm() {
        let mut repairs = Repairs::default();
        let start = Instant::now();
        for _ in 0..FIGHT {
            repairs.add(start);
        }
        assert!(repairs.report_fight());
        assert!(!repairs.report_fight(), "a fight is reported once");
        assert_eq!(repairs.calm_at(), Some(start + INTACT_TIME));
        repairs.end_fight();
        assert_eq!(repairs.add(start + INTACT_TIME), Duration::ZERO);
    }
}
