//! Tests of additions, removals and restarts.

mod follow;

use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinSet;

use super::*;
use crate::decide::snapshot::Snapshot;
use crate::node::testing::settings;
use crate::pods::cni::attachment::PodReference;
use crate::pods::cni::facts::FactOrigin;
use crate::pods::cni::report::Report;
use crate::pods::cni::results::CniResults;
use crate::pods::cni::testing::{Folder, attached, facts, namespace, namespace_path, snapshot};
use crate::pods::enrolment::LeaveReason;
use crate::pods::kubernetes::testing::{
    cluster, namespace as kubernetes_namespace, pod, unreachable,
};
use crate::pods::kubernetes::view::ClusterView;
use crate::pods::source::SourceHealth;
use crate::pods::testing::FakeEnroller;
use crate::process::pause_gate::PauseGate;

/// A label whose changes the fake pod applies.
const LABEL: &str = "istio.io/revision";

/// A daemon that stores pods in a folder.
struct Daemon {
    ledger: Arc<Ledger>,
    enroller: FakeEnroller,
    mesh: watch::Sender<Arc<Snapshot>>,
    results: CniResults,
}

impl Daemon {
    fn start(folder: &Folder) -> Self {
        let enroller = FakeEnroller::default();
        let (facts, mesh) = facts();
        let store = Store::open(folder.path("pods")).unwrap();
        let ledger =
            Arc::new(Ledger::new(enroller.registry(), facts, store, |path| Namespace::open(path)));
        let results = CniResults::new(folder.path("results"));
        Self { ledger, enroller, mesh, results }
    }

    async fn add(&self, pod: &AttachedPod, kind: &str) -> Result<(), Refusal> {
        let added = self.ledger.add(pod.clone(), namespace(kind)).await;
        added.map(|added| drop(added.answered()))
    }

    async fn delete(&self, pod: &AttachedPod) {
        if let Some(removal) = self.ledger.delete(&pod.attachment) {
            removal.gone().await;
        }
    }

    /// Follows the facts until the result is dropped.
    fn follow(&self) -> JoinSet<()> {
        let mut following = JoinSet::new();
        let report = Arc::new(Report::new(SourceHealth::default()));
        following.spawn(self.ledger.clone().follow_facts(
            self.results.clone(),
            report,
            PauseGate::default(),
        ));
        following
    }

    fn serving(&self) -> Vec<String> {
        self.enroller.serving().iter().map(ToString::to_string).collect()
    }

    /// Waits until exactly these pods are served.
    async fn serves(&self, uids: &[&str]) {
        while self.serving() != uids {
            tokio::task::yield_now().await;
        }
    }

    fn stored(&self) -> usize {
        self.ledger.store.load().unwrap().len()
    }
}

/// The same pod in another container, with this interface.
fn in_container(pod: &AttachedPod, container: &str, interface: &str) -> AttachedPod {
    let attachment = Attachment::new(container, interface).unwrap();
    AttachedPod { attachment, ..pod.clone() }
}

#[tokio::test]
async fn pod_is_served_and_stored_until_it_is_deleted() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder);
    let web = attached("web", &["10.0.0.1"]);
    daemon.add(&web, "uts").await.unwrap();
    assert_eq!((daemon.serving(), daemon.stored()), (vec!["uid-of-web".to_owned()], 1));
    daemon.add(&web, "uts").await.unwrap();
    assert_eq!(daemon.enroller.attempts(&web.pod.uid), 1, "adding is idempotent");
    daemon.delete(&web).await;
    assert_eq!((daemon.serving(), daemon.stored()), (vec![], 0));
    daemon.delete(&web).await;
}

#[tokio::test]
async fn addition_is_undone_unless_the_plugin_got_the_answer() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder);
    let web = attached("web", &["10.0.0.1"]);
    drop(daemon.ledger.add(web.clone(), namespace("uts")).await.unwrap());
    daemon.serves(&[]).await;
    assert_eq!(daemon.stored(), 0);
    daemon.add(&web, "uts").await.unwrap();
}

#[tokio::test]
async fn abandoned_addition_is_undone() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder);
    let web = attached("web", &["10.0.0.1"]);
    let release = daemon.enroller.hold_next(&web.pod.uid);
    {
        let addition = daemon.ledger.add(web.clone(), namespace("uts"));
        tokio::pin!(addition);
        while daemon.enroller.attempts(&web.pod.uid) == 0 {
            tokio::select! {
                biased;
                _ = &mut addition => panic!("the attempt waits"),
                () = tokio::task::yield_now() => {}
            }
        }
    }
    assert!(!daemon.ledger.registry.is_known(&web.pod.uid));
    drop(release);
    daemon.add(&web, "uts").await.unwrap();
    daemon.serves(&["uid-of-web"]).await;
}

