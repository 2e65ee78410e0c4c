//! The changes that the other process learns, and the work that is paused meanwhile.

use std::time::Duration;

use tokio::time::timeout;
use underpass_interception::testing::fake_namespace;

use super::*;
use crate::pods::enrolment::EnrolError;
use crate::pods::facts::tests::facts;
use crate::pods::registry::PodRegistry;
use crate::pods::testing::FakeEnroller;

fn pod(name: &str) -> PodFacts {
    PodFacts { uid: name.parse().unwrap(), name: name.to_owned(), ..facts() }
}

/// Adds a pod that is served.
async fn add(registry: &PodRegistry, name: &str) -> Namespace {
    let namespace = fake_namespace().unwrap();
    registry.add(pod(name), namespace.clone()).first_outcome().await.unwrap();
    namespace
}

/// The changes to pass now: a served pod, `(pod)` that is not served, or `-pod` that is gone.
fn moved(registry: &PodRegistry) -> Vec<String> {
    let next = || match registry.next_moved()? {
        Moved::Pod(MovedPod { facts, listeners: Some(_), .. }) => Some(facts.uid.to_string()),
        Moved::Pod(pod) => Some(format!("({})", pod.facts.uid)),
        Moved::Gone(uid) => Some(format!("-{uid}")),
    };
    let mut all: Vec<_> = std::iter::from_fn(next).collect();
    all.sort();
    all
}

#[tokio::test(start_paused = true)]
async fn passes_each_pod_once_and_then_its_changes() {
    let registry = FakeEnroller::default().registry();
    let namespace = add(&registry, "a").await;
    add(&registry, "b").await;
    assert_eq!(moved(&registry), ["a", "b"]);
    assert!(moved(&registry).is_empty());
    add(&registry, "c").await;
    drop(registry.remove(&"b".parse().unwrap()));
    let labels = [("app".to_owned(), "a".to_owned())].into();
    drop(registry.add(PodFacts { labels, ..pod("a") }, namespace));
    assert_eq!(moved(&registry), ["-b", "a", "c"]);
    // A pod of the same uid in another namespace.
    add(&registry, "c").await;
    assert_eq!(moved(&registry), ["-c", "c"]);
    assert!(moved(&registry).is_empty());
}

