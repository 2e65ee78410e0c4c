//! Tests of the state machine: its rules one by one, and random sources.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use fastrand::Rng;
use underpass_interception::testing::fake_namespace;

use super::*;
use crate::pods::enrolment::{Operation, Pause, PodProblem, Release};
use crate::pods::facts::tests::facts;
use crate::pods::status::{PodState, Step};
use crate::traffic::listeners::NamedListeners;

/// A served pod that applies all changes except a new name.
#[derive(Debug)]
struct Served {
    facts: Arc<PodFacts>,
    /// Counts the served pods that exist.
    alive: Arc<AtomicUsize>,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.alive.fetch_sub(1, Relaxed);
    }
}

impl EnrolledPod for Served {
    fn follow(&self, facts: &PodFacts) -> Result<(), LeaveReason> {
        match facts.name.as_str() {
            "exempt" => Err(LeaveReason::Removed),
            name if name == self.facts.name => Ok(()),
            _ => Err(LeaveReason::EnrolledAgain),
        }
    }

    fn check(&self) -> Operation<Result<(), EnrolError>> {
        Box::pin(async { Ok(()) })
    }

    fn rules(&self) -> Operation<serde_json::Value> {
        unreachable!()
    }

    fn problem(&self) -> Option<PodProblem> {
        None
    }

    fn listeners(&self) -> NamedListeners {
        Vec::new()
    }

    fn has_certificate(&self) -> Operation<bool> {
        Box::pin(async { false })
    }

    fn pause(&self, _: Pause) -> Operation<()> {
        Box::pin(async {})
    }

    fn resume(&self) {}

    fn remove_rules(&self) -> Operation<()> {
        Box::pin(async {})
    }

    fn leave(self: Box<Self>, _: LeaveReason, _: Release) -> Operation<()> {
        Box::pin(async {})
    }
}

fn uid(text: &str) -> PodUid {
    text.parse().unwrap()
}

fn pod(name: &str) -> Arc<PodFacts> {
    Arc::new(PodFacts { uid: uid(name), name: name.to_owned(), ..facts() })
}

fn namespace() -> Namespace {
    fake_namespace().unwrap()
}

/// The state machine with a clock, and the started actions.
#[derive(Default)]
struct Node {
    pods: Pods,
    now: Option<Instant>,
    attempts: Vec<(AttemptId, Arc<PodFacts>, NamespaceId)>,
    leaving: Vec<(NamespaceId, PodUid, Box<dyn EnrolledPod>)>,
    departures: Vec<LeaveReason>,
    alive: Arc<AtomicUsize>,
}

type Outcome = oneshot::Receiver<Result<(), EnrolError>>;

impl Node {
    fn now(&mut self) -> Instant {
        *self.now.get_or_insert_with(Instant::now)
    }

    fn pass(&mut self, time: Duration) {
        self.now = Some(self.now() + time);
        self.perform_actions();
    }

    fn add(&mut self, facts: &Arc<PodFacts>, namespace: &Namespace) -> Outcome {
        let (answer, outcome) = oneshot::channel();
        let now = self.now();
        self.pods.add(now, facts.clone(), namespace.clone(), answer);
        self.perform_actions();
        outcome
    }

    fn remove(&mut self, uid: &PodUid) -> Vec<oneshot::Receiver<()>> {
        let gone = self.pods.remove(uid);
        self.perform_actions();
        gone
    }

    fn perform_actions(&mut self) {
        let now = self.now();
        while let Some(action) = self.pods.next_action(now) {
            match action {
                Action::Enrol { attempt, facts, namespace, .. } => {
                    self.attempts.push((attempt, facts, namespace.id()));
                }
                Action::Leave { namespace, uid, pod, why, .. } => {
                    self.leaving.push((namespace, uid, pod));
                    self.departures.push(why);
                }
            }
        }
    }

    /// Ends the attempt at this index.
    fn end(&mut self, index: usize, outcome: Result<(), EnrolError>) -> Option<Duration> {
        let (attempt, facts, _) = self.attempts.remove(index);
        let outcome = outcome.map(|()| {
            self.alive.fetch_add(1, Relaxed);
            let served = Served { facts, alive: self.alive.clone() };
            Enrolled::Serving(Box::new(served))
        });
        let now = self.now();
        let pause = self.pods.finished(now, attempt, outcome, 0.0);
        self.perform_actions();
        pause
    }