#[tokio::test]
async fn failed_addition_leaves_nothing() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder);
    let web = attached("web", &["10.0.0.1"]);
    daemon.enroller.fail_next(&web.pod.uid, EnrolError::Panicked);
    let refusal = daemon.add(&web, "uts").await.unwrap_err();
    assert_eq!(refusal.code, 11);
    assert_eq!(refusal.message, "the pod is not enrolled: the attempt to enrol the pod panicked");
    assert!(!daemon.ledger.registry.is_known(&web.pod.uid));
    assert_eq!(daemon.stored(), 0);
}

#[tokio::test]
async fn pod_that_is_missing_in_the_mesh_is_refused() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder);
    let refusal = daemon.add(&attached("other", &[]), "uts").await.unwrap_err();
    assert_eq!(refusal.code, 11);
    assert!(refusal.message.contains("service account is unknown"), "{}", refusal.message);
    assert!(refusal.hint.contains("mesh.file"), "{}", refusal.hint);
}

#[tokio::test]
async fn addition_of_exempt_pod_succeeds_without_enrolment() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder);
    let pod = PodReference::new("core", "dns", "uid-of-dns").unwrap();
    let dns = AttachedPod { pod, ..attached("dns", &[]) };
    daemon.add(&dns, "uts").await.unwrap();
    assert_eq!((daemon.serving(), daemon.stored()), (vec![], 0));
    daemon.ledger.check(&dns, namespace("uts").id()).await.unwrap();
    daemon.delete(&dns).await;
}

#[tokio::test]
async fn deletion_ends_addition_in_progress() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder);
    let web = attached("web", &["10.0.0.1"]);
    let _release = daemon.enroller.hold_next(&web.pod.uid);
    let ledger = daemon.ledger.clone();
    let addition = {
        let web = web.clone();
        tokio::spawn(async move { ledger.add(web, namespace("uts")).await.map(drop) })
    };
    while daemon.enroller.attempts(&web.pod.uid) == 0 {
        tokio::task::yield_now().await;
    }
    drop(daemon.ledger.delete(&web.attachment));
    let refusal = addition.await.unwrap().unwrap_err();
    assert_eq!((refusal.code, daemon.stored()), (11, 0));
}

#[tokio::test]
async fn late_deletion_of_old_container_keeps_the_new_one() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder);
    let old = attached("web", &["10.0.0.1"]);
    let new = in_container(&old, "web-2", "eth0");
    daemon.add(&old, "uts").await.unwrap();
    daemon.add(&new, "ipc").await.unwrap();
    daemon.delete(&old).await;
    assert_eq!((daemon.serving(), daemon.stored()), (vec!["uid-of-web".to_owned()], 1));
    daemon.delete(&new).await;
    assert_eq!(daemon.serving(), [""; 0]);
}

#[tokio::test]
async fn pod_stays_until_its_last_interface_is_deleted() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder);
    let first = attached("web", &["10.0.0.1"]);
    let second = in_container(&first, "web-1", "net1");
    daemon.add(&first, "uts").await.unwrap();
    daemon.add(&second, "uts").await.unwrap();
    daemon.delete(&first).await;
    assert_eq!(daemon.serving(), ["uid-of-web"]);
    daemon.delete(&second).await;
    assert_eq!(daemon.serving(), [""; 0]);
}

#[tokio::test]
async fn garbage_collection_keeps_valid_and_foreign_attachments() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder);
    let (web, db) = (attached("web", &["10.0.0.1"]), attached("db", &["10.0.0.2"]));
    daemon.add(&web, "uts").await.unwrap();
    daemon.add(&db, "ipc").await.unwrap();
    let other = NetworkName::new("other").unwrap();
    daemon.ledger.collect(&other, &BTreeSet::new());
    let valid = BTreeSet::from([web.attachment.clone()]);
    daemon.ledger.collect(&web.network, &valid);
    daemon.serves(&["uid-of-web"]).await;
    let _release = daemon.enroller.hold_next(&db.pod.uid);
    let adding = daemon.ledger.add(db.clone(), namespace("ipc"));
    tokio::pin!(adding);
    tokio::select! {
        biased;
        _ = &mut adding => panic!("the attempt waits"),
        () = tokio::task::yield_now() => {}
    }
    daemon.ledger.collect(&web.network, &valid);
    assert!(daemon.ledger.registry.is_known(&db.pod.uid), "an addition in progress is not removed");
}

