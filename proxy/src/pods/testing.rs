//! An enroller for tests, without namespaces and privileges.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use underpass_config::PodUid;
use underpass_interception::{Namespace, NamespaceId};

use crate::pods::annotations::ExemptReason;
use crate::pods::enrolment::{
    EnrolError, Enrolled, EnrolledPod, Enroller, LeaveReason, Operation, Pause, PodProblem, Release,
};
use crate::pods::facts::PodFacts;
use crate::pods::registry::PodRegistry;
use crate::pods::source::{
    self, PodSource, SourceContext, SourceEnd, SourceHandle, SourceHealth, SourceState,
};
use crate::pods::take_over::handed::Handed;
use crate::traffic::listeners::{Kind, Listeners, NamedListeners};

/// Enrols pods in memory. Attempts succeed at once, except scripted ones.
#[derive(Debug, Clone, Default)]
pub(crate) struct FakeEnroller(Arc<Mutex<Fake>>);

#[derive(Debug, Default)]
struct Fake {
    /// The scripted outcomes of the next attempts of each pod.
    scripts: HashMap<PodUid, VecDeque<Scripted>>,
    serving: HashMap<NamespaceId, Arc<PodFacts>>,
    attempts: HashMap<PodUid, usize>,
    left: Vec<(PodUid, LeaveReason)>,
    paused: Vec<(PodUid, Pause)>,
    without_rules: Vec<PodUid>,
    /// While true, leaving pods wait.
    hold_leaving: Option<watch::Receiver<bool>>,
}

#[derive(Debug)]
enum Scripted {
    Fails(EnrolError),
    Waits(oneshot::Receiver<()>),
    IsExempt(ExemptReason),
}

impl FakeEnroller {
    /// Starts a registry with this enroller.
    pub(crate) fn registry(&self) -> PodRegistry {
        let (registry, task) = PodRegistry::new(Arc::new(self.clone()));
        tokio::spawn(task.run());
        registry
    }

    /// Makes the next unscripted attempt of a pod fail.
    pub(crate) fn fail_next(&self, uid: &PodUid, error: EnrolError) {
        self.script(uid, Scripted::Fails(error));
    }

    /// Makes the next unscripted attempt of a pod wait for the sender's message or drop.
    pub(crate) fn hold_next(&self, uid: &PodUid) -> oneshot::Sender<()> {
        let (release, held) = oneshot::channel();
        self.script(uid, Scripted::Waits(held));
        release
    }

    /// Makes the next unscripted attempt of a pod find that it is exempt.
    pub(crate) fn exempt_next(&self, uid: &PodUid, reason: ExemptReason) {
        self.script(uid, Scripted::IsExempt(reason));
    }

    /// Makes leaving pods wait until the sender sends false or is dropped.
    pub(crate) fn hold_leaving(&self) -> watch::Sender<bool> {
        let (release, held) = watch::channel(true);
        self.fake().hold_leaving = Some(held);
        release
    }

    fn script(&self, uid: &PodUid, scripted: Scripted) {
        self.fake().scripts.entry(uid.clone()).or_default().push_back(scripted);
    }

    /// The uids of the served pods, sorted.
    pub(crate) fn serving(&self) -> Vec<PodUid> {
        let mut serving: Vec<_> =
            self.fake().serving.values().map(|facts| facts.uid.clone()).collect();
        serving.sort();
        serving
    }

    /// The number of attempts for a pod.
    pub(crate) fn attempts(&self, uid: &PodUid) -> usize {
        self.fake().attempts.get(uid).copied().unwrap_or_default()
    }

    /// The uids of the pods that have left, in that order.
    pub(crate) fn left(&self) -> Vec<PodUid> {
        self.fake().left.iter().map(|(uid, _)| uid.clone()).collect()
    }

    /// The reasons for which pods have left, in that order.
    pub(crate) fn departures(&self) -> Vec<LeaveReason> {
        self.fake().left.iter().map(|(_, why)| *why).collect()
    }

    /// The pods of which a part is paused.
    pub(crate) fn paused(&self) -> Vec<PodUid> {
        let mut paused: Vec<_> = self.fake().paused.iter().map(|(uid, _)| uid.clone()).collect();
        paused.sort();
        paused.dedup();
        paused
    }

    /// The served pods whose rules are removed for another process, in that order.
    pub(crate) fn without_rules(&self) -> Vec<PodUid> {
        self.fake().without_rules.clone()
    }