    fn end_leaving(&mut self, index: usize) {
        let (namespace, _, pod) = self.leaving.remove(index);
        drop(pod);
        self.pods.left(namespace);
        self.perform_actions();
    }

    fn state(&mut self, uid: &PodUid) -> Option<PodState> {
        let now = self.now();
        let status = self.pods.status(now);
        status.into_iter().find(|pod| pod.uid == *uid).map(|pod| pod.state)
    }

    /// The number of served pods that exist, in any state.
    fn alive(&self) -> usize {
        self.alive.load(Relaxed)
    }
}

fn retryable() -> EnrolError {
    EnrolError::Panicked
}

fn permanent() -> EnrolError {
    EnrolError::Facts(crate::pods::facts::FactsError::Missing { what: "name" })
}

#[test]
fn known_pod_is_not_enrolled_again() {
    let (mut node, web, here) = (Node::default(), pod("web"), namespace());
    let mut first = node.add(&web, &here);
    let mut second = node.add(&web, &here);
    assert_eq!(node.attempts.len(), 1);
    node.end(0, Ok(()));
    first.try_recv().unwrap().unwrap();
    second.try_recv().unwrap().unwrap();
    let mut third = node.add(&web, &here);
    third.try_recv().unwrap().unwrap();
    assert!(node.attempts.is_empty() && node.leaving.is_empty());
}

#[test]
fn pod_in_new_namespace_replaces_old_one() {
    let (mut node, web) = (Node::default(), pod("web"));
    node.add(&web, &namespace());
    node.end(0, Ok(()));
    let mut moved = node.add(&web, &namespace());
    assert_eq!((node.leaving.len(), node.attempts.len()), (1, 1));
    node.end(0, Ok(()));
    moved.try_recv().unwrap().unwrap();
    node.end_leaving(0);
    assert_eq!(node.alive(), 1);
}

#[test]
fn second_pod_of_namespace_is_refused() {
    let (mut node, web, here) = (Node::default(), pod("web"), namespace());
    node.add(&web, &here);
    let mut other = node.add(&pod("other"), &here);
    let refused = other.try_recv().unwrap().unwrap_err();
    assert!(matches!(refused, EnrolError::NamespaceInUse(uid) if uid == web.uid));
    assert!(!node.pods.is_known(&uid("other")) && node.pods.is_known(&web.uid));
}

#[test]
fn next_pod_of_network_namespace_waits_for_previous_one() {
    let (mut node, here) = (Node::default(), namespace());
    let (old, new) = (pod("old"), pod("new"));
    node.add(&old, &here);
    node.end(0, Ok(()));
    let mut gone = node.remove(&old.uid);
    let mut added = node.add(&new, &here);
    let waits = |state| matches!(state, Some(PodState::Pending { step: Step::Predecessor, .. }));
    assert!(node.attempts.is_empty() && waits(node.state(&new.uid)));
    assert!(gone[0].try_recv().is_err());
    node.end_leaving(0);
    gone[0].try_recv().unwrap();
    node.end(0, Ok(()));
    added.try_recv().unwrap().unwrap();
}

#[test]
fn pod_removed_during_enrolment_leaves_after_it() {
    let (mut node, web, here) = (Node::default(), pod("web"), namespace());
    let mut added = node.add(&web, &here);
    let mut gone = node.remove(&web.uid);
    assert!(matches!(added.try_recv().unwrap(), Err(EnrolError::Removed)));
    node.end(0, Ok(()));
    assert_eq!(node.leaving.len(), 1);
    node.end_leaving(0);
    gone[0].try_recv().unwrap();
    node.add(&web, &here);
    let mut gone = node.remove(&web.uid);
    node.end(0, Err(retryable()));
    gone[0].try_recv().unwrap();
    assert!(node.leaving.is_empty() && node.attempts.is_empty());
}

#[test]
fn failed_pod_is_retried_with_back_off() {
    let (mut node, web, here) = (Node::default(), pod("web"), namespace());
    let mut first = node.add(&web, &here);
    let mut pauses = Vec::new();
    for _ in 0..9 {
        let pause = node.end(0, Err(retryable())).unwrap();
        pauses.push(pause.as_millis());
        let now = node.now();
        assert_eq!(node.pods.next_due(now), Some(now + pause));
        node.pass(pause - Duration::from_millis(1));
        assert!(node.attempts.is_empty());
        node.pass(Duration::from_millis(1));
    }
    assert_eq!(pauses, [250, 500, 1000, 2000, 4000, 8000, 16000, 30000, 30000]);
    assert!(matches!(first.try_recv().unwrap(), Err(EnrolError::Panicked)));
    node.end(0, Err(retryable()));
    // Adding the pod again skips the back-off, which starts over.
    let mut again = node.add(&web, &here);
    assert_eq!(node.end(0, Err(retryable())), Some(MIN_BACKOFF));
    assert!(matches!(again.try_recv().unwrap(), Err(EnrolError::Panicked)));
    let mut again = node.add(&web, &here);
    node.end(0, Ok(()));
    again.try_recv().unwrap().unwrap();
    assert!(matches!(node.state(&web.uid), Some(PodState::Serving(None))));
}

