//! The state of all pods of a node, as a state machine without I/O: time and chance are arguments.
//!
//! ```text
//!            add                     attempt succeeded
//! (unknown) ─────▶ queued ─▶ enrolling ───────────────▶ serving ─ remove ─▶ leaving ─▶ (unknown)
//!                    ▲           │ failed
//!                    └─ back-off ┘
//! ```
//!
//! A removed pod is forgotten at once and drains in the background. A new pod of its namespace
//! waits for that, so a namespace has at most one active pod.

mod adoption;
pub(super) mod moving;
mod report;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;
use underpass_config::PodUid;
use underpass_interception::{Namespace, NamespaceId};

use crate::backoff;
use crate::pods::annotations::ExemptReason;
use crate::pods::enrolment::{EnrolError, Enrolled, EnrolledPod, LeaveReason, Release};
use crate::pods::facts::PodFacts;
use crate::pods::state::moving::Moving;
use crate::pods::take_over::handed::Handed;

/// The maximum number of concurrent attempts. Operations on namespaces are serialized; otherwise an
/// attempt mostly waits.
const MAX_CONCURRENT_ATTEMPTS: usize = 16;
/// The bounds of the back-off after failures.
const MIN_BACKOFF: Duration = Duration::from_millis(250);
const MAX_BACKOFF: Duration = Duration::from_secs(30);

/// Receives the outcome of adding a pod.
pub(super) type AnswerSender = oneshot::Sender<Result<(), EnrolError>>;

/// Identifies an attempt to enrol a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct AttemptId(u64);

/// An action for the owner of the state machine.
#[derive(Debug)]
pub(super) enum Action {
    /// Starts an attempt to enrol a pod, whose end the owner reports with [`Pods::finished`].
    Enrol { attempt: AttemptId, facts: Arc<PodFacts>, namespace: Namespace, handed: Option<Handed> },
    /// Drains a pod, whose end the owner reports with [`Pods::left`].
    Leave {
        namespace: NamespaceId,
        uid: PodUid,
        pod: Box<dyn EnrolledPod>,
        why: LeaveReason,
        release: Release,
    },
}

/// All pods.
#[derive(Debug, Default)]
pub(super) struct Pods {
    pods: HashMap<PodUid, Entry>,
    /// The pod of each namespace.
    pod_by_namespace: HashMap<NamespaceId, PodUid>,
    /// The pods that wait for an attempt, sorted by its due time.
    queue: BTreeMap<QueueKey, PodUid>,
    attempts: HashMap<AttemptId, Attempt>,
    /// The namespaces in which a removed pod still drains.
    leaving: HashMap<NamespaceId, Leaving>,
    actions: Vec<Action>,
    next_attempt: u64,
    next_turn: u64,
    is_stopping: bool,
    /// While another process takes over.
    moving: Option<Moving>,
    /// While this process takes over.
    is_adopting: bool,
}

/// The due time of an attempt, with a unique number.
type QueueKey = (Instant, u64);

#[derive(Debug)]
struct Entry {
    facts: Arc<PodFacts>,
    since: Instant,
    failures: u32,
    error: Option<EnrolError>,
    phase: Phase,
    answers: Vec<AnswerSender>,
    /// The parts that the next attempt gets from the running process.
    handed: Option<Handed>,
}

#[derive(Debug)]
enum Phase {
    Waiting { turn: QueueKey, namespace: Namespace },
    Enrolling { attempt: AttemptId, namespace: Namespace },
    Serving { namespace: Namespace, pod: Box<dyn EnrolledPod> },
    Exempt(ExemptReason),
    Failed,
}

#[derive(Debug)]
struct Attempt {
    uid: PodUid,
    facts: Arc<PodFacts>,
    namespace: Namespace,
    /// Whether it adopts the pod.
    adopts: bool,
}

#[derive(Debug)]
struct Leaving {
    uid: PodUid,
    pod: String,
    why: LeaveReason,
    /// Notified when the pod has left.
    gone: Vec<oneshot::Sender<()>>,
}

impl Leaving {
    fn new(facts: &PodFacts, why: LeaveReason) -> Self {
        Self { uid: facts.uid.clone(), pod: facts.full_name(), why, gone: Vec::new() }
    }
}

impl Entry {
    fn namespace(&self) -> Option<NamespaceId> {
        match &self.phase {
            Phase::Waiting { namespace, .. }
            | Phase::Enrolling { namespace, .. }
            | Phase::Serving { namespace, .. } => Some(namespace.id()),
            Phase::Exempt(_) | Phase::Failed => None,
        }
    }

