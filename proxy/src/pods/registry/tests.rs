//! Tests of the registry with an enroller in memory.

use std::time::Duration;

use underpass_interception::testing::fake_namespace;

use super::*;
use crate::pods::enrolment::LeaveReason;
use crate::pods::facts::tests::facts;
use crate::pods::status::PodState;
use crate::pods::take_over::handed::Handed;
use crate::pods::testing::FakeEnroller;

fn pod(uid: &str) -> PodFacts {
    PodFacts { uid: uid.parse().unwrap(), ..facts() }
}

fn namespace() -> Namespace {
    fake_namespace().unwrap()
}

#[tokio::test(start_paused = true)]
async fn added_pod_is_served_and_removed_pod_has_left() {
    let enroller = FakeEnroller::default();
    let registry = enroller.registry();
    let (web, uid) = (pod("web"), pod("web").uid);
    registry.add(web, namespace()).first_outcome().await.unwrap();
    assert!(registry.is_known(&uid) && enroller.serving() == [uid.clone()]);
    registry.check(&uid).await.unwrap();
    registry.remove(&uid).gone().await;
    assert!(!registry.is_known(&uid) && enroller.serving().is_empty());
    assert!(matches!(registry.check(&uid).await, Err(EnrolError::Unknown)));
    registry.remove(&uid).gone().await;
    assert_eq!(enroller.left(), [uid]);
}

#[tokio::test(start_paused = true)]
async fn failed_pod_is_served_by_a_retry() {
    let enroller = FakeEnroller::default();
    let registry = enroller.registry();
    let uid = pod("web").uid;
    for _ in 0..3 {
        enroller.fail_next(&uid, EnrolError::Panicked);
    }
    let start = Instant::now();
    let failed = registry.add(pod("web"), namespace()).first_outcome().await;
    assert!(matches!(failed, Err(EnrolError::Panicked)));
    assert!(matches!(registry.check(&uid).await, Err(EnrolError::Panicked)));
    while enroller.serving().is_empty() {
        tokio::time::advance(Duration::from_millis(10)).await;
    }
    let waited = start.elapsed().as_millis();
    assert!((1400..=2130).contains(&waited), "250 + 500 + 1000 ms: {waited}");
    assert_eq!(enroller.attempts(&uid), 4);
}

#[tokio::test(start_paused = true)]
async fn removal_continues_when_source_does_not_wait() {
    let enroller = FakeEnroller::default();
    let registry = enroller.registry();
    let uid = pod("web").uid;
    registry.add(pod("web"), namespace()).first_outcome().await.unwrap();
    let leaving = enroller.hold_leaving();
    drop(registry.remove(&uid));
    assert!(!registry.is_known(&uid));
    let states = registry.status();
    assert!(matches!(&states[..], [PodStatus { state: PodState::Leaving, .. }]), "{states:?}");
    drop(leaving);
    registry.stop().gone().await;
    assert_eq!(enroller.left(), [uid]);
    assert_eq!(enroller.departures(), [LeaveReason::Removed]);
    assert!(registry.status().is_empty());
}

#[tokio::test(start_paused = true)]
async fn leave_reason_decides_whether_rules_are_kept() {
    let enroller = FakeEnroller::default();
    let registry = enroller.registry();
    let (here, there) = (namespace(), namespace());
    registry.add(pod("web"), here.clone()).first_outcome().await.unwrap();
    // The fake pod cannot apply a new name.
    let renamed = PodFacts { name: "other".to_owned(), ..pod("web") };
    registry.add(renamed.clone(), here).first_outcome().await.unwrap();
    registry.add(renamed, there).first_outcome().await.unwrap();
    registry.stop().gone().await;
    let expected = [LeaveReason::EnrolledAgain, LeaveReason::Removed, LeaveReason::DaemonStops];
    assert_eq!(enroller.departures(), expected);
}

#[tokio::test(start_paused = true)]
async fn status_names_pod_and_cause() {
    let enroller = FakeEnroller::default();
    let registry = enroller.registry();
    enroller.fail_next(&pod("b").uid, EnrolError::Panicked);
    let held = enroller.hold_next(&pod("a").uid);
    registry.add(PodFacts { name: "one".to_owned(), ..pod("a") }, namespace());
    let failed = registry.add(PodFacts { name: "two".to_owned(), ..pod("b") }, namespace());
    failed.first_outcome().await.unwrap_err();
    let status = registry.status();
    let names: Vec<_> = status.iter().map(|pod| pod.pod.as_str()).collect();
    assert_eq!(names, ["shop/one", "shop/two"]);
    let cause = EnrolError::Panicked.to_string();
    let is_tried = matches!(&status[1].state, PodState::Pending { error: Some(error), .. } if error.to_string() == cause);
    assert!(is_tried, "{status:?}");
    let lines = "shop/one a pending for 0 s: enrolling\n\
        shop/two b pending for 0 s: waiting for the next attempt: the attempt to enrol the pod panicked\n";
    let report: String = registry.report().iter().map(|pod| format!("{pod}\n")).collect();
    assert_eq!(report, lines);
    drop(held);
}

#[tokio::test(start_paused = true)]
async fn panicking_attempt_is_an_error_of_its_pod() {
    #[derive(Debug)]
    struct Panics;
    impl Enroller for Panics {
        fn enrol(
            &self,
            _: Arc<PodFacts>,
            _: Namespace,
            _: Option<Handed>,
        ) -> crate::pods::enrolment::Operation<Result<Enrolled, EnrolError>> {
            Box::pin(async { panic!("a defect") })
        }
    }
    let (registry, task) = PodRegistry::new(Arc::new(Panics));
    tokio::spawn(task.run());
    let outcome = registry.add(pod("web"), namespace()).first_outcome().await;
    assert!(matches!(outcome, Err(EnrolError::Panicked)));
}
