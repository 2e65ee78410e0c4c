//! Tests of lookups on demand, with a control plane whose answers the tests send.

use underpass_config::{
    ControlPlane, DeltaRequest, DeltaResponse, LocalWorkloads, Mesh, Node, ResourceType,
};

use super::schedule::{CHECK, Schedule};
use super::*;
use crate::node::testing::{settings, workload_resource};

const WITHIN: Duration = Duration::from_secs(10);
const HOUR: Duration = Duration::from_hours(1);

/// A control plane's client with lookups on demand, and the mesh that connections see.
struct Scene {
    plane: ControlPlane,
    schedule: Schedule,
    lookups: Lookups,
    mesh: watch::Sender<Arc<Snapshot>>,
}

impl Scene {
    fn new() -> Self {
        let mut plane = ControlPlane::new(Node::default(), LocalWorkloads::default(), true);
        let mesh = watch::Sender::new(snapshot(plane.snapshot()));
        Self { plane, schedule: Schedule::default(), lookups: Lookups::on_demand(), mesh }
    }

    /// The lease of a connection to this address.
    fn connect(&self, host: u8) -> impl Future<Output = Result<LookupLease, LookupError>> + use<> {
        let (mesh, lookups) = (self.mesh.subscribe(), self.lookups.clone());
        async move {
            let current = mesh.borrow().clone();
            let needed =
                |snapshot: &Snapshot| snapshot.mesh.lookups_to_address("", [10, 0, 0, host].into());
            let wait = Wait { since: Instant::now(), within: WITHIN };
            lookups.resolve(current, &mesh, needed, wait).await.map(|(_, lease)| lease)
        }
    }

    /// Sends the lookups that connections wait for. Returns the names of the subscription.
    async fn ask(&mut self) -> Vec<String> {
        let asked = self.lookups.asked().await;
        subscribed(&self.schedule.ask(&mut self.plane, asked))
    }

    /// Answers with these workloads, and these absent names.
    fn answer(&mut self, workloads: &[u8], absent: &[&str]) {
        let response = DeltaResponse {
            type_url: ResourceType::Address.url().to_owned(),
            resources: workloads.iter().map(|host| workload_resource(*host).into()).collect(),
            removed_resources: absent.iter().map(|name| (*name).to_owned()).collect(),
            ..DeltaResponse::default()
        };
        assert_eq!(self.plane.receive(response).unwrap().rejected, []);
        self.mesh.send_replace(snapshot(self.plane.snapshot()));
    }

    /// Performs the checks of this time. Returns the names of subscriptions that they begin, and
    /// of those that they end.
    async fn checks(&mut self, time: Duration) -> [Vec<String>; 2] {
        let end = Instant::now() + time;
        let mut all = Vec::new();
        while Instant::now() < end {
            tokio::time::sleep(CHECK).await;
            all.extend(self.schedule.check(&mut self.plane, &self.lookups).unwrap().0);
        }
        let ended = all.iter().flat_map(|one| one.resource_names_unsubscribe.clone()).collect();
        [subscribed(&all), ended]
    }
}

fn snapshot(mesh: Mesh) -> Arc<Snapshot> {
    Arc::new(Snapshot::new(Arc::new(mesh), &settings(&[]).workload, 1))
}

/// The names of the requests that only subscribe.
fn subscribed(requests: &[DeltaRequest]) -> Vec<String> {
    let only = requests.iter().filter(|request| request.resource_names_unsubscribe.is_empty());
    only.flat_map(|request| request.resource_names_subscribe.clone()).collect()
}