    fn answer(&mut self, outcome: &Result<(), EnrolError>) {
        for answer in self.answers.drain(..) {
            // Fails if the source no longer waits.
            answer.send(outcome.clone()).ok();
        }
    }
}

impl Pods {
    /// Adds a pod. `answer` receives the outcome of the next attempt to end.
    pub(super) fn add(
        &mut self,
        now: Instant,
        facts: Arc<PodFacts>,
        namespace: Namespace,
        answer: AnswerSender,
    ) {
        if let Err(error) = self.check_add(&facts.uid, namespace.id()) {
            answer.send(Err(error)).ok();
            return;
        }
        let uid = facts.uid.clone();
        let added = self.add_again(now, &facts, &namespace, answer);
        let Some((answer, why)) = added else { return };
        self.withdraw(&uid, why);
        self.pod_by_namespace.insert(namespace.id(), uid.clone());
        let turn = self.turn(now, &uid);
        let phase = Phase::Waiting { turn, namespace };
        let answers = vec![answer];
        let (error, handed) = (None, None);
        let entry = Entry { facts, since: now, failures: 0, error, phase, answers, handed };
        self.pods.insert(uid, entry);
    }

    /// Records a pod that its source cannot add as failed.
    pub(super) fn fail(&mut self, now: Instant, facts: Arc<PodFacts>, error: EnrolError) {
        self.withdraw(&facts.uid, LeaveReason::Removed);
        if self.is_stopping {
            return;
        }
        let uid = facts.uid.clone();
        let (error, answers, phase) = (Some(error), Vec::new(), Phase::Failed);
        let entry = Entry { facts, since: now, failures: 0, error, phase, answers, handed: None };
        self.pods.insert(uid, entry);
    }

    fn check_add(&self, uid: &PodUid, namespace: NamespaceId) -> Result<(), EnrolError> {
        if self.is_stopping {
            return Err(EnrolError::Stopping);
        }
        match self.pod_by_namespace.get(&namespace).filter(|other| *other != uid) {
            Some(other) => Err(EnrolError::NamespaceInUse(other.clone())),
            None => Ok(()),
        }
    }

    /// Updates the pod if it is known in this namespace. Otherwise returns `answer`, and the reason
    /// for a predecessor to leave.
    fn add_again(
        &mut self,
        now: Instant,
        facts: &Arc<PodFacts>,
        namespace: &Namespace,
        answer: AnswerSender,
    ) -> Option<(AnswerSender, LeaveReason)> {
        let known = self.pods.get_mut(&facts.uid);
        let Some(entry) = known.filter(|entry| entry.namespace() == Some(namespace.id())) else {
            return Some((answer, LeaveReason::Removed));
        };
        // The source retries: the next attempt is due now, and starts a new back-off.
        entry.failures = 0;
        match &mut entry.phase {
            Phase::Serving { pod, .. } => {
                if entry.facts != *facts
                    && let Err(why) = pod.follow(facts)
                {
                    return Some((answer, why));
                }
                entry.facts = facts.clone();
                answer.send(Ok(())).ok();
            }
            Phase::Waiting { turn, .. } => {
                self.queue.remove(turn);
                *turn = (now, self.next_turn);
                self.next_turn += 1;
                self.queue.insert(*turn, facts.uid.clone());
                entry.facts = facts.clone();
                entry.answers.push(answer);
            }
            Phase::Enrolling { .. } => {
                entry.facts = facts.clone();
                entry.answers.push(answer);
            }
            Phase::Exempt(_) | Phase::Failed => return Some((answer, LeaveReason::Removed)),
        }
        None
    }

    /// Whether the pod is known.
    pub(super) fn is_known(&self, uid: &PodUid) -> bool {
        self.pods.contains_key(uid)
    }

    /// Removes the pods that are not in `named`.
    pub(super) fn retain(&mut self, named: &BTreeSet<PodUid>) {
        let gone: Vec<_> = self.pods.keys().filter(|uid| !named.contains(*uid)).cloned().collect();
        gone.iter().for_each(|uid| self.withdraw(uid, LeaveReason::Removed));
    }

    /// Removes a pod. Returns receivers of its end; empty if it is not active.
    pub(super) fn remove(&mut self, uid: &PodUid) -> Vec<oneshot::Receiver<()>> {
        self.withdraw(uid, LeaveReason::Removed);
        self.end_receivers(|leaving| leaving.uid == *uid)
    }

    /// Removes every pod, and refuses new ones.
    pub(super) fn stop(&mut self) -> Vec<oneshot::Receiver<()>> {
        self.stop_with(LeaveReason::DaemonStops)
    }