#[test]
fn permanent_failure_is_kept_and_frees_namespace() {
    let (mut node, web, here) = (Node::default(), pod("web"), namespace());
    node.add(&web, &here);
    assert_eq!(node.end(0, Err(permanent())), None);
    assert!(matches!(node.state(&web.uid), Some(PodState::Failed(_))));
    assert!(node.pods.is_known(&web.uid));
    node.add(&pod("other"), &here);
    node.end(0, Ok(()));
    // The source corrects its facts.
    let mut again = node.add(&web, &namespace());
    node.end(0, Ok(()));
    again.try_recv().unwrap().unwrap();
}

#[test]
fn changed_facts_are_applied_or_the_pod_is_enrolled_again() {
    let (mut node, web, here) = (Node::default(), pod("web"), namespace());
    node.add(&web, &here);
    node.end(0, Ok(()));
    let labels = [("a".to_owned(), "b".to_owned())].into();
    let followed = Arc::new(PodFacts { labels, ..(*web).clone() });
    node.add(&followed, &here).try_recv().unwrap().unwrap();
    assert!(node.leaving.is_empty());
    let renamed = Arc::new(PodFacts { name: "renamed".to_owned(), ..(*web).clone() });
    let mut added = node.add(&renamed, &here);
    assert!(node.attempts.is_empty() && node.leaving.len() == 1);
    assert_eq!(node.departures, [LeaveReason::EnrolledAgain]);
    node.end_leaving(0);
    // The facts change again during the attempt.
    let mut back = node.add(&web, &here);
    node.end(0, Ok(()));
    assert!(added.try_recv().is_err() && node.leaving.len() == 1);
    node.end_leaving(0);
    node.end(0, Ok(()));
    added.try_recv().unwrap().unwrap();
    back.try_recv().unwrap().unwrap();
    assert_eq!(node.alive(), 1);
}

#[test]
fn pod_that_becomes_exempt_leaves_without_its_rules() {
    let (mut node, web, here) = (Node::default(), pod("web"), namespace());
    node.add(&web, &here);
    node.end(0, Ok(()));
    let exempt = Arc::new(PodFacts { name: "exempt".to_owned(), ..(*web).clone() });
    node.add(&exempt, &here);
    assert_eq!(node.departures, [LeaveReason::Removed]);
}

#[test]
fn end_of_snapshot_removes_unnamed_pods_at_once() {
    let mut node = Node::default();
    for name in ["a", "b", "c"] {
        node.add(&pod(name), &namespace());
    }
    node.end(0, Ok(()));
    node.pods.retain(&[uid("b")].into());
    node.perform_actions();
    assert!(
        !node.pods.is_known(&uid("a"))
            && node.pods.is_known(&uid("b"))
            && !node.pods.is_known(&uid("c"))
    );
    assert_eq!(node.leaving.len(), 1);
}

#[test]
fn stopping_removes_all_pods_and_refuses_new_ones() {
    let (mut node, here) = (Node::default(), namespace());
    let mut enrolling = node.add(&pod("a"), &namespace());
    node.add(&pod("b"), &here);
    node.end(1, Ok(()));
    let ends = node.pods.stop();
    node.perform_actions();
    assert_eq!(ends.len(), 2);
    assert!(matches!(enrolling.try_recv().unwrap(), Err(EnrolError::Stopping)));
    let mut refused = node.add(&pod("c"), &namespace());
    assert!(matches!(refused.try_recv().unwrap(), Err(EnrolError::Stopping)));
    node.end(0, Ok(()));
    node.end_leaving(0);
    node.end_leaving(0);
    assert!(ends.into_iter().all(|mut end| end.try_recv().is_ok()));
    assert_eq!(node.alive(), 0);
}

