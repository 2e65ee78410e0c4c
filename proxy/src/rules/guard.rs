//! Reconciliation of the rules: puts back what another program changes, and follows the settings.
//!
//! ```text
//! look ── same ──────────────────────────────▶ wait for a change
//!   └─ different ─▶ block ─▶ repair ─▶ look ── same, no fight ─▶ unblock
//!                     ▲                  │
//!                     │                  └─ a fight ─▶ wait (back-off), look ── same for CALM ─▶ unblock
//!                     └── different ────────────────────────┘
//! ```
//!
//! The blackhole stands from the moment that a difference is found until the rules are verified, so
//! that nothing leaves in plain. Repairs never end: in a fight with another program they are
//! slower.
//!
//! Not here: what is compared, installed and blocked (the interception crate).

use std::collections::VecDeque;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use underpass_config::InterceptionSettings;
use underpass_interception::{
    Changes, Difference, Interception, InterceptionError, NamespaceAccess,
};

/// This many repairs within [`WINDOW`] are a fight with another program.
const FIGHT: usize = 3;
const WINDOW: Duration = Duration::from_secs(10);
/// The pause after a repair in a fight: from the first, doubled each time, to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(25);
const LONGEST_PAUSE: Duration = Duration::from_millis(400);
/// A fight is over when the rules were intact for this long.
const CALM: Duration = Duration::from_secs(2);
/// When to look again after a failure.
const RETRY: Duration = Duration::from_secs(1);

/// What happened to the rules.
#[derive(Debug)]
pub(crate) enum Event {
    /// Another program had changed the rules; they are put back. `fight`: the blackhole still
    /// stands.
    Repaired { difference: Difference, took: Duration, fight: bool },
    /// The settings changed, and the rules with them. `blocked`: the blackhole still stands.
    Followed { rules: usize, blocked: bool },
    /// The rules are verified after a fight or a failure, and the blackhole is removed.
    Intact,
    /// Another program changes the rules again and again. Once for each fight.
    Fight { difference: Difference },
    /// The rules could not be read or put back; tried again after `pause`.
    Failed { error: InterceptionError, pause: Duration },
}

impl Event {
    /// Whether the rules stand, and the blackhole does not.
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
pub(crate) struct Guard {
    interception: Interception,
    changes: Changes,
    repairs: Repairs,
    /// When to look without a notification.
    look_at: Option<Instant>,
    /// Whether the last event said that the rules are not intact.
    lost: bool,
    /// Whether the blackhole may stand.
    blocked: bool,
    /// A fight that has not been reported yet.
    unreported: Option<Difference>,
}

impl Guard {
    /// Begins to watch: no change from now on is missed.
    pub(crate) async fn new(interception: Interception) -> Result<Self, InterceptionError> {
        let changes = interception.changes().await?;
        Ok(Self {
            interception,
            changes,
            repairs: Repairs::default(),
            look_at: Some(Instant::now()),
            lost: false,
            blocked: false,
            unreported: None,
        })
    }

    /// Where the rules are.
    pub(crate) fn access(&self) -> NamespaceAccess {
        self.interception.access().clone()
    }

