//! Owns all pods of a node. Sources add and remove pods through a handle. One task enrols them,
//! retries failed ones, and drains removed ones.
//!
//! `state.rs` decides on the actions, and `enrolment.rs` defines their trait.

mod take_over;

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::{Instant, sleep_until};
use underpass_config::{Hint as _, PodUid, Quoted};
use underpass_interception::{Namespace, NamespaceId};

use crate::admin::api::status::Pod;
use crate::observe::metrics;
use crate::pods::enrolment::{EnrolError, Enrolled, Enroller};
use crate::pods::facts::PodFacts;
use crate::pods::state::{Action, AttemptId, Pods};
use crate::pods::status::PodStatus;

/// A handle of all pods of the node. Clones share the state.
#[derive(Debug, Clone)]
pub(crate) struct PodRegistry(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Never locked across an await.
    pods: Mutex<Pods>,
    /// Wakes the task after a change.
    changed: Notify,
    /// Wakes a take-over after a change, while it has removed pods that are not released.
    has_gone: Notify,
    served_addresses: watch::Sender<BTreeSet<IpAddr>>,
}

/// The pending outcome of adding a pod.
#[derive(Debug)]
pub(crate) struct Enrolment(oneshot::Receiver<Result<(), EnrolError>>);

/// A removal in progress. It continues if this is dropped.
#[derive(Debug)]
pub(crate) struct Removal(Vec<oneshot::Receiver<()>>);

impl Enrolment {
    /// Waits for the end of the next attempt. After success the pod is served or exempt; after a
    /// retryable error the registry retries.
    pub(crate) async fn first_outcome(self) -> Result<(), EnrolError> {
        self.0.await.unwrap_or(Err(EnrolError::Stopping))
    }
}

impl Removal {
    /// Waits until the connections are drained, and the process has no socket in the pod's
    /// namespace.
    pub(crate) async fn gone(self) {
        for end in self.0 {
            // Fails if the registry has ended.
            end.await.ok();
        }
    }
}

impl PodRegistry {
    /// Creates a registry, and the task that enrols its pods with `enroller`.
    pub(crate) fn new(enroller: Arc<dyn Enroller>) -> (Self, RegistryTask) {
        let shared = Shared {
            pods: Mutex::default(),
            changed: Notify::new(),
            has_gone: Notify::new(),
            served_addresses: watch::Sender::default(),
        };
        let registry = Self(Arc::new(shared));
        let task = RegistryTask {
            registry: registry.clone(),
            enroller,
            tasks: JoinSet::new(),
            running: HashMap::new(),
        };
        (registry, task)
    }

    /// Adds a pod, and enrols it in the background, with retries after failures.
    ///
    /// If the uid is known in this namespace, its pod gets the new facts. If it is known in another
    /// namespace, the new pod replaces that one. A pod with another uid is refused while the
    /// namespace has a known pod.
    pub(crate) fn add(&self, facts: PodFacts, namespace: Namespace) -> Enrolment {
        let (answer, outcome) = oneshot::channel();
        self.change(|pods| pods.add(Instant::now(), Arc::new(facts), namespace, answer));
        Enrolment(outcome)
    }

    /// Records a pod that its source cannot add as failed. A known pod with this uid is removed.
    pub(crate) fn fail(&self, facts: PodFacts, error: EnrolError) {
        self.change(|pods| pods.fail(Instant::now(), Arc::new(facts), error));
    }

    /// The addresses of the served pods.
    pub(crate) fn served_addresses(&self) -> watch::Receiver<BTreeSet<IpAddr>> {
        self.0.served_addresses.subscribe()
    }

    /// Whether the pod is known.
    pub(crate) fn is_known(&self, uid: &PodUid) -> bool {
        self.pods().is_known(uid)
    }

    /// Removes the pods that are not in `named`, at the end of a snapshot of all pods.
    pub(crate) fn retain(&self, named: &BTreeSet<PodUid>) {
        self.change(|pods| pods.retain(named));
    }

    /// Removes a pod: drains its connections, and removes its rules. Succeeds also if it is
    /// unknown.
    pub(crate) fn remove(&self, uid: &PodUid) -> Removal {
        Removal(self.change(|pods| pods.remove(uid)))
    }

    /// Removes every pod, and refuses new ones.
    pub(crate) fn stop(&self) -> Removal {
        Removal(self.change(Pods::stop))
    }

    /// The facts about a pod, and the namespace in which it is or will be served.
    pub(crate) fn known(&self, uid: &PodUid) -> Option<(PodFacts, NamespaceId)> {
        self.pods().known(uid).map(|(facts, namespace)| (facts.clone(), namespace))
    }

    /// Verifies the listeners and rules of a pod.
    pub(crate) async fn check(&self, uid: &PodUid) -> Result<(), EnrolError> {
        let check = self.pods().served(uid)?.check();
        check.await
    }

    /// Reports the rules of the pod with this name, `NAMESPACE/NAME`: of the served one, if others
    /// have the name too.
    pub(crate) async fn rules(&self, name: &str) -> Result<Value, EnrolError> {
        let mut rules = Err(EnrolError::Unknown);
        for status in self.status().into_iter().filter(|status| status.pod == name) {
            match self.pods().served(&status.uid) {
                Ok(pod) => {
                    rules = Ok(pod.rules());
                    break;
                }
                Err(error) => rules = Err(error),
            }
        }
        Ok(rules?.await)
    }