#[tokio::test(start_paused = true)]
async fn passes_other_pods_once_the_source_is_paused() {
    let (enroller, wait) = (FakeEnroller::default(), Duration::from_secs(3600));
    let registry = enroller.registry();
    let [failing, enrolling, late] = ["failing", "enrolling", "late"].map(pod);
    enroller.fail_next(&failing.uid, EnrolError::Panicked);
    let failed = registry.add(failing.clone(), fake_namespace().unwrap());
    failed.first_outcome().await.unwrap_err();
    let _held = enroller.hold_next(&enrolling.uid);
    drop(registry.add(enrolling, fake_namespace().unwrap()));
    while enroller.attempts(&"enrolling".parse().unwrap()) == 0 {
        tokio::task::yield_now().await;
    }
    assert!(moved(&registry).is_empty());
    registry.freeze().gone().await;
    let added = registry.add(late, fake_namespace().unwrap());
    timeout(wait, added.first_outcome()).await.expect_err("no attempt starts");
    assert_eq!(enroller.attempts(&failing.uid), 1);
    assert_eq!(moved(&registry), ["(enrolling)", "(failing)", "(late)"]);
    registry.resume_all();
    while enroller.serving().len() < 2 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn passed_pod_is_not_enrolled_by_this_process() {
    let enroller = FakeEnroller::default();
    let registry = enroller.registry();
    let namespace = add(&registry, "a").await;
    assert_eq!(moved(&registry), ["a"]);
    // The fake pod does not follow changed annotations.
    let annotations = [("a".to_owned(), "b".to_owned())].into();
    let changed = PodFacts { annotations, ..pod("a") };
    let enrolment = registry.add(changed, namespace);
    let waited = timeout(Duration::from_secs(60), enrolment.first_outcome()).await;
    assert!(waited.is_err() && enroller.serving().is_empty());
    assert_eq!(moved(&registry), ["(a)"]);
    registry.resume_all();
    while enroller.serving().is_empty() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn removed_pod_that_is_added_again_waits_for_its_release_and_is_passed_again() {
    let enroller = FakeEnroller::default();
    let (registry, uid) = (enroller.registry(), pod("a").uid);
    let namespace = add(&registry, "a").await;
    assert_eq!(moved(&registry), ["a"]);
    let mut removed = std::pin::pin!(registry.remove(&uid).gone());
    assert!(registry.has_gone());
    let mut added = std::pin::pin!(registry.add(pod("a"), namespace).first_outcome());
    assert_eq!(moved(&registry), ["-a"]);
    timeout(Duration::from_secs(60), &mut removed).await.expect_err("its rules are kept");
    let waited = timeout(Duration::from_secs(60), &mut added).await;
    assert!(waited.is_err() && registry.has_gone(), "the other process has its listeners");
    registry.released(&uid);
    removed.await;
    added.await.unwrap();
    assert_eq!(moved(&registry), ["a"]);
    assert!(!registry.has_gone() && enroller.attempts(&uid) == 2);
}

#[tokio::test(start_paused = true)]
async fn pod_removed_in_two_namespaces_keeps_rules_of_each_until_its_release() {
    let enroller = FakeEnroller::default();
    let (registry, uid) = (enroller.registry(), pod("a").uid);
    let _open = add(&registry, "a").await;
    assert_eq!(moved(&registry), ["a"]);
    let mut first = std::pin::pin!(registry.remove(&uid).gone());
    assert_eq!(moved(&registry), ["-a"]);
    add(&registry, "a").await;
    assert_eq!(moved(&registry), ["a"]);
    let mut both = std::pin::pin!(registry.remove(&uid).gone());
    assert_eq!(moved(&registry), ["-a"]);
    timeout(Duration::from_secs(60), &mut first).await.expect_err("its rules are kept");
    registry.released(&uid);
    first.await;
    timeout(Duration::from_secs(60), &mut both).await.expect_err("the second rules are kept");
    registry.released(&uid);
    both.await;
    assert!(!registry.has_gone());
}

#[tokio::test(start_paused = true)]
async fn removed_pod_that_drains_delays_freeze_and_completion() {
    let (enroller, wait) = (FakeEnroller::default(), Duration::from_secs(60));
    let registry = enroller.registry();
    add(&registry, "a").await;
    let release = enroller.hold_leaving();
    drop(registry.remove(&"a".parse().unwrap()));
    timeout(wait, registry.freeze().gone()).await.expect_err("it drains");
    timeout(wait, registry.finish_rules()).await.expect_err("it drains");
    release.send(false).unwrap();
    registry.freeze().gone().await;
    registry.finish_rules().await;
    assert_eq!(enroller.left(), [pod("a").uid]);
}

#[tokio::test(start_paused = true)]
async fn completed_move_removes_rules_of_exempt_pods_and_leaves_others() {
    let enroller = FakeEnroller::default();
    let registry = enroller.registry();
    add(&registry, "a").await;
    add(&registry, "b").await;
    assert_eq!(moved(&registry), ["a", "b"]);
    registry.exempt(&"b".parse().unwrap());
    registry.finish_rules().await;
    assert_eq!(enroller.without_rules(), [pod("b").uid]);
    // From here on the other process may enrol another pod in their namespaces.
    registry.hand_over().gone().await;
    assert_eq!(enroller.departures(), [LeaveReason::HandedOver; 2]);
    let refused = registry.add(pod("c"), fake_namespace().unwrap()).first_outcome().await;
    assert!(matches!(refused, Err(EnrolError::Stopping)));
}

#[tokio::test(start_paused = true)]
async fn changed_or_replaced_pod_is_no_longer_exempt() {
    let enroller = FakeEnroller::default();
    let registry = enroller.registry();
    let [a, b] = [add(&registry, "a").await, add(&registry, "b").await];
    assert_eq!(moved(&registry), ["a", "b"]);
    registry.exempt(&pod("a").uid);
    registry.exempt(&pod("b").uid);
    let labels = [("app".to_owned(), "a".to_owned())].into();
    registry.add(PodFacts { labels, ..pod("a") }, a).first_outcome().await.unwrap();
    let removed = registry.remove(&pod("b").uid);
    assert_eq!(moved(&registry), ["-b", "a"]);
    registry.released(&pod("b").uid);
    removed.gone().await;
    registry.add(pod("b"), b).first_outcome().await.unwrap();
    registry.finish_rules().await;
    assert!(enroller.without_rules().is_empty(), "{:?}", enroller.without_rules());
}

#[tokio::test(start_paused = true)]
async fn only_adopted_pods_are_enrolled_until_the_adoption_ends() {
    let enroller = FakeEnroller::default();
    let registry = enroller.registry();
    registry.begin_adoption();
    let enrolment = registry.add(pod("a"), fake_namespace().unwrap());
    assert!(registry.adopt(pod("b"), fake_namespace().unwrap(), None).is_none());
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(enroller.serving().is_empty());
    registry.finish_adoption();
    enrolment.first_outcome().await.unwrap();
    while enroller.serving().len() < 2 {
        tokio::task::yield_now().await;
    }
}