    /// The next event. An operation on the rules goes on to its end when this is cancelled
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
                    self.look_at = Some(Instant::now() + RETRY);
                    return Event::Failed { error, pause: RETRY };
                }
            }
        }
    }

    /// Looks at the rules at the next call of [`next`](Self::next).
    pub(crate) fn look_again(&mut self) {
        self.look_at = Some(Instant::now());
    }

    /// Waits for a change, a change of the settings, or the end of a pause, and acts on it.
    async fn step(
        &mut self,
        settings: &mut watch::Receiver<InterceptionSettings>,
    ) -> Result<Option<Event>, InterceptionError> {
        if let Some(difference) = self.unreported.take() {
            return Ok(Some(Event::Fight { difference }));
        }
        let pause = async {
            match self.look_at {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let pausing = self.look_at.is_some();
        tokio::select! {
            () = pause => self.look().await,
            changed = self.changes.next(), if !pausing => {
                changed?;
                self.look().await
            }
            Ok(()) = settings.changed() => {
                let settings = settings.borrow_and_update().clone();
                self.follow(&settings).await.map(Some)
            }
        }
    }

    async fn look(&mut self) -> Result<Option<Event>, InterceptionError> {
        self.look_at = None;
        let began = Instant::now();
        let difference = loop {
            if self.interception.follow_ipv6().await? {
                tracing::info!(
                    "IPv6 is enabled on the loopback interface now: its routes are installed"
                );
            }
            match self.interception.verify().await? {
                None => return self.stand().await,
                Some(_) if self.interception.ipv6_has_changed().await? => {}
                Some(difference) => break difference,
            }
        };
        // First: until the repair is done, what is sent is not caught.
        self.block().await;
        self.interception.repair().await?;
        let pause = self.repairs.add(Instant::now());
        if pause.is_zero() && self.interception.verify().await?.is_none() {
            self.unblock().await?;
            let took = began.elapsed();
            return Ok(Some(Event::Repaired { difference, took, fight: false }));
        }
        self.look_at = Some(Instant::now() + pause);
        if self.repairs.begin_fight() {
            self.unreported = Some(difference.clone());
        }
        Ok(Some(Event::Repaired { difference, took: began.elapsed(), fight: true }))
    }

    /// The rules are as they should be: the end of a fight, once they were so for long enough.
    async fn stand(&mut self) -> Result<Option<Event>, InterceptionError> {
        let now = Instant::now();
        if let Some(calm) = self.repairs.calm_at().filter(|calm| *calm > now) {
            self.look_at = Some(calm.min(now + LONGEST_PAUSE));
            return Ok(None);
        }
        self.repairs.end_fight();
        if self.blocked {
            self.unblock().await?;
        }
        Ok(self.lost.then_some(Event::Intact))
    }

    /// Repairs go on without the blackhole if the kernel refuses it.
    async fn block(&mut self) {
        self.blocked = true;
        if let Err(error) = self.interception.block().await {
            let error = crate::error::chain(&error);
            tracing::error!(
                error,
                "the blackhole cannot be installed: until the rules are repaired traffic may leave in plain"
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
        // What cannot be installed now is installed by a later look. In a fight the blackhole keeps
        // the exemptions of the old settings until it is removed.
        self.interception = self.interception.with_settings(settings);
        self.interception.repair().await?;
        let rules = self.interception.plan().rules().len();
        Ok(Event::Followed { rules, blocked: self.blocked })
    }
}

/// The repairs of the last [`WINDOW`], by which a fight differs from a single change.
#[derive(Debug, Default)]
struct Repairs {
    times: VecDeque<Instant>,
    pause: Duration,
    reported: bool,
}

impl Repairs {
    /// Counts a repair; how long to pause after it. Zero outside of a fight.
    fn add(&mut self, now: Instant) -> Duration {
        self.times.push_back(now);
        while self.times.front().is_some_and(|first| now.duration_since(*first) > WINDOW) {
            self.times.pop_front();
        }
        // Only as many count as make a fight.
        if self.times.len() > FIGHT {
            self.times.pop_front();
        }
        if self.pause.is_zero() && self.times.len() < FIGHT {
            return Duration::ZERO;
        }
        self.pause = (self.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        self.pause
    }

    /// When a fight is over, if the rules stay intact; `None` outside of a fight.
    fn calm_at(&self) -> Option<Instant> {
        let last = self.times.back().filter(|_| !self.pause.is_zero());
        last.map(|last| *last + CALM)
    }

    /// Whether a fight has begun that was not reported.
    fn begin_fight(&mut self) -> bool {
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
        assert!(repairs.begin_fight());
        assert!(!repairs.begin_fight(), "a fight is reported once");
        assert_eq!(repairs.calm_at(), Some(start + CALM));
        repairs.end_fight();
        assert_eq!(repairs.add(start + CALM), Duration::ZERO);
    }
}
