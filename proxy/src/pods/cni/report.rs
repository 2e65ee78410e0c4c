//! Reports whether pods can be added and whether all were added: to readiness, and to the plugin's
//! `STATUS`.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::pods::source::SourceHealth;

/// A condition of the node's readiness.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::pods::cni) enum Condition {
    /// The network configuration has the plugin. Without it new pods bypass the mesh.
    Installed,
    /// The facts about pods are known. Without them no pod can be added.
    Facts,
    /// The runtime has called the plugin for each pod. Without the call a pod bypasses the mesh.
    AllAdded,
}

const CONDITIONS: usize = 3;

/// The conditions, and what was reported to readiness.
#[derive(Debug)]
struct State {
    /// The reason why each condition is not met, in the order of [`Condition`].
    problems: [Option<String>; CONDITIONS],
    /// The last reports; `None` before the first one. With a broker each report is a message, and
    /// each addition and removal of a pod sets all conditions.
    problem: Option<Option<String>>,
    notice: Option<Option<String>>,
}

/// The conditions of the node's readiness.
#[derive(Debug)]
pub(in crate::pods::cni) struct Report {
    health: SourceHealth,
    state: Mutex<State>,
    not_ready: watch::Sender<Option<String>>,
}

impl Report {
    /// Creates the report of a starting daemon: no condition is met yet.
    pub(in crate::pods::cni) fn new(health: SourceHealth) -> Self {
        let starts = Some("the daemon is starting".to_owned());
        let problems = [starts.clone(), starts.clone(), None];
        let state = Mutex::new(State { problems, problem: None, notice: None });
        Self { health, state, not_ready: watch::Sender::new(starts) }
    }

    /// Sets the reason why a condition is not met; `None` if it is met.
    pub(in crate::pods::cni) fn set(&self, condition: Condition, problem: Option<String>) {
        let mut state = self.state();
        let [installed, facts, all_added] = &mut state.problems;
        *match condition {
            Condition::Installed => &mut *installed,
            Condition::Facts => &mut *facts,
            Condition::AllAdded => &mut *all_added,
        } = problem;
        // Pods that bypass the mesh do not prevent adding others.
        let cannot_add = installed.clone().or_else(|| facts.clone());
        let problem = cannot_add.clone().or_else(|| all_added.clone());
        if state.problem.replace(problem.clone()) != Some(problem.clone()) {
            self.health.set_problem(problem);
        }
        self.not_ready.send_replace(cannot_add);
    }

    /// Sets information that does not make the node unready.
    pub(in crate::pods::cni) fn set_notice(&self, notice: Option<String>) {
        if self.state().notice.replace(notice.clone()) != Some(notice.clone()) {
            self.health.set_notice(notice);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The reason why pods cannot be added at present; `None` if they can.
    pub(in crate::pods::cni) fn subscribe(&self) -> watch::Receiver<Option<String>> {
        self.not_ready.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::admin::readiness::SourceReport;

    #[test]
    fn readiness_gets_only_changes() {
        let reports = Arc::<Mutex<Vec<SourceReport>>>::default();
        let received = reports.clone();
        let health = SourceHealth::new(move |report| received.lock().unwrap().push(report));
        let report = Report::new(health);
        for problem in [None, None, Some("no entry"), Some("no entry"), None] {
            let problem = problem.map(str::to_owned);
            report.set(Condition::Facts, None);
            report.set(Condition::Installed, problem.clone());
            report.set_notice(problem);
        }
        let starting = SourceReport::Problem(Some("the daemon is starting".to_owned()));
        let problem = || Some("no entry".to_owned());
        let expected = [
            starting,
            SourceReport::Problem(None),
            SourceReport::Notice(None),
            SourceReport::Problem(problem()),
            SourceReport::Notice(problem()),
            SourceReport::Problem(None),
            SourceReport::Notice(None),
        ];
        assert_eq!(*reports.lock().unwrap(), expected);
    }

    #[test]
    fn node_is_ready_once_all_conditions_are_met() {
        let health = SourceHealth::default();
        let report = Report::new(health.clone());
        let not_ready = report.subscribe();
        let is_ready = || (health.is_ready(), not_ready.borrow().is_none());
        report.set(Condition::Installed, None);
        assert_eq!(is_ready(), (false, false));
        report.set(Condition::Facts, None);
        assert_eq!(is_ready(), (true, true));
        report.set(Condition::AllAdded, Some("shop/web".to_owned()));
        assert_eq!(is_ready(), (false, true), "other pods can be added");
        report.set(Condition::Installed, Some("no entry".to_owned()));
        assert_eq!(not_ready.borrow().as_deref(), Some("no entry"));
    }
}
