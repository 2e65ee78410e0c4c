//! A hostile proxy process, and one that does not answer, against the broker.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use tokio::io::AsyncReadExt as _;
use tokio::net::UnixStream;
use tokio::sync::watch;
use underpass_config::{FileWatcher, PodDns, PodUid, Settings, Sources};
use underpass_hbone::CertificateAuthority;
use underpass_interception::{NamespaceAccess, SeqPacket};

use crate::broker::identities::IdentityFeeds;
use crate::broker::link;
use crate::broker::message::{
    Answer, Command, MAX_MESSAGE, MAX_SOCKETS, Message as _, Outcome, PodKey, Refusal, Request,
    SocketsOf, ToBroker, ToProxy, WireKind, WireRole, check_bytes,
};
use crate::broker::remote::RemoteDataPlane;
use crate::broker::requests::RequestServer;
use crate::node::data_plane::{DataPlane as _, PodToServe, ServedPod};
use crate::node::pod_error::PodError;
use crate::node::testing::settings;
use crate::pods::facts::PodFacts;
use crate::pods::registry::PodRegistry;
use crate::pods::testing::FakeEnroller;
use crate::process::pause_gate::Pausable as _;
use crate::process::supervise::Supervisor;
use crate::traffic::listeners::Listeners;

const KIND: WireKind = WireKind { v6: false, role: WireRole::Upstream };

/// A broker, and the other end of its connection.
struct Scene {
    data_plane: RemoteDataPlane,
    registry: PodRegistry,
    proxy: SeqPacket,
}

impl Scene {
    fn new(settings: &Settings) -> Self {
        let (ours, theirs) = SeqPacket::pair().unwrap();
        let (sender, receiver, writer) = link::open(ours).unwrap();
        tokio::spawn(writer.run());
        let (supervisor, _) = Supervisor::new();
        let watcher = FileWatcher::default();
        let identities = IdentityFeeds::new(settings, &sender, &watcher, &supervisor);
        let data_plane = RemoteDataPlane::new(sender, identities);
        let registry = FakeEnroller::default().registry();
        let access = NamespaceAccess::current().unwrap();
        let pods = Arc::new(registry.clone());
        let server = RequestServer::new(data_plane.clone(), pods, settings, access);
        tokio::spawn(server.run(receiver));
        let theirs = StdUnixStream::from(theirs);
        theirs.set_nonblocking(true).unwrap();
        let proxy = SeqPacket::new(theirs.into()).unwrap().with_limit(MAX_MESSAGE);
        Self { data_plane, registry, proxy }
    }

    async fn send(&self, message: &ToBroker) {
        self.proxy.send(&message.encode().unwrap(), &[]).await.unwrap();
    }

    async fn next(&self) -> (ToProxy, Vec<OwnedFd>) {
        let message = self.proxy.receive().await.unwrap().unwrap();
        (ToProxy::decode(&message.bytes).unwrap(), message.descriptors)
    }

    /// Sends a request, and returns the answer with the number of its sockets.
    async fn request(&self, request: Request) -> (Result<Answer, Refusal>, usize) {
        self.send(&ToBroker::Request { number: 7, request }).await;
        match self.next().await {
            (ToProxy::Answer { number: 7, answer }, sockets) => (answer, sockets.len()),
            other => panic!("{other:?}"),
        }
    }

    async fn refusal(&self, request: Request) -> Refusal {
        self.request(request).await.0.unwrap_err()
    }

    /// Receives a command, and reports its outcome.
    async fn perform(&self, outcome: Result<Outcome, String>) -> Command {
        let (message, _) = self.next().await;
        let ToProxy::Command { number, command } = message else { panic!("{message:?}") };
        self.send(&ToBroker::Done { number, outcome }).await;
        command
    }

    /// Serves a pod, which the proxy process accepts.
    async fn serve(&self) -> (Box<dyn ServedPod>, PodKey) {
        let serving = self.data_plane.serve(pod());
        let accept = async {
            let (message, descriptors) = self.next().await;
            let ToProxy::Command { number, command: Command::Serve(start) } = message else {
                panic!("{message:?}");
            };
            let of_dns = ["dns-udp-v4", "dns-udp-v6", "dns-tcp-v4", "dns-tcp-v6"];
            let all: Vec<_> = ["outbound", "hbone", "inbound"].into_iter().chain(of_dns).collect();
            assert_eq!(start.listeners, all);
            assert_eq!(descriptors.len(), 8, "the listeners and a lookup of addresses");
            self.send(&ToBroker::Done { number, outcome: Ok(Outcome::Done) }).await;
            start.pod
        };
        let (served, key) = tokio::join!(serving, accept);
        (served.unwrap(), key)
    }
}

