//! The health of a pod's rules: whether they are intact, and whether the self-test passed.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::observe::metrics;

/// The counts of all pods, for the metrics. Clones share them.
#[derive(Debug, Clone, Default)]
pub(crate) struct RulesTotals(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    /// Pods whose rules differ from the settings at present, whether they are repaired or not.
    lost: AtomicUsize,
    /// Pods whose last self-test failed.
    self_test_failed: AtomicUsize,
    /// Rules of other programs that precede the proxy's, in all pods.
    foreign: AtomicUsize,
}

/// The health of one pod's rules. Clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct RulesHealth(Arc<State>);

#[derive(Debug, Default)]
struct State {
    totals: RulesTotals,
    /// Whether they were installed once.
    installed: AtomicBool,
    lost: AtomicBool,
    /// Whether another program has changed them, and this proxy does not repair them.
    unrepaired: AtomicBool,
    self_test_failed: AtomicBool,
    /// Whether the last self-test that passed had a connection to catch.
    self_tested: AtomicBool,
    foreign: AtomicUsize,
    repairs: Mutex<Repairs>,
    changes: watch::Sender<()>,
}

/// The health of one pod's rules, for another process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RulesState {
    installed: bool,
    lost: bool,
    unrepaired: bool,
    self_test_failed: bool,
    self_tested: bool,
    foreign: usize,
    repairs: Repairs,
}

/// The repairs of a pod's rules.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Repairs {
    pub(crate) count: u64,
    /// The time of the last one.
    pub(crate) last: Option<SystemTime>,
}

impl RulesTotals {
    /// Adds a pod, which counts until its health is dropped.
    pub(crate) fn pod(&self) -> RulesHealth {
        let (installed, lost, unrepaired, self_test_failed, self_tested) = Default::default();
        let (foreign, repairs, changes) = Default::default();
        let totals = self.clone();
        RulesHealth(Arc::new(State {
            totals,
            installed,
            lost,
            unrepaired,
            self_test_failed,
            self_tested,
            foreign,
            repairs,
            changes,
        }))
    }

    fn report_intact(&self) {
        metrics::rules_intact(self.0.lost.load(Relaxed) == 0);
    }

    fn report_self_test(&self) {
        metrics::self_test_passed(self.0.self_test_failed.load(Relaxed) == 0);
    }

    fn report_foreign(&self) {
        metrics::foreign_rules(self.0.foreign.load(Relaxed));
    }
}

impl RulesHealth {
    /// Records whether the rules are installed as planned, without the blackhole.
    pub(crate) fn set_intact(&self, intact: bool) {
        let State { totals, installed, lost, .. } = &*self.0;
        installed.store(true, Relaxed);
        set(lost, !intact, &totals.0.lost);
        totals.report_intact();
        self.0.changes.send_replace(());
    }