#[tokio::test]
async fn sweep_removes_pods_whose_namespace_no_longer_exists() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder);
    let path = folder.path("netns");
    std::os::unix::fs::symlink(namespace_path("uts"), &path).unwrap();
    let mut web = attached("web", &["10.0.0.1"]);
    web.namespace_path = path.display().to_string();
    // A path that exists only in another mount namespace.
    let hidden = folder.path("hidden").display().to_string();
    let db = AttachedPod { namespace_path: hidden, ..attached("db", &["10.0.0.2"]) };
    daemon.add(&web, "uts").await.unwrap();
    daemon.add(&db, "ipc").await.unwrap();
    daemon.ledger.sweep();
    daemon.serves(&["uid-of-db", "uid-of-web"]).await;
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink(namespace_path("mnt"), &path).unwrap();
    daemon.ledger.sweep();
    daemon.serves(&["uid-of-db"]).await;
    assert_eq!(daemon.stored(), 1);
}

#[tokio::test]
async fn restarted_daemon_enrols_pods_that_still_exist() {
    let folder = Folder::new();
    let (web, db) = (attached("web", &["10.0.0.1"]), attached("db", &["10.0.0.2"]));
    {
        let daemon = Daemon::start(&folder);
        daemon.add(&web, "uts").await.unwrap();
        // The stored path leads to another namespace.
        daemon.add(&db, "ipc").await.unwrap();
    }
    let daemon = Daemon::start(&folder);
    daemon.ledger.resume().unwrap();
    daemon.ledger.apply_facts();
    daemon.serves(&["uid-of-web"]).await;
    assert_eq!(daemon.stored(), 1);
    daemon.ledger.check(&web, namespace("uts").id()).await.unwrap();
    daemon.delete(&web).await;
    assert_eq!((daemon.serving(), daemon.stored()), (vec![], 0));
}

#[tokio::test]
async fn restarted_daemon_waits_for_facts_about_a_pod() {
    let folder = Folder::new();
    let web = attached("web", &["10.0.0.1"]);
    Daemon::start(&folder).add(&web, "uts").await.unwrap();
    let daemon = Daemon::start(&folder);
    daemon.mesh.send_replace(snapshot(&settings(&[]), &["db"]));
    daemon.ledger.resume().unwrap();
    let _following = daemon.follow();
    daemon.mesh.send_replace(snapshot(&settings(&[]), &["db", "web"]));
    daemon.serves(&["uid-of-web"]).await;
}

/// A ledger that stores pods in `folder`, and gets their facts from the returned view.
fn start_with_cluster(folder: &Folder) -> (Ledger, FakeEnroller, watch::Sender<ClusterView>) {
    let (enroller, view) = (FakeEnroller::default(), watch::Sender::default());
    let store = Store::open(folder.path("pods")).unwrap();
    let facts = FactFinder::new(&settings(&[]), FactOrigin::Kubernetes(view.subscribe()));
    let open = |path: &Path| Namespace::open(path);
    (Ledger::new(enroller.registry(), facts, store, open), enroller, view)
}

#[tokio::test]
async fn restarted_daemon_uses_stored_facts_while_the_api_server_is_unreachable() {
    let folder = Folder::new();
    let web = attached("web", &["10.0.0.1"]);
    let mut object = pod("web");
    {
        let (ledger, _, view) = start_with_cluster(&folder);
        cluster(&view, &[object.clone()], &[kubernetes_namespace("shop", "ambient")]);
        drop(ledger.add(web.clone(), namespace("uts")).await.unwrap().answered());
        object["metadata"]["labels"][LABEL] = "new".into();
        cluster(&view, &[object.clone()], &[kubernetes_namespace("shop", "ambient")]);
        ledger.apply_facts();
    }
    let (ledger, enroller, view) = start_with_cluster(&folder);
    ledger.resume().unwrap();
    ledger.apply_facts();
    assert!(!ledger.registry.is_known(&web.pod.uid), "the API server may still answer");
    unreachable(&view);
    ledger.apply_facts();
    let label = || ledger.registry.known(&web.pod.uid).unwrap().0.labels.get(LABEL).cloned();
    assert_eq!(label().as_deref(), Some("new"), "the last facts were stored");
    while enroller.serving().is_empty() {
        tokio::task::yield_now().await;
    }
    object["metadata"]["labels"][LABEL] = "newer".into();
    cluster(&view, &[object], &[kubernetes_namespace("shop", "ambient")]);
    ledger.apply_facts();
    assert_eq!((label().as_deref(), enroller.attempts(&web.pod.uid)), (Some("newer"), 1));
}