#[tokio::test(start_paused = true)]
async fn connections_wait_for_one_lookup_of_their_address() {
    let mut scene = Scene::new();
    let (one, other) = (tokio::spawn(scene.connect(1)), tokio::spawn(scene.connect(1)));
    assert_eq!(scene.ask().await, ["/10.0.0.1"]);
    tokio::time::sleep(WITHIN / 2).await;
    assert!(!one.is_finished() && !other.is_finished());
    scene.answer(&[1], &[]);
    one.await.unwrap().unwrap();
    other.await.unwrap().unwrap();
    // Known and absent addresses need no wait.
    scene.connect(1).await.unwrap();
    let absent = tokio::spawn(scene.connect(2));
    scene.ask().await;
    scene.answer(&[], &["/10.0.0.2"]);
    absent.await.unwrap().unwrap();
    scene.connect(2).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn connection_fails_without_answer() {
    let scene = Scene::new();
    let start = Instant::now();
    let error = scene.connect(1).await.unwrap_err();
    assert_eq!(start.elapsed(), WITHIN);
    let text = "the control plane has not answered the lookup of /10.0.0.1 within 10 s";
    assert_eq!(error.to_string(), text);
}

#[tokio::test(start_paused = true)]
async fn stream_without_answer_is_given_up() {
    let mut scene = Scene::new();
    let _waiting = tokio::spawn(scene.connect(1));
    scene.ask().await;
    scene.checks(WITHIN - CHECK).await;
    tokio::time::sleep(CHECK).await;
    let error = scene.schedule.check(&mut scene.plane, &scene.lookups).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the control plane has not answered the lookup of /10.0.0.1 within 10s"
    );
    let first = &scene.schedule.open(&mut scene.plane, &scene.lookups).0[0];
    assert_eq!(first.resource_names_subscribe, ["*", "/10.0.0.1"]);
    scene.checks(WITHIN - CHECK).await;
}