#[test]
fn attempts_are_bounded_and_in_order() {
    let mut node = Node::default();
    let names: Vec<_> = (0..MAX_CONCURRENT_ATTEMPTS + 2).map(|n| format!("pod-{n}")).collect();
    for name in &names {
        node.add(&pod(name), &namespace());
    }
    let started: Vec<_> = node.attempts.iter().map(|(_, facts, _)| facts.name.clone()).collect();
    assert_eq!(started, names[..MAX_CONCURRENT_ATTEMPTS]);
    let now = node.now();
    assert_eq!(node.pods.next_due(now), None, "the end of an attempt wakes the owner");
    node.end(0, Err(retryable()));
    assert_eq!(node.attempts.last().unwrap().1.name, names[MAX_CONCURRENT_ATTEMPTS]);
}

/// Checks the invariants after a step.
fn check(node: &Node) {
    let mut active: Vec<_> = node.attempts.iter().map(|(_, _, namespace)| *namespace).collect();
    active.extend(node.leaving.iter().map(|(namespace, ..)| *namespace));
    let serving = node.pods.pods.values().filter_map(|entry| match &entry.phase {
        Phase::Serving { namespace, .. } => Some(namespace.id()),
        _ => None,
    });
    active.extend(serving);
    let distinct: BTreeSet<_> = active.iter().collect();
    assert_eq!(distinct.len(), active.len(), "a namespace has one active pod");
    for (namespace, uid) in &node.pods.pod_by_namespace {
        assert_eq!(node.pods.pods[uid].namespace(), Some(*namespace));
    }
    for (turn, uid) in &node.pods.queue {
        let phase = &node.pods.pods[uid].phase;
        assert!(matches!(phase, Phase::Waiting { turn: own, .. } if own == turn), "{phase:?}");
    }
    assert!(node.attempts.len() <= MAX_CONCURRENT_ATTEMPTS);
}

#[test]
fn random_actions_keep_one_pod_per_namespace_and_one_answer_per_add() {
    for seed in 0..300 {
        let mut random = Rng::with_seed(seed);
        let mut node = Node::default();
        let namespaces: Vec<_> = (0..6).map(|_| namespace()).collect();
        let mut outcomes: Vec<Outcome> = Vec::new();
        for _ in 0..200 {
            let name = format!("pod-{}", random.u8(0..8));
            match random.u8(0..10) {
                0..4 => {
                    let mut facts = (*pod(&name)).clone();
                    facts.name.push_str(if random.u8(0..8) == 0 { "-renamed" } else { "" });
                    let namespace = &namespaces[random.usize(0..namespaces.len())];
                    outcomes.push(node.add(&Arc::new(facts), namespace));
                }
                4 => drop(node.remove(&uid(&name))),
                5 if !node.attempts.is_empty() => {
                    let error = if random.bool() { retryable() } else { permanent() };
                    node.end(random.usize(0..node.attempts.len()), Err(error));
                }
                6 | 7 if !node.attempts.is_empty() => {
                    node.end(random.usize(0..node.attempts.len()), Ok(()));
                }
                8 if !node.leaving.is_empty() => {
                    node.end_leaving(random.usize(0..node.leaving.len()));
                }
                9 if random.u8(0..10) == 0 => {
                    let named = (0..8).filter(|_| random.bool());
                    node.pods.retain(&named.map(|n| uid(&format!("pod-{n}"))).collect());
                    node.perform_actions();
                }
                _ => node.pass(Duration::from_millis(random.u64(0..2000))),
            }
            check(&node);
        }
        let ends = node.pods.stop();
        node.perform_actions();
        while !node.attempts.is_empty() || !node.leaving.is_empty() {
            if !node.attempts.is_empty() {
                node.end(0, if random.bool() { Ok(()) } else { Err(retryable()) });
            }
            if !node.leaving.is_empty() {
                node.end_leaving(0);
            }
            check(&node);
        }
        assert!(ends.into_iter().all(|mut end| end.try_recv().is_ok()), "seed {seed}");
        assert!(outcomes.into_iter().all(|mut outcome| outcome.try_recv().is_ok()), "seed {seed}");
        assert_eq!(node.alive(), 0, "seed {seed}: every pod has left");
        let Pods { pods, pod_by_namespace, queue, attempts, leaving, actions, .. } = &node.pods;
        assert!(pods.is_empty() && pod_by_namespace.is_empty() && queue.is_empty(), "seed {seed}");
        assert!(attempts.is_empty() && leaving.is_empty() && actions.is_empty(), "seed {seed}");
    }
}
