//! An enroller for tests, which needs no namespace and no root.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::{oneshot, watch};
use underpass_config::PodUid;
use underpass_interception::{Namespace, NamespaceId};

use crate::pods::enrolment::{
    Departure, EnrolError, Enrolled, EnrolledPod, Enroller, Operation, Trouble,
};
use crate::pods::facts::PodFacts;
use crate::pods::registry::PodRegistry;

/// Enrols pods in memory. Attempts succeed at once unless a script says otherwise.
#[derive(Debug, Clone, Default)]
pub(crate) struct FakeEnroller(Arc<Mutex<Fake>>);

#[derive(Debug, Default)]
struct Fake {
    /// Outcomes of the next attempts of a pod; without one an attempt succeeds.
    scripts: HashMap<PodUid, VecDeque<Scripted>>,
    serving: HashMap<NamespaceId, Arc<PodFacts>>,
    attempts: HashMap<PodUid, usize>,
    left: Vec<(PodUid, Departure)>,
    /// Pods leave once this is false.
    hold_leaving: Option<watch::Receiver<bool>>,
}

#[derive(Debug)]
enum Scripted {
    Fails(EnrolError),
    Waits(oneshot::Receiver<()>),
}

impl FakeEnroller {
    /// Starts a registry with this enroller.
    pub(crate) fn registry(&self) -> PodRegistry {
        let (registry, task) = PodRegistry::new(Arc::new(self.clone()));
        tokio::spawn(task.run());
        registry
    }

    /// Lets the next attempt of a pod fail, after those scripted before.
    pub(crate) fn fail_next(&self, uid: &PodUid, error: EnrolError) {
        self.script(uid, Scripted::Fails(error));
    }

    /// Lets the next attempt of a pod wait until the sender is used or dropped.
    pub(crate) fn hold_next(&self, uid: &PodUid) -> oneshot::Sender<()> {
        let (release, held) = oneshot::channel();
        self.script(uid, Scripted::Waits(held));
        release
    }

    /// Lets pods that leave wait until the sender has false or is dropped.
    pub(crate) fn hold_leaving(&self) -> watch::Sender<bool> {
        let (release, held) = watch::channel(true);
        self.fake().hold_leaving = Some(held);
        release
    }

    fn script(&self, uid: &PodUid, scripted: Scripted) {
        self.fake().scripts.entry(uid.clone()).or_default().push_back(scripted);
    }

    /// The uids of the pods that are served, in order.
    pub(crate) fn serving(&self) -> Vec<PodUid> {
        let mut serving: Vec<_> =
            self.fake().serving.values().map(|facts| facts.uid.clone()).collect();
        serving.sort();
        serving
    }

    /// How many attempts a pod has had.
    pub(crate) fn attempts(&self, uid: &PodUid) -> usize {
        self.fake().attempts.get(uid).copied().unwrap_or_default()
    }

    /// The pods that have left, in that order.
    pub(crate) fn left(&self) -> Vec<PodUid> {
        self.fake().left.iter().map(|(uid, _)| uid.clone()).collect()
    }

    /// Why the pods have left, in that order.
    pub(crate) fn departures(&self) -> Vec<Departure> {
        self.fake().left.iter().map(|(_, why)| *why).collect()
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
    ) -> Operation<Result<Enrolled, EnrolError>> {
        let this = self.clone();
        Box::pin(async move {
            let scripted = {
                let mut fake = this.fake();
                *fake.attempts.entry(facts.uid.clone()).or_default() += 1;
                fake.scripts.get_mut(&facts.uid).and_then(VecDeque::pop_front)
            };
            match scripted {
                Some(Scripted::Fails(error)) => return Err(error),
                Some(Scripted::Waits(held)) => {
                    held.await.ok();
                }
                None => {}
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
    /// Follows changes of labels alone.
    fn follow(&self, facts: &PodFacts) -> Result<(), Departure> {
        let same = PodFacts { labels: self.facts.labels.clone(), ..facts.clone() } == *self.facts;
        same.then_some(()).ok_or(Departure::EnrolledAgain)
    }

    fn check(&self) -> Operation<Result<(), EnrolError>> {
        Box::pin(async { Ok(()) })
    }

    fn trouble(&self) -> Option<Trouble> {
        None
    }

    fn leave(self: Box<Self>, why: Departure) -> Operation<()> {
        Box::pin(async move {
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