#[tokio::test(start_paused = true)]
async fn absent_address_is_looked_up_again_after_seconds() {
    let mut scene = Scene::new();
    let first = tokio::spawn(scene.connect(1));
    scene.ask().await;
    scene.answer(&[], &["/10.0.0.1"]);
    let _open = first.await.unwrap().unwrap();
    assert_eq!(scene.checks(Duration::from_secs(10)).await[1], ["/10.0.0.1"]);
    scene.mesh.send_replace(snapshot(scene.plane.snapshot()));
    let again = tokio::spawn(scene.connect(1));
    assert_eq!(scene.ask().await, ["/10.0.0.1"]);
    scene.answer(&[1], &[]);
    again.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn absent_address_counts_as_unasked_after_seconds() {
    let mut scene = Scene::new();
    let count = |scene: &Scene| {
        let current = scene.mesh.borrow().clone();
        let needed = current.mesh.lookups_to_address("", [10, 0, 0, 1].into());
        scene.lookups.count_unasked(&current, &needed)
    };
    assert_eq!(count(&scene), 1);
    let waiting = tokio::spawn(scene.connect(1));
    scene.ask().await;
    assert_eq!(count(&scene), 0, "a connection waits for it");
    scene.answer(&[], &["/10.0.0.1"]);
    drop(waiting.await.unwrap().unwrap());
    assert_eq!(count(&scene), 0, "it is known as absent");
    scene.checks(Duration::from_secs(10)).await;
    scene.mesh.send_replace(snapshot(scene.plane.snapshot()));
    assert_eq!(count(&scene), 1);
}

#[tokio::test(start_paused = true)]
async fn lookup_is_refreshed_while_in_use_and_let_go_afterwards() {
    let mut scene = Scene::new();
    let first = tokio::spawn(scene.connect(1));
    scene.ask().await;
    scene.answer(&[1], &[]);
    let open = first.await.unwrap().unwrap();
    let [refreshed, ended] = scene.checks(HOUR).await;
    assert_eq!((refreshed.len(), &ended), (120, &refreshed), "a refresh every 30 s");
    drop(open);
    let [refreshed, ended] = scene.checks(Duration::from_mins(6)).await;
    assert_eq!((refreshed.len(), ended.len()), (9, 11));
    assert_eq!(ended[9..], ["/10.0.0.1", "uid-1"]);
    assert_eq!(scene.plane.snapshot().size().workloads, 0);
    assert!(scene.lookups.all().is_empty());
}

/// The lookups of a scan of the addresses of these networks.
fn scan(networks: std::ops::Range<usize>) -> Vec<Lookup> {
    networks.map(|n| Lookup::address(&n.to_string(), [10, 0, 0, 1].into())).collect()
}

/// Leases of a pod to these lookups.
fn lease(pod: &Lookups, scene: &Scene, lookups: &[Lookup]) -> Result<LookupLease, LookupError> {
    let shared = pod.shared.as_ref().expect("lookups on demand");
    shared.lease(&pod.share, &scene.mesh.borrow().clone(), lookups)
}

#[tokio::test(start_paused = true)]
async fn scan_of_addresses_is_bounded() {
    let scene = Scene::new();
    let lookups = scan(0..MAX_LOOKUPS);
    let leases: Vec<_> = lookups
        .chunks(MAX_LOOKUPS_OF_POD)
        .map(|part| lease(&scene.lookups.of_pod(), &scene, part).unwrap())
        .collect();
    assert_eq!(scene.connect(1).await.unwrap_err(), LookupError::TooMany);
    // Lookups that no connection uses any longer make room.
    drop(leases);
    let used = lease(&scene.lookups, &scene, &lookups[..1]).unwrap();
    assert!(matches!(scene.connect(1).await.unwrap_err(), LookupError::Unanswered { .. }));
    assert_eq!(scene.lookups.all().len(), 2);
    let gone = scene.lookups.take_unused(1000);
    assert_eq!(gone.len(), MAX_LOOKUPS - 1);
    assert!(!gone.contains(&lookups[0]));
    assert_eq!(lock(&scene.lookups.shared.as_ref().unwrap().asked).len(), 2);
    drop(used);
}

/// A control plane that fails before the first check, while a client scans addresses.
#[test]
fn lookups_of_outage_are_bounded() {
    let mut scene = Scene::new();
    for n in 0..10 {
        let at = |one: usize| Lookup::address(&format!("{n}-{one}"), [10, 0, 0, 1].into());
        let scan: Vec<_> = (0..MAX_LOOKUPS_OF_POD).map(at).collect();
        drop(lease(&scene.lookups, &scene, &scan[..1]).unwrap());
        drop(lease(&scene.lookups, &scene, &scan).unwrap());
        let (requests, is_changed) = scene.schedule.open(&mut scene.plane, &scene.lookups);
        assert_eq!(is_changed, n > 0, "{n}");
        let names = subscribed(&requests[1..]).len() + requests[0].resource_names_subscribe.len();
        assert_eq!(names, MAX_LOOKUPS_OF_POD + 1, "{n}");
    }
}

#[tokio::test(start_paused = true)]
async fn scan_of_one_pod_takes_no_room_of_others() {
    let scene = Scene::new();
    let [one, other] = [scene.lookups.of_pod(), scene.lookups.of_pod()];
    let lookups = scan(0..MAX_LOOKUPS_OF_POD + 2);
    let (first, rest) = lookups.split_at(1);
    drop(lease(&other, &scene, first).unwrap());
    let leases = lease(&one, &scene, &rest[1..]).unwrap();
    assert_eq!(lease(&one, &scene, &rest[..1]).unwrap_err(), LookupError::TooManyOfPod);
    assert!(scene.lookups.all().contains(&first[0]), "an unused lookup of the other pod");
    // Lookups that exist take no room.
    lease(&one, &scene, first).unwrap();
    lease(&other, &scene, &rest[..1]).unwrap();
    // The pod's own unused lookups make room.
    drop(leases);
    lease(&one, &scene, &scan(MAX_LOOKUPS..MAX_LOOKUPS + 1)).unwrap();
    assert_eq!(scene.lookups.all().len(), 3);
}

#[tokio::test(start_paused = true)]
async fn known_lookups_are_evicted_last() {
    let mut scene = Scene::new();
    let known = tokio::spawn(scene.connect(1));
    scene.ask().await;
    scene.answer(&[1], &[]);
    drop(known.await.unwrap().unwrap());
    let absent = tokio::spawn(scene.connect(2));
    scene.ask().await;
    scene.answer(&[], &["/10.0.0.2"]);
    drop(absent.await.unwrap().unwrap());
    drop(lease(&scene.lookups, &scene, &scan(2..MAX_LOOKUPS_OF_POD)).unwrap());
    let new = scan(MAX_LOOKUPS..MAX_LOOKUPS + 1);
    let _used = lease(&scene.lookups, &scene, &new).unwrap();
    let left = scene.lookups.all();
    assert_eq!(left.len(), 2);
    assert!(left.iter().any(|lookup| lookup.as_str() == "/10.0.0.1"), "{left:?}");
}

/// Another connection has read a snapshot in which the lookup is answered, before it was let go.
#[tokio::test(start_paused = true)]
async fn lookup_let_go_between_snapshot_and_lease_is_asked_again() {
    let mut scene = Scene::new();
    let first = tokio::spawn(scene.connect(1));
    scene.ask().await;
    scene.answer(&[1], &[]);
    drop(first.await.unwrap().unwrap());
    // The mesh that connections see is not replaced.
    scene.checks(Duration::from_mins(6)).await;
    assert!(scene.lookups.all().is_empty());
    let _late = scene.connect(1).await.unwrap();
    assert_eq!(scene.ask().await, ["/10.0.0.1"]);
}