#[tokio::test]
async fn closed_gate_delays_changed_facts() {
    let folder = Folder::new();
    let (ledger, _, view) = start_with_cluster(&folder);
    let (ledger, gate) = (Arc::new(ledger), PauseGate::default());
    let (mut object, namespaces) = (pod("web"), [kubernetes_namespace("shop", "ambient")]);
    cluster(&view, &[object.clone()], &namespaces);
    let web = attached("web", &["10.0.0.1"]);
    drop(ledger.add(web.clone(), namespace("uts")).await.unwrap().answered());
    let results = CniResults::new(folder.path("results"));
    let report = Arc::new(Report::new(SourceHealth::default()));
    let mut following = JoinSet::new();
    following.spawn(ledger.clone().follow_facts(results, report, gate.clone()));
    tokio::task::yield_now().await;
    gate.close().await;
    object["metadata"]["labels"][LABEL] = "new".into();
    cluster(&view, &[object], &namespaces);
    let has_label = || ledger.registry.known(&web.pod.uid).unwrap().0.labels.contains_key(LABEL);
    for _ in 0..100 {
        tokio::task::yield_now().await;
        assert!(!has_label());
    }
    gate.open();
    while !has_label() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn facts_that_change_back_are_stored_again() {
    let folder = Folder::new();
    let of_revision = |revision: &str| {
        let mut object = pod("web");
        object["metadata"]["labels"][LABEL] = revision.into();
        object
    };
    let namespaces = [kubernetes_namespace("shop", "ambient")];
    {
        let (ledger, _, view) = start_with_cluster(&folder);
        cluster(&view, &[of_revision("one")], &namespaces);
        let web = attached("web", &["10.0.0.1"]);
        drop(ledger.add(web, namespace("uts")).await.unwrap().answered());
    }
    let (ledger, _, view) = start_with_cluster(&folder);
    ledger.resume().unwrap();
    for revision in ["one", "two", "one"] {
        cluster(&view, &[of_revision(revision)], &namespaces);
        ledger.apply_facts();
        let stored = ledger.store.load().unwrap().pop().unwrap().facts.unwrap();
        assert_eq!(stored.labels.get(LABEL).map(String::as_str), Some(revision));
    }
}

#[tokio::test]
async fn pod_deleted_while_facts_are_missing_is_not_enrolled() {
    let folder = Folder::new();
    let web = attached("web", &["10.0.0.1"]);
    Daemon::start(&folder).add(&web, "uts").await.unwrap();
    let daemon = Daemon::start(&folder);
    daemon.mesh.send_replace(snapshot(&settings(&[]), &[]));
    daemon.ledger.resume().unwrap();
    daemon.delete(&web).await;
    daemon.mesh.send_replace(snapshot(&settings(&[]), &["web"]));
    daemon.ledger.apply_facts();
    assert!(!daemon.ledger.registry.is_known(&web.pod.uid));
}

#[tokio::test]
async fn changed_facts_are_applied_to_running_pod() {
    let folder = Folder::new();
    let (ledger, enroller, view) = start_with_cluster(&folder);
    let (web, mut object) = (attached("web", &["10.0.0.1"]), pod("web"));
    cluster(&view, &[object.clone()], &[kubernetes_namespace("shop", "ambient")]);
    drop(ledger.add(web.clone(), namespace("uts")).await.unwrap().answered());
    ledger.apply_facts();
    assert_eq!(enroller.attempts(&web.pod.uid), 1, "nothing has changed");
    // The fake pod applies changes of labels only, so a new service account enrols it again.
    object["metadata"]["labels"]["istio.io/dataplane-mode"] = "none".into();
    cluster(&view, &[object.clone()], &[kubernetes_namespace("shop", "ambient")]);
    ledger.apply_facts();
    assert_eq!(enroller.attempts(&web.pod.uid), 1);
    object["spec"]["serviceAccountName"] = "other".into();
    cluster(&view, &[object], &[kubernetes_namespace("shop", "ambient")]);
    ledger.apply_facts();
    while enroller.attempts(&web.pod.uid) < 2 {
        tokio::task::yield_now().await;
    }
    assert_eq!(enroller.departures(), [LeaveReason::EnrolledAgain]);
    // The last facts stay when the pod is no longer listed.
    cluster(&view, &[], &[]);
    ledger.apply_facts();
    assert!(ledger.registry.is_known(&web.pod.uid));
}

#[tokio::test]
async fn check_compares_attachment_and_namespace() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder);
    let web = attached("web", &["10.0.0.1"]);
    let check = |kind| daemon.ledger.check(&web, namespace(kind).id());
    assert_eq!(check("uts").await.unwrap_err().code, 3);
    daemon.add(&web, "uts").await.unwrap();
    check("uts").await.unwrap();
    let refusal = check("ipc").await.unwrap_err();
    assert_eq!(refusal.code, 101);
    assert!(refusal.message.ends_with("which is not CNI_NETNS"), "{}", refusal.message);
}

/// The status of every pod, one on each line.
fn report(registry: &PodRegistry) -> String {
    registry.report().iter().map(|pod| format!("{pod}\n")).collect()
}