    fn fake(&self) -> MutexGuard<'_, Fake> {
        self.0.lock().unwrap()
    }
}

impl Enroller for FakeEnroller {
    fn enrol(
        &self,
        facts: Arc<PodFacts>,
        namespace: Namespace,
        handed: Option<Handed>,
    ) -> Operation<Result<Enrolled, EnrolError>> {
        let this = self.clone();
        Box::pin(async move {
            let scripted = {
                let mut fake = this.fake();
                *fake.attempts.entry(facts.uid.clone()).or_default() += 1;
                fake.scripts.get_mut(&facts.uid).and_then(VecDeque::pop_front)
            };
            let running = handed.map(|handed| handed.running);
            if let Some(Scripted::IsExempt(reason)) = scripted {
                if let Some(running) = &running {
                    running.exempt().await?;
                }
                return Ok(Enrolled::Exempt(reason));
            }
            if let Some(running) = &running {
                running.pause_rules().await?;
            }
            match scripted {
                Some(Scripted::Fails(error)) => {
                    if let Some(running) = &running {
                        running.resume().await?;
                    }
                    return Err(error);
                }
                Some(Scripted::Waits(held)) => {
                    held.await.ok();
                }
                Some(Scripted::IsExempt(_)) | None => {}
            }
            if let Some(running) = &running {
                running.pause_accepting().await?;
                running.served().await?;
            }
            let namespace = namespace.id();
            let before = this.fake().serving.insert(namespace, facts.clone());
            assert!(before.is_none(), "two pods in {namespace}: {before:?} and {facts:?}");
            Ok(Enrolled::Serving(Box::new(FakePod { enroller: this, namespace, facts })))
        })
    }
}

/// A pod that is served in memory.
#[derive(Debug)]
struct FakePod {
    enroller: FakeEnroller,
    namespace: NamespaceId,
    facts: Arc<PodFacts>,
}

impl EnrolledPod for FakePod {
    /// Applies changes of labels only.
    fn follow(&self, facts: &PodFacts) -> Result<(), LeaveReason> {
        let same = PodFacts { labels: self.facts.labels.clone(), ..facts.clone() } == *self.facts;
        same.then_some(()).ok_or(LeaveReason::EnrolledAgain)
    }

    fn check(&self) -> Operation<Result<(), EnrolError>> {
        Box::pin(async { Ok(()) })
    }

    /// A report that is longer than a message of a broker.
    fn rules(&self) -> Operation<serde_json::Value> {
        Box::pin(async { serde_json::Value::from("r".repeat(256 << 10)) })
    }

    fn problem(&self) -> Option<PodProblem> {
        None
    }

    fn listeners(&self) -> NamedListeners {
        Listeners::<Kind>::testing().duplicate()
    }

    fn has_certificate(&self) -> Operation<bool> {
        Box::pin(async { true })
    }

    fn pause(&self, part: Pause) -> Operation<()> {
        self.enroller.fake().paused.push((self.facts.uid.clone(), part));
        Box::pin(async {})
    }

    fn resume(&self) {
        let mut fake = self.enroller.fake();
        fake.paused.retain(|(uid, _)| *uid != self.facts.uid);
        fake.without_rules.retain(|uid| *uid != self.facts.uid);
    }

    fn remove_rules(&self) -> Operation<()> {
        let (enroller, uid) = (self.enroller.clone(), self.facts.uid.clone());
        Box::pin(async move { enroller.fake().without_rules.push(uid) })
    }

    fn leave(self: Box<Self>, why: LeaveReason, release: Release) -> Operation<()> {
        Box::pin(async move {
            release.wait().await;
            let held = self.enroller.fake().hold_leaving.clone();
            if let Some(mut held) = held {
                held.wait_for(|held| !held).await.ok();
            }
            let mut fake = self.enroller.fake();
            fake.serving.remove(&self.namespace);
            fake.left.push((self.facts.uid.clone(), why));
        })
    }
}

/// Starts `source`, with the state of an earlier one if there is one.
pub(crate) fn start(
    source: impl PodSource + 'static,
    registry: &PodRegistry,
    health: &SourceHealth,
    inherited: Option<SourceState>,
) -> (JoinHandle<SourceEnd>, SourceHandle) {
    let (handle, pauses) = source::pauses();
    let (registry, health) = (registry.clone(), health.clone());
    let context = SourceContext { registry, health, pauses, inherited };
    (tokio::spawn(Box::new(source).run(context)), handle)
}