    /// The status of every pod, sorted by namespace and name.
    pub(crate) fn status(&self) -> Vec<PodStatus> {
        let mut status = self.pods().status(Instant::now());
        status.sort_by(|a, b| (&a.pod, &a.uid).cmp(&(&b.pod, &b.uid)));
        status
    }

    /// The status of every pod, for operators.
    pub(crate) fn report(&self) -> Vec<Pod> {
        self.status().iter().map(Pod::from).collect()
    }

    fn change<T>(&self, change: impl FnOnce(&mut Pods) -> T) -> T {
        let mut pods = self.pods();
        let result = change(&mut pods);
        let has_gone = pods.has_gone();
        drop(pods);
        self.0.changed.notify_one();
        if has_gone {
            self.0.has_gone.notify_one();
        }
        result
    }

    fn pods(&self) -> MutexGuard<'_, Pods> {
        // No code panics while it holds the lock.
        self.0.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Performs the actions that the state machine requests.
pub(crate) struct RegistryTask {
    registry: PodRegistry,
    enroller: Arc<dyn Enroller>,
    tasks: JoinSet<Ended>,
    /// The pods of the running tasks. A task that panics does not return its pod.
    running: HashMap<Id, Running>,
}

/// The result of a task.
enum Ended {
    Enrolled(Result<Enrolled, EnrolError>),
    Left,
}

/// The action of a task.
#[derive(Debug)]
enum Running {
    Enrolling { attempt: AttemptId, facts: Arc<PodFacts>, since: Instant },
    Leaving { namespace: NamespaceId, uid: PodUid },
}

impl RegistryTask {
    /// Enrols and drains pods. Never returns.
    pub(crate) async fn run(mut self) {
        loop {
            let now = self.perform_due();
            self.report_counts();
            self.publish_addresses();
            let due = self.registry.pods().next_due(now);
            let retry = async {
                match due {
                    Some(due) => sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.registry.0.changed.notified() => {}
                () = retry => {}
                Some(ended) = self.tasks.join_next_with_id() => self.ended(ended),
            }
            while let Some(ended) = self.tasks.try_join_next_with_id() {
                self.ended(ended);
            }
        }
    }

    /// Performs the due actions. Returns the time at which none was due any more.
    fn perform_due(&mut self) -> Instant {
        loop {
            let now = Instant::now();
            let action = self.registry.pods().next_action(now);
            let Some(action) = action else { return now };
            self.perform(action);
        }
    }

    fn perform(&mut self, action: Action) {
        let (task, running) = match action {
            Action::Enrol { attempt, facts, namespace, handed } => {
                let enrol = self.enroller.enrol(facts.clone(), namespace, handed);
                let task = self.tasks.spawn(async move { Ended::Enrolled(enrol.await) });
                (task, Running::Enrolling { attempt, facts, since: Instant::now() })
            }
            Action::Leave { namespace, uid, pod, why, release } => {
                let leave = pod.leave(why, release);
                let task = self.tasks.spawn(async move {
                    leave.await;
                    Ended::Left
                });
                (task, Running::Leaving { namespace, uid })
            }
        };
        self.running.insert(task.id(), running);
    }

    fn ended(&mut self, ended: Result<(Id, Ended), JoinError>) {
        let (id, ended) = match ended {
            Ok((id, ended)) => (id, Some(ended)),
            Err(error) => (error.id(), None),
        };
        match self.running.remove(&id) {
            Some(Running::Enrolling { attempt, facts, since }) => {
                let outcome = match ended {
                    Some(Ended::Enrolled(outcome)) => outcome,
                    Some(Ended::Left) | None => Err(EnrolError::Panicked),
                };
                self.attempted(attempt, &facts, since, outcome);
            }
            Some(Running::Leaving { namespace, uid }) => {
                metrics::pods::stopped();
                match ended {
                    Some(_) => tracing::info!(%uid, "pod removed"),
                    None => tracing::error!(%uid, "removing a pod panicked"),
                }
                self.registry.change(|pods| pods.left(namespace));
            }
            None => {}
        }
    }

    fn attempted(
        &self,
        attempt: AttemptId,
        facts: &PodFacts,
        since: Instant,
        outcome: Result<Enrolled, EnrolError>,
    ) {
        let (pod, uid, took) = (facts.full_name(), &facts.uid, since.elapsed());
        let error = match &outcome {
            Ok(Enrolled::Serving(_)) => {
                metrics::pods::started();
                tracing::info!(pod, %uid, ?took, "pod enrolled");
                None
            }
            Ok(Enrolled::Exempt(reason)) => {
                tracing::info!(pod, %uid, %reason, "pod not enrolled: it is exempt");
                None
            }
            Err(error) => Some(error.clone()),
        };
        let chance = fastrand::f64();
        let now = Instant::now();
        let retry_in = self.registry.change(|pods| pods.finished(now, attempt, outcome, chance));
        if let Some(error) = error {
            let hint = error.hint();
            let error = Quoted::chain(&error);
            tracing::error!(pod, %uid, %error, hint = hint.as_deref(), ?retry_in, "cannot enrol the pod");
        }
    }

    fn publish_addresses(&self) {
        let addresses = self.registry.pods().served_addresses();
        self.registry.0.served_addresses.send_if_modified(|published| {
            let is_new = *published != addresses;
            *published = addresses;
            is_new
        });
    }

    fn report_counts(&self) {
        let counts = self.registry.pods().counts();
        metrics::pods::states(&counts);
    }
}

impl fmt::Debug for RegistryTask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegistryTask").field("running", &self.running).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
