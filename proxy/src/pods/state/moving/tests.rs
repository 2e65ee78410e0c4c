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
    registry.freeze().unwrap();
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
    registry.remove(&uid).gone().await;
    assert!(registry.has_gone());
    let mut added = std::pin::pin!(registry.add(pod("a"), namespace).first_outcome());
    assert_eq!(moved(&registry), ["-a"]);
    let waited = timeout(Duration::from_secs(60), &mut added).await;
    assert!(waited.is_err() && registry.has_gone(), "the other process has its listeners");
    registry.released(&uid);
    added.await.unwrap();
    assert_eq!(moved(&registry), ["a"]);
    assert!(!registry.has_gone() && enroller.attempts(&uid) == 2);
}

#[tokio::test(start_paused = true)]
async fn freeze_is_refused_while_removed_pod_drains_in_namespace_of_another() {
    let enroller = FakeEnroller::default();
    let registry = enroller.registry();
    let namespace = add(&registry, "a").await;
    let release = enroller.hold_leaving();
    drop(registry.remove(&"a".parse().unwrap()));
    registry.freeze().unwrap();
    registry.resume_all();
    let replaced = registry.add(pod("b"), namespace);
    let reason = registry.freeze().unwrap_err();
    assert!(reason.contains("the removed pod shop/a drains"), "{reason}");
    release.send(false).unwrap();
    replaced.first_outcome().await.unwrap();
    registry.freeze().unwrap();
}

#[tokio::test(start_paused = true)]
async fn completed_move_leaves_rules_except_those_of_exempt_pods() {
    let enroller = FakeEnroller::default();
    let registry = enroller.registry();
    add(&registry, "a").await;
    add(&registry, "b").await;
    assert_eq!(moved(&registry), ["a", "b"]);
    registry.exempt(&"b".parse().unwrap());
    registry.hand_over().gone().await;
    let mut left: Vec<_> = enroller.left().into_iter().zip(enroller.departures()).collect();
    left.sort_by(|(one, _), (other, _)| one.cmp(other));
    let expected = [("a", LeaveReason::HandedOver), ("b", LeaveReason::Removed)];
    assert_eq!(left, expected.map(|(uid, why)| (uid.parse().unwrap(), why)));
    let refused = registry.add(pod("c"), fake_namespace().unwrap()).first_outcome().await;
    assert!(matches!(refused, Err(EnrolError::Stopping)));
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
