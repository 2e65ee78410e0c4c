//! Tests of collecting changes, and of the node id of the client.

use underpass_config::FileWatcher;

use super::*;
use crate::node::testing::settings;

const XDS: [&str; 4] = [
    "mesh.xds.address=https://istiod:15012",
    "mesh.xds.roots=roots.pem",
    "mesh.xds.cluster_id=east",
    "workload.name=web",
];

fn follower() -> (ControlPlaneFollower, watch::Receiver<Option<Arc<Mesh>>>) {
    let settings = settings(&XDS);
    let (file, _) = MeshSource::open(None, &FileWatcher::default(), run_in_background).unwrap();
    ControlPlaneFollower::new(
        &settings,
        settings.xds.as_ref().unwrap(),
        file,
        None,
        Lookups::default(),
        MeshHealth::default(),
    )
}

/// A follower with a complete, empty state.
async fn synced() -> (ControlPlaneFollower, watch::Receiver<Option<Arc<Mesh>>>) {
    let (mut follower, snapshots) = follower();
    for kind in ResourceType::ALL {
        follower.apply(empty(kind)).await.unwrap();
    }
    (follower, snapshots)
}

fn empty(kind: ResourceType) -> DeltaResponse {
    DeltaResponse { type_url: kind.url().to_owned(), ..DeltaResponse::default() }
}

#[test]
fn node_has_ztunnels_form_and_own_workload_is_local() {
    let settings = settings(&XDS);
    let node = node(&settings, settings.xds.as_ref().unwrap());
    assert_eq!(node.id, "ztunnel~1.1.1.1~web.default~default.svc.cluster.local");
    let metadata = node.metadata.unwrap().fields;
    let fact = |name: &str| metadata.get(name).and_then(|value| value.text.as_deref());
    assert_eq!(
        ["NAME", "NAMESPACE", "CLUSTER_ID", "NODE_NAME"].map(fact),
        [Some("web"), Some("default"), Some("east"), None]
    );
    let local = local(&settings);
    assert_eq!((local.node, local.named), (None, Some(("default".into(), "web".into()))));
}

#[tokio::test(start_paused = true)]
async fn collected_changes_are_published_once_after_interval() {
    let (mut follower, mut snapshots) = synced().await;
    follower.due = Some(Instant::now() + COALESCE);
    let waited = follower.or_file_changes(tokio::time::sleep(COALESCE / 2));
    waited.await;
    assert!(!snapshots.has_changed().unwrap());
    follower.or_file_changes(tokio::time::sleep(COALESCE)).await;
    assert!(snapshots.borrow_and_update().is_some());
    follower.or_file_changes(tokio::time::sleep(COALESCE * 10)).await;
    assert!(!snapshots.has_changed().unwrap());
}

#[tokio::test(start_paused = true)]
async fn answers_are_collected_for_shorter_time_and_policies_not_at_all() {
    let (mut follower, mut snapshots) = synced().await;
    let readiness = Readiness::default();
    follower.take_effect(Urgency::Low, &readiness);
    assert!(snapshots.borrow_and_update().is_some(), "the first state");
    follower.take_effect(Urgency::Low, &readiness);
    follower.take_effect(Urgency::Awaited, &readiness);
    follower.take_effect(Urgency::Awaited, &readiness);
    follower.take_effect(Urgency::Low, &readiness);
    assert!(!snapshots.has_changed().unwrap());
    follower.or_file_changes(tokio::time::sleep(COLLECT_ANSWERS * 2)).await;
    assert!(snapshots.has_changed().unwrap());
    snapshots.mark_unchanged();
    follower.or_file_changes(tokio::time::sleep(COALESCE * 2)).await;
    assert!(!snapshots.has_changed().unwrap(), "one snapshot");
    follower.take_effect(Urgency::Immediate, &readiness);
    assert!(snapshots.has_changed().unwrap());
}

#[tokio::test(start_paused = true)]
async fn last_mesh_stays_after_state_is_lost() {
    let (mut follower, mut snapshots) = synced().await;
    follower.publish();
    let last = snapshots.borrow_and_update().clone().unwrap();
    follower.plane = follower.plane.renewed();
    follower.due = Some(Instant::now() + COALESCE);
    follower.or_file_changes(tokio::time::sleep(COALESCE * 2)).await;
    assert!(!snapshots.has_changed().unwrap());
    assert!(Arc::ptr_eq(&last, snapshots.borrow().as_ref().unwrap()));
}

#[tokio::test]
async fn small_and_large_responses_are_applied() {
    let (mut follower, _) = follower();
    assert!(!follower.plane.is_synced());
    let removed = (0..=MAX_INLINE).map(|name| name.to_string()).collect();
    let large = DeltaResponse { removed_resources: removed, ..empty(ResourceType::Address) };
    assert_eq!(follower.apply(large).await.unwrap().removed, MAX_INLINE + 1);
    let applied = follower.apply(empty(ResourceType::Authorization)).await.unwrap();
    assert_eq!(applied.urgency, Urgency::Immediate);
    assert!(follower.plane.is_synced());
    let unknown = DeltaResponse { type_url: "unknown".into(), ..DeltaResponse::default() };
    follower.apply(unknown).await.unwrap_err();
}