    fn stop_with(&mut self, why: LeaveReason) -> Vec<oneshot::Receiver<()>> {
        self.is_stopping = true;
        self.moving = None;
        let all: Vec<_> = self.pods.keys().cloned().collect();
        all.iter().for_each(|uid| self.withdraw(uid, why));
        self.end_receivers(|_| true)
    }

    /// The facts about a pod, and the namespace in which it is or will be served.
    pub(super) fn known(&self, uid: &PodUid) -> Option<(&PodFacts, NamespaceId)> {
        let entry = self.pods.get(uid)?;
        Some((&*entry.facts, entry.namespace()?))
    }

    fn end_receivers(&mut self, of: impl Fn(&Leaving) -> bool) -> Vec<oneshot::Receiver<()>> {
        let end_of = |leaving: &mut Leaving| {
            let (sender, gone) = oneshot::channel();
            leaving.gone.push(sender);
            gone
        };
        self.leaving.values_mut().filter(|leaving| of(leaving)).map(end_of).collect()
    }

    /// The served pod, or the reason why it is not served.
    pub(super) fn served(&self, uid: &PodUid) -> Result<&dyn EnrolledPod, EnrolError> {
        let entry = self.pods.get(uid).ok_or(EnrolError::Unknown)?;
        match &entry.phase {
            Phase::Serving { pod, .. } => Ok(&**pod),
            _ => Err(entry.error.clone().unwrap_or(EnrolError::Pending)),
        }
    }

    /// The next due action.
    pub(super) fn next_action(&mut self, now: Instant) -> Option<Action> {
        self.actions.pop().or_else(|| self.next_attempt(now))
    }

    fn next_attempt(&mut self, now: Instant) -> Option<Action> {
        if self.attempts.len() >= MAX_CONCURRENT_ATTEMPTS {
            return None;
        }
        let due = self.queue.iter().take_while(|((due, _), _)| *due <= now);
        let (turn, uid) =
            due.map(|(turn, uid)| (*turn, uid.clone())).find(|(_, uid)| self.may_enrol(uid))?;
        self.queue.remove(&turn);
        let attempt = AttemptId(self.next_attempt);
        self.next_attempt += 1;
        let entry = self.pods.get_mut(&uid)?;
        let Phase::Waiting { namespace, .. } = &entry.phase else { return None };
        let (facts, namespace) = (entry.facts.clone(), namespace.clone());
        let handed = entry.handed.take();
        entry.phase = Phase::Enrolling { attempt, namespace: namespace.clone() };
        let (started, adopts) = (namespace.clone(), handed.is_some());
        let started = Attempt { uid, facts: facts.clone(), namespace: started, adopts };
        self.attempts.insert(attempt, started);
        Some(Action::Enrol { attempt, facts, namespace, handed })
    }

    /// Whether an attempt for a waiting pod may start.
    fn may_enrol(&self, uid: &PodUid) -> bool {
        let Some(entry) = self.pods.get(uid) else { return false };
        let Some(namespace) = entry.namespace() else { return false };
        let is_free = !self.leaving.contains_key(&namespace);
        let is_moving = |moving: &Moving| moving.holds(uid) || moving.occupies(namespace);
        is_free
            && !self.moving.as_ref().is_some_and(is_moving)
            && (!self.is_adopting || entry.handed.is_some())
    }

    /// The next time at which an action becomes due.
    pub(super) fn next_due(&self, now: Instant) -> Option<Instant> {
        let later = self.queue.range((now, u64::MAX)..).next();
        later.map(|((due, _), _)| *due).filter(|_| self.attempts.len() < MAX_CONCURRENT_ATTEMPTS)
    }

    /// Records the end of an attempt. `chance` is from 0 to 1. Returns the pause before the next
    /// attempt.
    pub(super) fn finished(
        &mut self,
        now: Instant,
        attempt: AttemptId,
        outcome: Result<Enrolled, EnrolError>,
        chance: f64,
    ) -> Option<Duration> {
        let Attempt { uid, facts, namespace, adopts } = self.attempts.remove(&attempt)?;
        let id = namespace.id();
        let current = self.pods.get_mut(&uid).filter(
            |entry| matches!(entry.phase, Phase::Enrolling { attempt: current, .. } if current == attempt),
        );
        let Some(entry) = current else {
            self.finish_withdrawn(id, uid, outcome);
            return None;
        };
        let is_current = Arc::ptr_eq(&entry.facts, &facts) || entry.facts == facts;
        match outcome {
            Ok(Enrolled::Serving(pod)) => {
                let followed = if is_current { Ok(()) } else { pod.follow(&entry.facts) };
                match followed {
                    Ok(()) => {
                        entry.error = None;
                        entry.phase = Phase::Serving { namespace, pod };
                        entry.answer(&Ok(()));
                    }
                    Err(why) => {
                        let leaving = Leaving::new(&entry.facts, why);
                        self.queue_again(now, &uid);
                        self.leave(id, leaving, pod, Release::default());
                    }
                }
                None
            }
            _ if !is_current => {
                self.queue_again(now, &uid);
                None
            }
            Ok(Enrolled::Exempt(reason)) => {
                entry.phase = Phase::Exempt(reason);
                entry.answer(&Ok(()));
                self.pod_by_namespace.remove(&id);
                None
            }
            Err(error) if adopts => self.failed(now, &uid, error.of_adoption(), chance),
            Err(error) => self.failed(now, &uid, error, chance),
        }
    }