/// A pod of the workload `server`, whose sockets need no privilege.
fn pod() -> PodToServe {
    let settings = Arc::new(settings(&["interception.profile=none"]));
    let interception = watch::Sender::new(settings.interception.clone()).subscribe();
    let access = NamespaceAccess::current().unwrap();
    let (listeners, dns, certificate_within) = (Listeners::testing(), Listeners::testing(), None);
    PodToServe { uid: None, settings, interception, access, listeners, dns, certificate_within }
}

/// The settings of a node.
fn node(assignments: &[&str]) -> Settings {
    let flags = ["node.pods.directory=/pods"].iter().chain(assignments);
    let flags = flags.map(|&flag| flag.to_owned()).collect();
    Sources { file: None, environment: Vec::new(), flags }.load().unwrap()
}

struct LocalCa(PathBuf);

impl LocalCa {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("broker-{name}-{}", std::process::id()));
        CertificateAuthority::init(&dir, "cluster.local".parse().unwrap()).unwrap();
        Self(dir)
    }

    fn node(&self) -> Settings {
        node(&[&format!("identity.local_ca={}", self.0.display())])
    }
}

impl Drop for LocalCa {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

fn facts(uid: PodUid) -> PodFacts {
    PodFacts {
        uid,
        name: "n".repeat(250),
        namespace: "shop".to_owned(),
        service_account: "web".to_owned(),
        ips: Vec::new(),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        namespace_mode: None,
        probe_ports: None,
        interception: None,
        dns: PodDns::default(),
    }
}

fn of_node(role: WireRole) -> Request {
    Request::Sockets { of: SocketsOf::Node, kind: WireKind { role, ..KIND }, count: 1 }
}

fn sockets(pod: &PodKey, count: usize) -> Request {
    Request::Sockets { of: SocketsOf::Pod(pod.clone()), kind: KIND, count }
}

#[tokio::test]
async fn served_pod_gets_its_sockets() {
    let scene = Scene::new(&node(&[]));
    let (_served, key) = scene.serve().await;
    for count in [1, MAX_SOCKETS] {
        assert_eq!(scene.request(sockets(&key, count)).await, (Ok(Answer::Sockets), count));
    }
}

#[tokio::test]
async fn identity_of_served_pods_is_sent_once_and_dropped_with_the_last_pod() {
    let ca = LocalCa::new("served");
    let scene = Scene::new(&ca.node());
    let (one, _) = scene.serve().await;
    let ToProxy::Certificate(certificate) = scene.next().await.0 else { panic!("no certificate") };
    let (workload, identity) = certificate.identity().unwrap();
    let own = settings(&["interception.profile=none"]).workload.spiffe_id;
    assert_eq!((identity.spiffe_id(), &workload), (&own, &own));
    let (other, _) = scene.serve().await;
    drop(one);
    let (message, _) = scene.next().await;
    assert!(matches!(message, ToProxy::Command { command: Command::Close { .. }, .. }));
    drop(other);
    assert_eq!(scene.next().await.0, ToProxy::DropCertificate { identity: own.to_string() });
}

#[tokio::test]
async fn refuses_requests_beyond_the_served_pods() {
    let scene = Scene::new(&node(&[]));
    let (served, key) = scene.serve().await;
    let of_other = |key: PodKey| PodKey { uid: "another-pod".to_owned(), ..key };
    let later = |key: PodKey| PodKey { enrolment: key.enrolment + 1, ..key };
    for unknown in [of_other(key.clone()), later(key.clone())] {
        assert_eq!(scene.refusal(sockets(&unknown, 1)).await, Refusal::UnknownPod);
    }
    for count in [0, MAX_SOCKETS + 1, usize::MAX] {
        assert_eq!(scene.refusal(sockets(&key, count)).await, Refusal::SocketCount(count));
    }
    for role in [WireRole::Upstream, WireRole::NameServer, WireRole::Workload] {
        assert_eq!(scene.refusal(of_node(role)).await, Refusal::SocketsOfNode);
    }
    drop(served);
    let (message, _) = scene.next().await;
    assert!(matches!(message, ToProxy::Command { command: Command::Close { .. }, .. }));
    assert_eq!(scene.refusal(sockets(&key, 1)).await, Refusal::UnknownPod, "it is closed");
}

#[tokio::test]
async fn fixed_pod_gets_sockets_of_its_namespace_but_none_for_its_workload_without_the_pod() {
    let scene = Scene::new(&settings(&[]));
    for role in [WireRole::Upstream, WireRole::NameServer] {
        assert_eq!(scene.request(of_node(role)).await, (Ok(Answer::Sockets), 1));
    }
    assert_eq!(scene.refusal(of_node(WireRole::Workload)).await, Refusal::SocketsOfNode);
}

#[tokio::test]
async fn readiness_is_the_quoted_answer_of_the_proxy_process() {
    let scene = Scene::new(&settings(&[]));
    let answer = async {
        let ToProxy::Readiness { number } = scene.next().await.0 else { panic!("no question") };
        let outcome = Ok(Outcome::Readiness("ready \u{1b}[2J\n".to_owned()));
        scene.send(&ToBroker::Done { number, outcome }).await;
    };
    let (readiness, ()) = tokio::join!(scene.data_plane.readiness(), answer);
    assert!(readiness.starts_with("ready") && !readiness.contains('\u{1b}'), "{readiness:?}");
}

#[tokio::test]
async fn node_with_control_plane_gets_its_own_sockets_but_none_for_workloads() {
    let xds = ["address=https://istiod:15012", "roots=/roots.pem"];
    let xds = xds.map(|one| format!("mesh.xds.{one}"));
    let scene = Scene::new(&node(&[&xds[0], &xds[1]]));
    for role in [WireRole::Upstream, WireRole::NameServer] {
        assert_eq!(scene.request(of_node(role)).await, (Ok(Answer::Sockets), 1));
    }
    assert_eq!(scene.refusal(of_node(WireRole::Workload)).await, Refusal::SocketsOfNode);
}

#[tokio::test]
async fn node_with_mesh_in_file_gets_sockets_only_for_lookups_of_hostnames() {
    let scene = Scene::new(&node(&["mesh.file=/mesh.yaml"]));
    assert_eq!(scene.request(of_node(WireRole::NameServer)).await, (Ok(Answer::Sockets), 1));
    for role in [WireRole::Upstream, WireRole::Workload] {
        assert_eq!(scene.refusal(of_node(role)).await, Refusal::SocketsOfNode);
    }
}

#[tokio::test]
async fn survives_messages_that_are_malformed_or_forbidden() {
    let scene = Scene::new(&node(&[]));
    let (_served, key) = scene.serve().await;
    let pod = serde_json::to_string(&key).unwrap();
    let forbidden = [
        "garbage".to_owned(),
        "{}".to_owned(),
        // A proxy process must never be able to request this.
        format!(r#"{{"Request":{{"number":1,"request":{{"RemoveRules":{{"pod":{pod}}}}}}}}}"#),
        format!(
            r#"{{"Request":{{"number":1,"request":{{"Sockets":{{"of":{{"Pod":{pod}}},"kind":{{"v6":false,"role":"Workload","mark":0}},"count":1}}}}}}}}"#
        ),
        r#"{"Request":{"number":1,"request":{"Sockets":{"of":{"Path":"/proc/1/ns/net"},"kind":{"v6":false,"role":"Upstream"},"count":1}}}}"#
            .to_owned(),
        r#"{"Done":{"number":999,"outcome":{"Ok":"Done"}}}"#.to_owned(),
        "x".repeat(MAX_MESSAGE + 1),
    ];
    for message in forbidden {
        scene.proxy.send(message.as_bytes(), &[]).await.unwrap();
    }
    let file = std::fs::File::open("/proc/self/stat").unwrap();
    let ready = ToBroker::Ready.encode().unwrap();
    scene.proxy.send(&ready, &[file.as_fd()]).await.unwrap();
    // None of them has an answer, and the next request has one.
    assert_eq!(scene.request(sockets(&key, 2)).await, (Ok(Answer::Sockets), 2));
}

#[tokio::test(start_paused = true)]
async fn silent_proxy_process_fails_the_attempt_to_serve_a_pod() {
    let scene = Scene::new(&node(&[]));
    let began = tokio::time::Instant::now();
    let error = scene.data_plane.serve(pod()).await.unwrap_err();
    assert!(matches!(error, PodError::ProxyProcess(_)), "{error}");
    assert_eq!(began.elapsed(), Duration::from_secs(10));
}

#[tokio::test]
async fn address_of_other_workload_is_found_in_the_mesh_of_the_proxy_process() {
    let scene = Scene::new(&node(&[]));
    let (pod, address) = (settings(&[]).workload, "192.0.2.7".parse().unwrap());
    let finding = scene.data_plane.other_workload(&pod, vec![address]);
    let answer = async {
        let ToProxy::Command { number, command } = scene.next().await.0 else {
            panic!("no command")
        };
        let (namespace, name) = (pod.namespace.clone(), pod.name.clone());
        let expected = Command::FindOtherWorkload { namespace, name, addresses: vec![address] };
        assert_eq!(command, expected);
        let other = Outcome::OtherWorkload(Some((address, "shop/\u{1b}web".to_owned())));
        scene.send(&ToBroker::Done { number, outcome: Ok(other) }).await;
    };
    let (found, ()) = tokio::join!(finding, answer);
    let (found, other) = found.unwrap().unwrap();
    assert!(found == address && !other.contains('\u{1b}'), "{other:?} is not quoted");
}

#[tokio::test]
async fn arrivals_reach_self_test_until_its_end() {
    let scene = Scene::new(&node(&[]));
    let (served, key) = scene.serve().await;
    let (arrivals, destination) = (served.arrivals(), SocketAddr::from(([192, 0, 2, 2], 1404)));
    let expecting = arrivals.expect(destination);
    let confirm = async {
        let (message, _) = scene.next().await;
        let ToProxy::Command { number, command } = message else { panic!("{message:?}") };
        assert_eq!(command, Command::Expect { pod: key.clone(), destination });
        scene.send(&ToBroker::Done { number, outcome: Ok(Outcome::Done) }).await;
        scene.send(&ToBroker::Arrived { pod: key.clone() }).await;
    };
    let (mut arrived, ()) = tokio::join!(expecting, confirm);
    assert_eq!(arrived.recv().await, Some(()));
    arrivals.end();
    assert_eq!(scene.next().await.0, ToProxy::EndTest { pod: key.clone() });
    scene.send(&ToBroker::Arrived { pod: key }).await;
    assert_eq!(arrived.recv().await, None);
}

#[tokio::test]
async fn pauses_and_resumes_accepting_while_another_process_takes_over() {
    let scene = Scene::new(&node(&[]));
    let (served, pod) = scene.serve().await;
    let done = || scene.perform(Ok(Outcome::Done));
    // It is not paused: nothing is sent.
    served.resume_accepting();
    let ((), command) = tokio::join!(served.pause_accepting(), done());
    assert_eq!(command, Command::PauseAccepting { pod: pod.clone() });
    served.resume_accepting();
    assert_eq!(done().await, Command::ResumeAccepting { pod });
    let ((), command) = tokio::join!(scene.data_plane.pause(), done());
    assert_eq!(command, Command::PauseEndpoints);
    scene.data_plane.resume();
    assert_eq!(done().await, Command::ResumeEndpoints);
}

#[tokio::test]
async fn asks_the_proxy_process_for_the_state_of_a_certificate() {
    let scene = Scene::new(&node(&[]));
    let (served, pod) = scene.serve().await;
    let outcomes = [
        (Ok(Outcome::HasCertificate(true)), true),
        (Ok(Outcome::HasCertificate(false)), false),
        (Ok(Outcome::Done), false),
        (Err("no such pod is served".to_owned()), false),
    ];
    for (outcome, expected) in outcomes {
        let answered = scene.perform(outcome);
        let (has_certificate, command) = tokio::join!(served.has_certificate(), answered);
        assert_eq!(command, Command::HasCertificate { pod: pod.clone() });
        assert_eq!(has_certificate, expected);
    }
}

#[tokio::test(start_paused = true)]
async fn pod_without_certificate_in_time_is_not_served() {
    let scene = Scene::new(&node(&[]));
    let limit = Duration::from_secs(30);
    let serving = || {
        let pod = PodToServe { certificate_within: Some(limit), ..pod() };
        scene.data_plane.serve(pod)
    };
    let late = scene.perform(Ok(Outcome::CertificateLate));
    let (served, command) = tokio::join!(serving(), late);
    let Command::Serve(start) = command else { panic!("{command:?}") };
    assert_eq!(start.certificate_within, Some(limit));
    assert!(matches!(served, Err(PodError::CertificateLate(late)) if late == limit));
    let closed = scene.perform(Ok(Outcome::Done)).await;
    assert_eq!(closed, Command::Close { pod: start.pod });
    let began = tokio::time::Instant::now();
    serving().await.unwrap_err();
    assert_eq!(
        began.elapsed(),
        limit + Duration::from_secs(10),
        "the timeout of the command is added"
    );
}

#[tokio::test]
async fn check_fails_with_the_answer_of_a_worker_that_hangs() {
    let scene = Scene::new(&node(&[]));
    let answered = scene.perform(Ok(Outcome::Done));
    let (checked, command) = tokio::join!(scene.data_plane.check(), answered);
    checked.unwrap();
    assert_eq!(command, Command::Ping);
    let answered = scene.perform(Err("worker-1 does not answer within 8 s".to_owned()));
    let (checked, _) = tokio::join!(scene.data_plane.check(), answered);
    let error = checked.unwrap_err();
    assert!(error.to_string().contains("worker-1"), "{error}");
}

#[tokio::test]
async fn status_of_many_pods_arrives_in_parts() {
    let scene = Scene::new(&node(&[]));
    for number in 0..150 {
        let uid = format!("{number:0>250}").parse().unwrap();
        let namespace = underpass_interception::testing::fake_namespace().unwrap();
        drop(scene.registry.add(facts(uid), namespace));
    }
    let (mut uids, mut parts) = (Vec::new(), 0);
    loop {
        let (answer, _) = scene.request(Request::Pods { skip: uids.len() }).await;
        let Ok(Answer::Pods { pods, more }) = answer else { panic!("{answer:?}") };
        uids.extend(pods.into_iter().map(|pod| pod.uid));
        parts += 1;
        if !more {
            break;
        }
    }
    uids.sort();
    uids.dedup();
    assert!(uids.len() == 150 && parts > 1, "{} pods in {parts} parts", uids.len());
}

#[tokio::test]
async fn rules_of_a_pod_arrive_through_a_socket_of_their_own() {
    let scene = Scene::new(&settings(&[]));
    let namespace = underpass_interception::testing::fake_namespace().unwrap();
    let facts = facts("web".parse().unwrap());
    let name = facts.full_name();
    scene.registry.add(facts, namespace).first_outcome().await.unwrap();
    scene.send(&ToBroker::Request { number: 7, request: Request::Rules { pod: name } }).await;
    let (answer, mut attached) = scene.next().await;
    assert_eq!(answer, ToProxy::Answer { number: 7, answer: Ok(Answer::Rules) });
    let mut socket = UnixStream::from_std(attached.remove(0).into()).unwrap();
    let mut report = Vec::new();
    socket.read_to_end(&mut report).await.unwrap();
    assert!(report.len() > MAX_MESSAGE, "{}", report.len());
    serde_json::from_slice::<serde_json::Value>(&report).unwrap();
    let unknown = Request::Rules { pod: "shop/x".to_owned() };
    assert_eq!(scene.request(unknown).await, (Ok(Answer::NoSuchPod), 0));
}

proptest! {
    #[test]
    fn decoding_survives_arbitrary_bytes(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        check_bytes(&bytes);
    }

    #[test]
    fn decoding_survives_changed_messages(at in 0_usize..400, byte in any::<u8>(), which in 0_usize..6) {
        let pod = PodKey { uid: "6f1b-\u{e4}\"".to_owned(), enrolment: u64::MAX };
        let request = |request| ToBroker::Request { number: 1, request }.encode();
        let message = match which {
            0 => request(sockets(&pod, usize::MAX)),
            1 => request(Request::Pods { skip: usize::MAX }),
            2 => ToBroker::Done { number: 0, outcome: Err("\u{0}".to_owned()) }.encode(),
            3 => ToBroker::Done { number: 0, outcome: Ok(Outcome::HasCertificate(true)) }.encode(),
            4 => ToProxy::Command { number: 1, command: Command::PauseAccepting { pod } }.encode(),
            _ => ToProxy::Answer { number: 3, answer: Err(Refusal::SocketCount(9)) }.encode(),
        };
        let mut bytes = message.unwrap();
        check_bytes(&bytes);
        let at = at % bytes.len();
        bytes[at] = byte;
        check_bytes(&bytes);
    }
}
