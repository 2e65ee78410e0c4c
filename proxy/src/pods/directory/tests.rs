//! Tests with a folder of pod files, and with namespaces and an enroller in memory. Paused time
//! drives the polling.

use std::collections::HashMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Mutex;

use tokio::task::JoinHandle;
use underpass_interception::testing::fake_namespace;

use super::*;
use crate::pods::enrolment::LeaveReason;
use crate::pods::source::{self, SourceEnd, SourceHandle};
use crate::pods::status::PodState;
use crate::pods::testing::{FakeEnroller, start};

/// Longer than the intervals at which the folder and the namespaces are polled.
const LONGER_THAN_POLL: Duration = Duration::from_secs(60);

struct Fixture {
    folder: PathBuf,
    namespaces: Arc<Mutex<HashMap<PathBuf, Namespace>>>,
    enroller: FakeEnroller,
    registry: PodRegistry,
    health: SourceHealth,
    running: JoinHandle<SourceEnd>,
    handle: SourceHandle,
}

impl Drop for Fixture {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.folder).ok();
    }
}

impl Fixture {
    fn new(test: &str) -> Self {
        let name = format!("underpass-directory-{test}-{}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        fs::create_dir_all(&folder).unwrap();
        fs::set_permissions(&folder, Permissions::from_mode(0o755)).unwrap();
        let namespaces: Arc<Mutex<HashMap<PathBuf, Namespace>>> = Arc::default();
        let enroller = FakeEnroller::default();
        let (registry, health) = (enroller.registry(), SourceHealth::default());
        let (handle, _) = source::pauses();
        let running = tokio::spawn(std::future::pending());
        let mut fixture = Self { folder, namespaces, enroller, registry, health, running, handle };
        fixture.start(None);
        fixture
    }

    /// Starts a source of the folder in place of the one before.
    fn start(&mut self, inherited: Option<SourceState>) {
        self.running.abort();
        let source = self.source();
        (self.running, self.handle) = start(source, &self.registry, &self.health, inherited);
    }

    /// Another source of the folder.
    fn source(&self) -> DirectorySource {
        let opened = self.namespaces.clone();
        let open = move |path: &Path| match opened.lock().unwrap().get(path) {
            Some(namespace) => Ok(namespace.clone()),
            None => Namespace::open("/nowhere"),
        };
        let (watcher, open) = (FileWatcher::default(), Box::new(open));
        DirectorySource::with_namespaces(&self.folder, &watcher, open).unwrap()
    }

    /// Creates or replaces a namespace.
    fn namespace(&self, name: &str) {
        let namespace = fake_namespace().unwrap();
        self.namespaces.lock().unwrap().insert(format!("/run/netns/{name}").into(), namespace);
    }

    fn delete_namespace(&self, name: &str) {
        self.namespaces.lock().unwrap().remove(Path::new(&format!("/run/netns/{name}")));
    }

    async fn write(&self, file: &str, text: &str) {
        fs::write(self.folder.join(".staged"), text).unwrap();
        fs::rename(self.folder.join(".staged"), self.folder.join(file)).unwrap();
        tokio::time::sleep(LONGER_THAN_POLL).await;
    }

    async fn remove(&self, file: &str) {
        fs::remove_file(self.folder.join(file)).unwrap();
        tokio::time::sleep(LONGER_THAN_POLL).await;
    }

    fn serving(&self) -> Vec<String> {
        self.enroller.serving().iter().map(ToString::to_string).collect()
    }

    fn state(&self, uid: &str) -> Option<PodState> {
        let mut status = self.registry.status().into_iter();
        status.find(|pod| pod.uid.as_str() == uid).map(|pod| pod.state)
    }
}

fn pod(name: &str, more: &str) -> String {
    format!(
        "uid: {name}\nnetns: /run/netns/{name}\nips: [10.0.0.1]\n\
         workload: {{name: {name}, namespace: shop, serviceAccount: {name}}}\n{more}"
    )
}

#[tokio::test(start_paused = true)]
async fn pod_file_enrols_its_pod_and_removing_the_file_removes_the_pod() {
    let fixture = Fixture::new("enrols");
    ["a", "b"].iter().for_each(|name| fixture.namespace(name));
    fixture.write("a.yaml", &pod("a", "")).await;
    fixture.write("b.yaml", &pod("b", "")).await;
    assert!(fixture.health.is_ready());
    assert_eq!(fixture.serving(), ["a", "b"]);
    fixture.remove("a.yaml").await;
    assert_eq!(fixture.serving(), ["b"]);
    assert!(fixture.state("a").is_none());
    assert_eq!(fixture.enroller.left().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn invalid_pod_file_changes_no_pod() {
    let fixture = Fixture::new("wrong");
    ["a", "b"].iter().for_each(|name| fixture.namespace(name));
    fixture.write("a.yaml", &pod("a", "")).await;
    fixture.write("b.yaml", "uid: [").await;
    fixture.write("c.yaml", &pod("c", "interceptoin: {}")).await;
    assert_eq!(fixture.serving(), ["a"]);
    fixture.write("a.yaml", "nonsense").await;
    assert_eq!(fixture.serving(), ["a"]);
    fixture.write("b.yaml", &pod("b", "")).await;
    assert_eq!(fixture.serving(), ["a", "b"]);
    assert!(fixture.health.is_ready() && fixture.enroller.left().is_empty());
}

#[tokio::test(start_paused = true)]
async fn changed_pod_file_updates_or_replaces_its_pod() {
    let fixture = Fixture::new("changed");
    ["a", "b"].iter().for_each(|name| fixture.namespace(name));
    fixture.write("a.yaml", &pod("a", "")).await;
    // The fake enroller applies labels to a running pod.
    fixture.write("a.yaml", &pod("a", "labels: {app: a}")).await;
    assert_eq!((fixture.serving(), fixture.enroller.left().len()), (vec!["a".to_owned()], 0));
    fixture.write("a.yaml", &pod("a", "annotations: {x: y}")).await;
    assert_eq!((fixture.serving(), fixture.enroller.left().len()), (vec!["a".to_owned()], 1));
    // The same file describes another pod.
    fixture.write("a.yaml", &pod("b", "")).await;
    assert_eq!(fixture.serving(), ["b"]);
    let departures = [LeaveReason::EnrolledAgain, LeaveReason::Removed];
    assert_eq!(fixture.enroller.departures(), departures, "only the first pod's rules stay");
}

#[tokio::test(start_paused = true)]
async fn duplicate_uid_is_refused_until_the_first_file_is_removed() {
    let fixture = Fixture::new("repeated");
    fixture.namespace("a");
    fixture.write("b.yaml", &pod("a", "labels: {from: b}")).await;
    fixture.write("a.yaml", &pod("a", "labels: {from: a}")).await;
    assert_eq!(fixture.enroller.attempts(&"a".parse().unwrap()), 1);
    fixture.remove("b.yaml").await;
    assert_eq!(fixture.serving(), ["a"]);
    assert_eq!(fixture.enroller.attempts(&"a".parse().unwrap()), 2);
}

#[tokio::test(start_paused = true)]
async fn pod_is_served_once_its_namespace_exists_and_removed_with_it() {
    let fixture = Fixture::new("namespace");
    fixture.write("a.yaml", &pod("a", "")).await;
    let failed = |state| matches!(state, Some(PodState::Failed(EnrolError::Namespace(_))));
    assert!(failed(fixture.state("a")));
    fixture.namespace("a");
    tokio::time::sleep(LONGER_THAN_POLL).await;
    assert_eq!(fixture.serving(), ["a"]);
    fixture.delete_namespace("a");
    tokio::time::sleep(LONGER_THAN_POLL).await;
    assert!(fixture.serving().is_empty() && failed(fixture.state("a")));
    fixture.namespace("a");
    tokio::time::sleep(LONGER_THAN_POLL).await;
    // Another namespace with the same name.
    fixture.namespace("a");
    tokio::time::sleep(LONGER_THAN_POLL).await;
    assert_eq!((fixture.serving(), fixture.enroller.left().len()), (vec!["a".to_owned()], 2));
}

#[tokio::test(start_paused = true)]
async fn second_pod_of_a_namespace_is_refused_until_the_first_is_removed() {
    let fixture = Fixture::new("shared");
    fixture.namespace("a");
    fixture.write("a.yaml", &pod("a", "")).await;
    fixture.write("b.yaml", &pod("b", "").replace("netns/b", "netns/a")).await;
    let refused = |state| matches!(state, Some(PodState::Failed(EnrolError::NamespaceInUse(_))));
    assert!(refused(fixture.state("b")));
    assert_eq!(fixture.serving(), ["a"]);
    fixture.remove("a.yaml").await;
    assert_eq!(fixture.serving(), ["b"]);
}

#[tokio::test(start_paused = true)]
async fn pods_stay_enrolled_while_the_folder_is_missing() {
    let fixture = Fixture::new("away");
    fixture.namespace("a");
    fixture.write("a.yaml", &pod("a", "")).await;
    let away = fixture.folder.with_extension("away");
    fs::rename(&fixture.folder, &away).unwrap();
    tokio::time::sleep(LONGER_THAN_POLL).await;
    assert!(!fixture.health.is_ready());
    assert_eq!(fixture.serving(), ["a"]);
    fs::rename(&away, &fixture.folder).unwrap();
    tokio::time::sleep(LONGER_THAN_POLL).await;
    assert!(fixture.health.is_ready());
    assert_eq!((fixture.serving(), fixture.enroller.left().len()), (vec!["a".to_owned()], 0));
}

#[tokio::test(start_paused = true)]
async fn new_process_continues_with_the_files() {
    for with_state in [true, false] {
        let mut fixture = Fixture::new(&format!("continues-{with_state}"));
        ["a", "b", "c"].iter().for_each(|name| fixture.namespace(name));
        for name in ["a", "b", "c"] {
            fixture.write(&format!("{name}.yaml"), &pod(name, "")).await;
        }
        // A file with a mistake stands for its pod. A removed file does not.
        fixture.write("b.yaml", "uid: [").await;
        let (state, paused) = fixture.handle.pause().await.unwrap();
        fixture.remove("c.yaml").await;
        fixture.write("a.yaml", &pod("a", "labels: {app: a}")).await;
        assert_eq!(fixture.serving(), ["a", "b", "c"], "the source is paused");
        fixture.running.abort();
        drop(paused);
        fixture.start(with_state.then_some(state));
        tokio::time::sleep(LONGER_THAN_POLL).await;
        let expected: &[&str] = if with_state { &["a", "b"] } else { &["a"] };
        assert_eq!(fixture.serving(), expected);
        assert_eq!(
            fixture.enroller.attempts(&"a".parse().unwrap()),
            1,
            "the pod is not enrolled again"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn served_pods_publish_their_addresses() {
    let fixture = Fixture::new("addresses");
    let mut addresses = fixture.registry.served_addresses();
    assert!(addresses.borrow_and_update().is_empty());
    fixture.namespace("a");
    fixture.write("a.yaml", &pod("a", "")).await;
    let published: Vec<_> = addresses.borrow_and_update().iter().map(ToString::to_string).collect();
    assert_eq!(published, ["10.0.0.1"]);
    fixture.remove("a.yaml").await;
    assert!(addresses.borrow_and_update().is_empty());
}