    /// Records the end of an attempt for a pod that was removed meanwhile.
    fn finish_withdrawn(
        &mut self,
        namespace: NamespaceId,
        uid: PodUid,
        outcome: Result<Enrolled, EnrolError>,
    ) {
        match outcome {
            Ok(Enrolled::Serving(pod)) => {
                let leaving = self.leaving.get(&namespace);
                let why = leaving.map_or(LeaveReason::DaemonStops, |leaving| leaving.why);
                let release = Release::default();
                self.actions.push(Action::Leave { namespace, uid, pod, why, release });
            }
            Ok(Enrolled::Exempt(_)) | Err(_) => self.left(namespace),
        }
    }

    fn failed(
        &mut self,
        now: Instant,
        uid: &PodUid,
        error: EnrolError,
        chance: f64,
    ) -> Option<Duration> {
        let entry = self.pods.get_mut(uid)?;
        entry.error = Some(error.clone());
        let pause = error
            .is_retryable()
            .then(|| backoff::wait(MIN_BACKOFF, MAX_BACKOFF, entry.failures, chance));
        entry.failures = entry.failures.saturating_add(1);
        entry.answer(&Err(error));
        match pause {
            Some(pause) => self.queue_again(now + pause, uid),
            None => {
                let namespace = entry.namespace();
                entry.phase = Phase::Failed;
                namespace.and_then(|namespace| self.pod_by_namespace.remove(&namespace));
            }
        }
        pause
    }

    fn queue_again(&mut self, due: Instant, uid: &PodUid) {
        let turn = self.turn(due, uid);
        let Some(entry) = self.pods.get_mut(uid) else { return };
        if let Phase::Enrolling { namespace, .. } = &entry.phase {
            entry.phase = Phase::Waiting { turn, namespace: namespace.clone() };
        }
    }

    fn turn(&mut self, due: Instant, uid: &PodUid) -> QueueKey {
        let turn = (due, self.next_turn);
        self.next_turn += 1;
        self.queue.insert(turn, uid.clone());
        turn
    }

    /// Forgets a pod. If it is active in its namespace, it leaves.
    fn withdraw(&mut self, uid: &PodUid, why: LeaveReason) {
        let Some(mut entry) = self.pods.remove(uid) else { return };
        let release = match &mut self.moving {
            Some(moving) if why == LeaveReason::Removed => moving.removed(uid),
            _ => Release::default(),
        };
        entry.answer(&Err(match why {
            LeaveReason::Removed | LeaveReason::RemovedByOther | LeaveReason::EnrolledAgain => {
                EnrolError::Removed
            }
            LeaveReason::DaemonStops | LeaveReason::HandedOver => EnrolError::Stopping,
        }));
        if let Some(namespace) = entry.namespace() {
            self.pod_by_namespace.remove(&namespace);
        }
        let leaving = Leaving::new(&entry.facts, why);
        match entry.phase {
            Phase::Waiting { turn, .. } => {
                self.queue.remove(&turn);
            }
            Phase::Enrolling { namespace, .. } => {
                self.leaving.insert(namespace.id(), leaving);
            }
            Phase::Serving { namespace, pod } => {
                self.leave(namespace.id(), leaving, pod, release);
            }
            Phase::Exempt(_) | Phase::Failed => {}
        }
    }

    fn leave(
        &mut self,
        namespace: NamespaceId,
        leaving: Leaving,
        pod: Box<dyn EnrolledPod>,
        release: Release,
    ) {
        let (uid, why) = (leaving.uid.clone(), leaving.why);
        self.leaving.insert(namespace, leaving);
        self.actions.push(Action::Leave { namespace, uid, pod, why, release });
    }

    /// Records that a pod has left its namespace.
    pub(super) fn left(&mut self, namespace: NamespaceId) {
        for gone in self.leaving.remove(&namespace).into_iter().flat_map(|leaving| leaving.gone) {
            // Fails if the source no longer waits.
            gone.send(()).ok();
        }
    }
}

#[cfg(test)]
mod tests;
