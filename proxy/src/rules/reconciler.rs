//! Reconciles the rules: repairs changes by other programs, and applies changed settings.
//!
//! ```text
//! verify ── same ──────────────▶ wait for a change
//!   └─ different ─▶ block ─▶ repair ─▶ verify ── same, no fight ─▶ unblock
//!                     ▲                  └─ a fight ─▶ wait (back-off)
//!                     │                                   ▼
//!                     └────────── different ─────────── verify ── same for 2 s ─▶ unblock
//! ```
//!
//! Blocking drops all traffic (the blackhole), from the detection of a difference until the rules
//! are verified, so that none leaves in plaintext. A fight is a series of changes by another
//! program, in which repairs slow down but never stop.
//!
//! The interception crate compares, installs and blocks.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use underpass_config::{Hint as _, InterceptionSettings};
use underpass_interception::{
    Changes, Difference, Interception, InterceptionError, NamespaceAccess,
};

/// The number of repairs within [`FIGHT_WINDOW`] that make a fight with another program.
const REPAIRS_IN_FIGHT: usize = 3;
const FIGHT_WINDOW: Duration = Duration::from_secs(10);
/// The bounds of the back-off after a repair in a fight.
const MIN_BACKOFF: Duration = Duration::from_millis(25);
const MAX_BACKOFF: Duration = Duration::from_millis(400);
/// The time for which the rules must be intact to end a fight.
const INTACT_TIME: Duration = Duration::from_secs(2);
/// The delay before the next attempt after a failure.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// A change in the state of the rules.
#[derive(Debug)]
pub(crate) enum Event {
    /// Repaired a change by another program. In a fight the blackhole stays installed.
    Repaired { difference: Difference, took: Duration, fight: bool },
    /// Applied changed settings. `blocked` means that the blackhole is still installed.
    Followed { rules: usize, blocked: bool },
    /// Verified the rules after a fight or a failure, and removed the blackhole.
    Intact,
    /// Another program changes the rules repeatedly. Reported once for each fight.
    Fight { difference: Difference },
    /// The rules could not be read or repaired. The next attempt follows after `pause`.
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
    /// The time of the next verification without a notification.
    verify_at: Option<Instant>,
    /// Whether the last event reported that the rules are not intact.
    is_lost: bool,
    /// Whether the blackhole may be installed.
    may_be_blocked: bool,
    /// The difference of a fight that has not been reported yet.
    unreported: Option<Difference>,
}

impl RuleReconciler {
    /// Subscribes to changes, so that no later change is missed.
    pub(crate) async fn new(interception: Interception) -> Result<Self, InterceptionError> {
        let changes = interception.changes().await?;
        Ok(Self {
            interception,
            changes,
            repairs: Repairs::default(),
            verify_at: Some(Instant::now()),
            is_lost: false,
            may_be_blocked: false,
            unreported: None,
        })
    }

    /// The network namespace of the rules.
    pub(crate) fn access(&self) -> NamespaceAccess {
        self.interception.access().clone()
    }

    /// Waits for the next event. A started operation on the rules continues after cancellation
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
                    self.is_lost = !event.is_intact();
                    return event;
                }
                Err(error) => {
                    self.is_lost = true;
                    self.verify_at = Some(Instant::now() + RETRY_DELAY);
                    return Event::Failed { error, pause: RETRY_DELAY };
                }
            }
        }
    }

    /// Makes the next successful verification report [`Event::Intact`].
    pub(crate) fn assume_lost(&mut self) {
        self.is_lost = true;
    }

    /// Verifies the rules at the next call of [`next`](Self::next).
    pub(crate) fn verify_now(&mut self) {
        self.verify_at = Some(Instant::now());
    }

    /// Handles one change of the rules, one change of the settings, or the end of a pause.
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
        // Block before repairing: the rules do not catch traffic until the repair is done.
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

    /// Records that the rules are intact. Ends a fight after [`INTACT_TIME`].
    async fn accept_intact(&mut self) -> Result<Option<Event>, InterceptionError> {
        let now = Instant::now();
        if let Some(fight_end) = self.repairs.fight_end().filter(|end| *end > now) {
            self.verify_at = Some(fight_end.min(now + MAX_BACKOFF));
            return Ok(None);
        }
        self.repairs.end_fight();
        if self.may_be_blocked {
            self.unblock().await?;
        }
        Ok(self.is_lost.then_some(Event::Intact))
    }

    /// Installs the blackhole. If the kernel refuses it, repairs continue without it.
    async fn block(&mut self) {
        self.may_be_blocked = true;
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
        self.may_be_blocked = false;
        Ok(())
    }

    async fn follow(
        &mut self,
        settings: &InterceptionSettings,
    ) -> Result<Event, InterceptionError> {
        // A later verification retries a failed installation. During a fight the blackhole keeps
        // the exemptions of the old settings.
        self.interception = self.interception.with_settings(settings);
        self.interception.repair().await?;
        let rules = self.interception.plan().rules().len();
        Ok(Event::Followed { rules, blocked: self.may_be_blocked })
    }
}

/// The repairs of the last [`FIGHT_WINDOW`], to tell a fight from a single change.
#[derive(Debug, Default)]
struct Repairs {
    times: VecDeque<Instant>,
    pause: Duration,
    is_reported: bool,
}

impl Repairs {
    /// Counts a repair and returns the pause after it: zero outside a fight.
    fn add(&mut self, now: Instant) -> Duration {
        self.times.push_back(now);
        while self.times.front().is_some_and(|first| now.duration_since(*first) > FIGHT_WINDOW) {
            self.times.pop_front();
        }
        // Older repairs do not influence the result.
        if self.times.len() > REPAIRS_IN_FIGHT {
            self.times.pop_front();
        }
        if self.pause.is_zero() && self.times.len() < REPAIRS_IN_FIGHT {
            return Duration::ZERO;
        }
        self.pause = (self.pause * 2).clamp(MIN_BACKOFF, MAX_BACKOFF);
        self.pause
    }

    /// The time at which the fight ends if the rules stay intact; `None` outside a fight.
    fn fight_end(&self) -> Option<Instant> {
        let last = self.times.back().filter(|_| !self.pause.is_zero());
        last.map(|last| *last + INTACT_TIME)
    }

    /// Marks the fight as reported. Returns whether there is one that was not reported before.
    fn report_fight(&mut self) -> bool {
        !self.pause.is_zero() && !std::mem::replace(&mut self.is_reported, true)
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
            assert_eq!(repairs.add(start + FIGHT_WINDOW * change), Duration::ZERO);
            assert_eq!(repairs.fight_end(), None);
        }
    }

    #[test]
    fn fight_ends_after_rules_stay_intact() {
        let mut repairs = Repairs::default();
        let start = Instant::now();
        for _ in 0..REPAIRS_IN_FIGHT {
            repairs.add(start);
        }
        assert!(repairs.report_fight());
        assert!(!repairs.report_fight(), "a fight is reported once");
        assert_eq!(repairs.fight_end(), Some(start + INTACT_TIME));
        repairs.end_fight();
        assert_eq!(repairs.add(start + INTACT_TIME), Duration::ZERO);
    }
}