    /// A receiver of changes; the values are those of [`state`](Self::state).
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.0.changes.subscribe()
    }

    pub(crate) fn state(&self) -> RulesState {
        RulesState {
            installed: self.are_installed(),
            lost: self.are_lost(),
            unrepaired: self.are_unrepaired(),
            self_test_failed: self.has_self_test_failed(),
            self_tested: self.is_self_tested(),
            foreign: self.foreign_rules(),
            repairs: self.repairs(),
        }
    }

    /// Copies the state of the rules in another process.
    pub(crate) fn copy(&self, state: RulesState) {
        if state.installed {
            self.set_intact(!state.lost);
        }
        self.set_unrepaired(state.unrepaired);
        self.set_self_test_failed(state.self_test_failed);
        self.set_self_tested(state.self_tested);
        self.set_foreign_rules(state.foreign);
        self.set_repairs(state.repairs);
    }

    /// Records whether the rules that this proxy does not repair are as planned; returns the
    /// previous value.
    pub(crate) fn set_unrepaired(&self, are_changed: bool) -> bool {
        let State { totals, unrepaired, .. } = &*self.0;
        let were_changed = set(unrepaired, are_changed, &totals.0.lost);
        totals.report_intact();
        self.0.changes.send_replace(());
        were_changed
    }

    /// Whether another program has changed the rules, and this proxy does not repair them.
    pub(crate) fn are_unrepaired(&self) -> bool {
        self.0.unrepaired.load(Relaxed)
    }

    /// Counts a repair.
    pub(crate) fn repaired(&self) {
        let count = self.repairs().count + 1;
        self.set_repairs(Repairs { count, last: Some(SystemTime::now()) });
    }

    fn set_repairs(&self, repairs: Repairs) {
        // No code panics while it holds the lock.
        *self.0.repairs.lock().unwrap_or_else(PoisonError::into_inner) = repairs;
        self.0.changes.send_replace(());
    }

    pub(crate) fn repairs(&self) -> Repairs {
        *self.0.repairs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this process, or the one that it has taken over from, has installed the rules.
    pub(crate) fn are_installed(&self) -> bool {
        self.0.installed.load(Relaxed)
    }

    pub(crate) fn are_lost(&self) -> bool {
        self.0.lost.load(Relaxed)
    }

    /// Records whether the last self-test failed; returns the previous value.
    pub(crate) fn set_self_test_failed(&self, failed: bool) -> bool {
        let State { totals, self_test_failed, .. } = &*self.0;
        let had_failed = set(self_test_failed, failed, &totals.0.self_test_failed);
        totals.report_self_test();
        self.0.changes.send_replace(());
        had_failed
    }

    pub(crate) fn has_self_test_failed(&self) -> bool {
        self.0.self_test_failed.load(Relaxed)
    }

    /// Records that the self-test has passed, and whether it had a connection to catch.
    pub(crate) fn set_self_tested(&self, is_tested: bool) {
        self.0.self_tested.store(is_tested, Relaxed);
        self.0.changes.send_replace(());
    }

    /// Whether the last self-test that passed had a connection to catch.
    pub(crate) fn is_self_tested(&self) -> bool {
        self.0.self_tested.load(Relaxed)
    }

    /// The number of rules of other programs that precede the proxy's.
    pub(crate) fn foreign_rules(&self) -> usize {
        self.0.foreign.load(Relaxed)
    }

    /// Records the number of rules of other programs that precede the proxy's.
    pub(crate) fn set_foreign_rules(&self, count: usize) {
        let State { totals, foreign, .. } = &*self.0;
        let before = foreign.swap(count, Relaxed);
        totals.0.foreign.fetch_add(count, Relaxed);
        totals.0.foreign.fetch_sub(before, Relaxed);
        totals.report_foreign();
        self.0.changes.send_replace(());
    }
}

impl Drop for State {
    fn drop(&mut self) {
        let Self { totals, lost, unrepaired, self_test_failed, foreign, .. } = self;
        let was_lost = set(lost, false, &totals.0.lost);
        if set(unrepaired, false, &totals.0.lost) || was_lost {
            totals.report_intact();
        }
        if set(self_test_failed, false, &totals.0.self_test_failed) {
            totals.report_self_test();
        }
        let foreign = std::mem::take(foreign.get_mut());
        if foreign > 0 {
            totals.0.foreign.fetch_sub(foreign, Relaxed);
            totals.report_foreign();
        }
    }
}

/// Sets a flag, and updates the `count` of set flags. Returns the flag's previous value.
fn set(flag: &AtomicBool, value: bool, count: &AtomicUsize) -> bool {
    let old = flag.swap(value, Relaxed);
    match (old, value) {
        (false, true) => count.fetch_add(1, Relaxed),
        (true, false) => count.fetch_sub(1, Relaxed),
        _ => 0,
    };
    old
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_metrics_count_failed_pods_until_recovery_or_removal() {
        let totals = RulesTotals::default();
        let counts = || {
            let Counts { lost, self_test_failed, foreign } = &*totals.0;
            [lost, self_test_failed, foreign].map(|count| count.load(Relaxed))
        };
        let (one, other) = (totals.pod(), totals.pod());
        one.set_intact(false);
        one.set_intact(false);
        other.set_intact(false);
        assert!(!other.set_self_test_failed(true));
        assert!(other.set_self_test_failed(true));
        one.set_foreign_rules(3);
        one.set_foreign_rules(2);
        assert_eq!(counts(), [2, 1, 2]);
        assert!(one.are_lost() && !one.has_self_test_failed());
        one.set_intact(true);
        drop(other);
        assert_eq!(counts(), [0, 0, 2]);
    }

    #[test]
    fn copied_state_equals_the_original_after_each_change() {
        let (original, copy) = (RulesHealth::default(), RulesHealth::default());
        let mut changes = original.changes();
        let change: [&dyn Fn(); 5] = [
            &|| original.set_foreign_rules(2),
            &|| original.set_intact(false),
            &|| {
                original.set_self_test_failed(true);
            },
            &|| original.set_intact(true),
            &|| {
                original.set_self_test_failed(false);
            },
        ];
        for change in change {
            change();
            assert!(changes.has_changed().unwrap());
            changes.mark_unchanged();
            copy.copy(original.state());
            assert_eq!(copy.state(), original.state());
        }
        assert!(copy.are_installed() && !copy.are_lost());
    }
}
