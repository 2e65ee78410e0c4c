//! Keeping the rules as they should be: what another program changes is put back, and what the settings change is
//! followed.
//!
//! Not here: what is compared and installed (the interception crate).

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until};
use underpass_config::InterceptionSettings;
use underpass_interception::{Changes, Difference, Interception, InterceptionError};

/// So many repairs within [`WINDOW`] are a fight with another program, which nobody wins.
const REPAIRS: usize = 100;
const WINDOW: Duration = Duration::from_secs(10);
/// How long the guard rests after it gave up, before it looks again: fail closed in the end.
const REST: Duration = Duration::from_secs(30);
/// The same after a failure.
const RETRY: Duration = Duration::from_secs(1);

/// What the guard has to tell.
#[derive(Debug)]
pub(crate) enum Event {
    /// Another program had changed the rules; they are as they should be again.
    Repaired { difference: Difference, took: Duration },
    /// The settings changed, and the rules with them.
    Followed { rules: usize },
    /// The rules are as they should be again, by nobody's doing of ours: after one of the two below.
    Intact,
    /// Another program changes them again and again; nothing is put back for a while.
    GaveUp { difference: Difference, rest: Duration },
    /// The rules could not be read or put back; tried again after a while.
    Failed { error: InterceptionError, rest: Duration },
}

/// Who keeps the rules.
#[derive(Debug)]
pub(crate) struct Guard {
    interception: Interception,
    changes: Changes,
    limit: RepairLimit,
    /// When to look without having been told.
    look_at: Option<Instant>,
    /// Whether the rules were last told to be other than they should.
    lost: bool,
    /// Told after each look.
    looked: Arc<Notify>,
}

impl Guard {
    /// Begins to watch; nothing that happens from now on is missed.
    pub(crate) fn new(interception: Interception) -> Result<Self, InterceptionError> {
        let changes = interception.changes()?;
        let (limit, looked) = (RepairLimit::default(), Arc::default());
        let look_at = Some(Instant::now());
        Ok(Self { interception, changes, limit, look_at, lost: false, looked })
    }

    /// What is told after each look at the rules.
    pub(crate) fn looked(&self) -> Arc<Notify> {
        self.looked.clone()
    }

    /// The next event. Cancelling it while it repairs leaves the old or the new rules, as any end does.
    pub(crate) async fn next(
        &mut self,
        settings: &mut watch::Receiver<InterceptionSettings>,
    ) -> Event {
        loop {
            let rest = async {
                match self.look_at {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let resting = self.look_at.is_some();
            let looked = tokio::select! {
                () = rest => self.look().await,
                told = self.changes.next(), if !resting => match told {
                    Ok(()) => self.look().await,
                    Err(error) => Err(error),
                },
                Ok(()) = settings.changed() => {
                    let settings = settings.borrow_and_update().clone();
                    self.follow(&settings).await.map(Some)
                }
            };
            match looked {
                Ok(None) if self.lost => {
                    self.lost = false;
                    return Event::Intact;
                }
                Ok(None) => {}
                Ok(Some(event)) => {
                    self.lost = matches!(event, Event::GaveUp { .. });
                    return event;
                }
                Err(error) => {
                    self.lost = true;
                    self.look_at = Some(Instant::now() + RETRY);
                    return Event::Failed { error, rest: RETRY };
                }
            }
        }
    }

    /// Has the next event be what a look at the rules tells.
    pub(crate) fn look_again(&mut self) {
        self.look_at = Some(Instant::now());
    }

    async fn look(&mut self) -> Result<Option<Event>, InterceptionError> {
        let found = self.find_and_repair().await;
        self.looked.notify_one();
        found
    }

    async fn find_and_repair(&mut self) -> Result<Option<Event>, InterceptionError> {
        self.look_at = None;
        let began = Instant::now();
        let difference = loop {
            if self.interception.follow_ipv6().await? {
                tracing::info!(
                    "IPv6 is enabled on the loopback interface now: its routes are installed"
                );
            }
            match self.interception.verify().await? {
                None => return Ok(None),
                Some(_) if self.interception.ipv6_has_changed() => {}
                Some(difference) => break difference,
            }
        };
        if !self.limit.allows(began) {
            self.look_at = Some(began + REST);
            return Ok(Some(Event::GaveUp { difference, rest: REST }));
        }
        self.interception.install().await?;
        Ok(Some(Event::Repaired { difference, took: began.elapsed() }))
    }

    async fn follow(
        &mut self,
        settings: &InterceptionSettings,
    ) -> Result<Event, InterceptionError> {
        // What cannot be installed now is installed by a later look.
        self.interception = self.interception.with_settings(settings);
        self.interception.install().await?;
        Ok(Event::Followed { rules: self.interception.plan().rules().len() })
    }
}

/// Tells a mishap from a fight.
#[derive(Debug, Default)]
struct RepairLimit {
    repairs: VecDeque<Instant>,
}

impl RepairLimit {
    fn allows(&mut self, now: Instant) -> bool {
        while self.repairs.front().is_some_and(|first| now.duration_since(*first) > WINDOW) {
            self.repairs.pop_front();
        }
        if self.repairs.len() >= REPAIRS {
            self.repairs.clear();
            return false;
        }
        self.repairs.push_back(now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fight_is_given_up_and_then_taken_up_again() {
        let mut limit = RepairLimit::default();
        let start = Instant::now();
        assert!((0..REPAIRS).all(|_| limit.allows(start)));
        assert!(!limit.allows(start));
        assert!(limit.allows(start + REST));
    }

    #[test]
    fn mishaps_now_and_then_are_mended_for_ever() {
        let mut limit = RepairLimit::default();
        let start = Instant::now();
        for mishap in 0..10 * u32::try_from(REPAIRS).unwrap() {
            assert!(limit.allows(start + WINDOW / 50 * mishap));
        }
    }
}
