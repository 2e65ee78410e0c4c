//! Tests with a scripted agent over real sockets, and a registry with an enroller in memory.

use std::fs::{self, File};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::PathBuf;

use prost::Message as _;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use underpass_config::PodUid;
use underpass_interception::testing::{SeqPacketListener, seqpacket_pair};

use super::*;
use crate::pods::enrolment::EnrolError;
use crate::pods::registry::PodRegistry;
use crate::pods::source::{self, SourceEnd, SourceHandle, SourceHealth};
use crate::pods::testing::{FakeEnroller, start};
use crate::pods::zds::connection::Connection;
use crate::pods::zds::messages::{Ack, AddWorkload, Payload, Response, WorkloadResponse, ZdsHello};
use crate::pods::zds::session::script::{self, encode};

/// Namespaces of any kind, as descriptors: opening them needs no privilege.
const NAMESPACES: [&str; 3] = ["/proc/self/ns/net", "/proc/self/ns/uts", "/proc/self/ns/ipc"];

fn namespace(number: usize) -> File {
    File::open(NAMESPACES[number]).expect("a namespace")
}

fn uid(text: &str) -> PodUid {
    text.parse().expect("a uid")
}

/// The agent's end of a connection.
struct Agent(SeqPacket);

impl Agent {
    /// Receives and checks the first message of the proxy.
    async fn greeted(socket: SeqPacket) -> Self {
        let hello = socket.receive().await.expect("received").expect("a message");
        assert_eq!(ZdsHello::decode(hello.bytes.as_slice()), Ok(ZdsHello { version: 1 }));
        Self(socket)
    }

    /// Sends a request without waiting for the response.
    async fn send(&self, request: &[u8], descriptors: &[BorrowedFd<'_>]) {
        self.0.send(request, descriptors).await.expect("sent");
    }

    /// The reason in the next response; empty after success.
    async fn response(&self) -> String {
        let message = self.0.receive().await.expect("received").expect("a response");
        assert!(message.descriptors.is_empty());
        let response = WorkloadResponse::decode(message.bytes.as_slice()).expect("a response");
        let Some(Response::Ack(Ack { error })) = response.payload else { panic!("{response:?}") };
        error
    }

    async fn request(&self, request: &[u8], descriptors: &[BorrowedFd<'_>]) -> String {
        self.send(request, descriptors).await;
        self.response().await
    }

    async fn add(&self, uid: &str, number: usize) -> String {
        self.request(&script::add(uid), &[namespace(number).as_fd()]).await
    }

    async fn keep(&self, uid: &str) -> String {
        self.request(&script::keep(uid), &[]).await
    }

    async fn del(&self, uid: &str) -> String {
        self.request(&script::del(uid), &[]).await
    }

    async fn snapshot_sent(&self) -> String {
        self.request(&script::snapshot_sent(), &[]).await
    }

    /// Checks that the open connection has no message in the next minute.
    async fn receives_nothing(&self) {
        timeout(Duration::from_secs(60), self.0.receive()).await.expect_err("a message");
    }
}

/// The proxy's end of one connection, without reconnects.
struct Proxy {
    enroller: FakeEnroller,
    registry: PodRegistry,
}

impl Proxy {
    fn new() -> Self {
        let enroller = FakeEnroller::default();
        let registry = enroller.registry();
        Self { enroller, registry }
    }

    /// Serves a connection until it ends.
    async fn connect(&self) -> (Agent, JoinHandle<ConnectionError>) {
        let (ours, theirs) = seqpacket_pair().expect("a pair");
        let connection = Connection::new(ours, self.registry.clone());
        let serving = tokio::spawn(async move {
            let (_handle, mut pauses) = source::pauses();
            connection.serve(|| {}, &mut pauses).await
        });
        (Agent::greeted(theirs).await, serving)
    }

    /// Waits until exactly these pods are served.
    async fn serves(&self, uids: &[&str]) {
        let expected: Vec<_> = uids.iter().copied().map(uid).collect();
        while self.enroller.serving() != expected {
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn each_request_has_one_response_and_changes_its_pod() {
    let proxy = Proxy::new();
    let (agent, _serving) = proxy.connect().await;
    agent.receives_nothing().await;
    assert_eq!(agent.add("a", 0).await, "");
    assert_eq!(agent.snapshot_sent().await, "");
    assert_eq!(agent.add("b", 1).await, "");
    proxy.serves(&["a", "b"]).await;
    assert_eq!(agent.del("a").await, "");
    proxy.serves(&["b"]).await;
    assert_eq!(agent.del("a").await, "", "removing a pod is idempotent");
    agent.receives_nothing().await;
}

#[tokio::test(start_paused = true)]
async fn requests_sent_without_waiting_are_answered_in_order() {
    let proxy = Proxy::new();
    let (agent, _serving) = proxy.connect().await;
    agent.send(&script::add("a"), &[namespace(0).as_fd()]).await;
    agent.send(&script::add("b"), &[]).await;
    agent.send(&script::snapshot_sent(), &[]).await;
    agent.send(&script::keep("a"), &[]).await;
    assert_eq!(agent.response().await, "");
    assert!(agent.response().await.contains("one descriptor"));
    assert_eq!(agent.response().await, "");
    assert!(agent.response().await.contains("after SnapshotSent"));
    agent.receives_nothing().await;
}

#[tokio::test(start_paused = true)]
async fn partial_snapshot_removes_no_pod() {
    let proxy = Proxy::new();
    let (agent, _serving) = proxy.connect().await;
    for (number, pod) in ["a", "b", "c"].into_iter().enumerate() {
        assert_eq!(agent.add(pod, number).await, "");
    }
    assert_eq!(agent.snapshot_sent().await, "");
    drop(agent);
    let (agent, serving) = proxy.connect().await;
    assert_eq!(agent.add("a", 0).await, "");
    drop(agent);
    assert!(matches!(serving.await, Ok(ConnectionError::Closed)));
    proxy.serves(&["a", "b", "c"]).await;
    let (agent, _serving) = proxy.connect().await;
    assert_eq!(agent.add("a", 0).await, "");
    assert_eq!(agent.keep("c").await, "");
    assert_eq!(agent.snapshot_sent().await, "");
    proxy.serves(&["a", "c"]).await;
    assert_eq!(
        proxy.enroller.attempts(&uid("a")),
        1,
        "a new connection does not enrol a pod again"
    );
}

#[tokio::test(start_paused = true)]
async fn wrong_descriptors_fail_their_request_only() {
    let proxy = Proxy::new();
    let (agent, _serving) = proxy.connect().await;
    let (one, two) = (namespace(0), namespace(1));
    let no_namespace = File::open("/proc/version").expect("a file");
    for descriptors in [&[][..], &[one.as_fd(), two.as_fd()]] {
        let reason = agent.request(&script::add("a"), descriptors).await;
        assert!(reason.contains("one descriptor"), "{reason}");
    }
    let reason = agent.request(&script::add("a"), &[no_namespace.as_fd()]).await;
    assert!(reason.contains("not a namespace"), "{reason}");
    let reason = agent.request(&script::keep("a"), &[one.as_fd()]).await;
    assert!(reason.contains("only AddWorkload"), "{reason}");
    let pod = AddWorkload { uid: "a".to_owned(), workload_info: None };
    let reason = agent.request(&encode(Payload::Add(pod)), &[one.as_fd()]).await;
    assert!(reason.contains("workload_info"), "{reason}");
    proxy.serves(&[]).await;
    assert_eq!(agent.add("a", 0).await, "");
    proxy.serves(&["a"]).await;
}

#[tokio::test(start_paused = true)]
async fn malformed_and_oversized_messages_end_connection_with_reason() {
    for message in [b"\xff\xff".to_vec(), vec![b'x'; 5000]] {
        let proxy = Proxy::new();
        let (agent, serving) = proxy.connect().await;
        assert_eq!(agent.add("a", 0).await, "");
        assert!(!agent.request(&message, &[namespace(1).as_fd()]).await.is_empty());
        assert!(agent.0.receive().await.expect("an end").is_none());
        assert!(matches!(serving.await, Ok(ConnectionError::Protocol(_))));
        proxy.serves(&["a"]).await;
    }
}

#[tokio::test(start_paused = true)]
async fn repeated_add_is_idempotent_and_new_namespace_replaces_pod() {
    let proxy = Proxy::new();
    let (agent, _serving) = proxy.connect().await;
    assert_eq!(agent.add("a", 0).await, "");
    assert_eq!(agent.add("a", 0).await, "");
    assert_eq!(proxy.enroller.attempts(&uid("a")), 1);
    assert_eq!(agent.add("a", 1).await, "");
    assert_eq!(proxy.enroller.attempts(&uid("a")), 2);
    while proxy.enroller.left() != [uid("a")] {
        tokio::task::yield_now().await;
    }
    proxy.serves(&["a"]).await;
    let reason = agent.add("b", 1).await;
    assert!(reason.contains("belongs to the pod a"), "{reason}");
    proxy.serves(&["a"]).await;
}

#[tokio::test(start_paused = true)]
async fn unknown_kept_pod_is_acknowledged_and_not_enrolled() {
    let proxy = Proxy::new();
    let (agent, _serving) = proxy.connect().await;
    assert_eq!(agent.keep("a").await, "");
    assert_eq!(agent.snapshot_sent().await, "");
    assert!(proxy.registry.status().is_empty());
    assert_eq!(agent.add("a", 0).await, "", "the agent has found its namespace");
    proxy.serves(&["a"]).await;
}

#[tokio::test(start_paused = true)]
async fn slow_enrolment_is_answered_in_time_and_continues() {
    let proxy = Proxy::new();
    let release = proxy.enroller.hold_next(&uid("a"));
    let (agent, _serving) = proxy.connect().await;
    let begun = Instant::now();
    let reason = agent.add("a", 0).await;
    assert!(reason.contains("continues to try"), "{reason}");
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    agent.receives_nothing().await;
    assert_eq!(agent.snapshot_sent().await, "");
    release.send(()).expect("the attempt waits");
    assert_eq!(agent.add("a", 0).await, "");
    assert_eq!(proxy.enroller.attempts(&uid("a")), 1);
    proxy.serves(&["a"]).await;
}

#[tokio::test(start_paused = true)]
async fn pod_removed_during_enrolment_is_not_served() {
    let proxy = Proxy::new();
    let release = proxy.enroller.hold_next(&uid("a"));
    let (agent, _serving) = proxy.connect().await;
    assert!(!agent.add("a", 0).await.is_empty());
    assert_eq!(agent.del("a").await, "");
    drop(release);
    assert_eq!(agent.snapshot_sent().await, "");
    agent.receives_nothing().await;
    proxy.serves(&[]).await;
    assert!(proxy.registry.status().is_empty());
}

#[tokio::test(start_paused = true)]
async fn failed_enrolment_has_reason_and_next_add_succeeds() {
    let proxy = Proxy::new();
    proxy.enroller.fail_next(&uid("a"), EnrolError::Panicked);
    let (agent, _serving) = proxy.connect().await;
    let reason = agent.add("a", 0).await;
    assert!(reason.contains("cannot enrol pod a") && reason.contains("panicked"), "{reason}");
    assert_eq!(agent.add("a", 0).await, "");
    proxy.serves(&["a"]).await;
}

#[tokio::test(start_paused = true)]
async fn disconnect_during_enrolment_does_not_abort_it() {
    let proxy = Proxy::new();
    let release = proxy.enroller.hold_next(&uid("a"));
    let (agent, serving) = proxy.connect().await;
    agent.send(&script::add("a"), &[namespace(0).as_fd()]).await;
    while proxy.enroller.attempts(&uid("a")) == 0 {
        tokio::task::yield_now().await;
    }
    drop(agent);
    assert!(matches!(serving.await, Ok(ConnectionError::Io(_))), "the response has no receiver");
    release.send(()).expect("the attempt waits");
    proxy.serves(&["a"]).await;
}

/// A proxy that connects to an agent at a path, and reconnects.
struct Connecting {
    proxy: Proxy,
    health: SourceHealth,
    path: PathBuf,
    running: JoinHandle<SourceEnd>,
    handle: SourceHandle,
}

impl Connecting {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("zds-{}-{name}", std::process::id()));
        let (proxy, health) = (Proxy::new(), SourceHealth::default());
        let source = ZdsSource::new(path.clone());
        let (running, handle) = start(source, &proxy.registry, &health, None);
        Self { proxy, health, path, running, handle }
    }

    /// Pauses the source, and continues in another process with the same pods.
    async fn hand_over(&mut self) {
        let (state, paused) = self.handle.pause().await.expect("it runs");
        self.running.abort();
        drop(paused);
        let source = ZdsSource::new(self.path.clone());
        self.health = SourceHealth::default();
        let started = start(source, &self.proxy.registry, &self.health, Some(state));
        (self.running, self.handle) = started;
        tokio::task::yield_now().await;
    }

    fn listen(&self) -> SeqPacketListener {
        fs::remove_file(&self.path).ok();
        SeqPacketListener::bind(&self.path).expect("listens")
    }

    async fn accept(listener: &SeqPacketListener) -> Agent {
        Agent::greeted(listener.accept().await.expect("accepted")).await
    }
}

impl Drop for Connecting {
    fn drop(&mut self) {
        self.running.abort();
        fs::remove_file(&self.path).ok();
    }
}

#[tokio::test(start_paused = true)]
async fn reconnects_to_restarted_agent_and_keeps_pods() {
    let source = Connecting::new("restart");
    let listener = source.listen();
    let agent = Connecting::accept(&listener).await;
    assert_eq!(agent.add("a", 0).await, "");
    assert!(!source.health.is_ready(), "the snapshot is incomplete");
    assert_eq!(agent.snapshot_sent().await, "");
    assert!(source.health.is_ready());
    drop((agent, listener));
    while source.health.is_ready() {
        tokio::task::yield_now().await;
    }
    source.proxy.serves(&["a"]).await;
    let agent = Connecting::accept(&source.listen()).await;
    assert_eq!(agent.add("a", 0).await, "");
    assert_eq!(agent.snapshot_sent().await, "");
    assert!(source.health.is_ready());
    assert_eq!(source.proxy.enroller.attempts(&uid("a")), 1);
}

#[tokio::test(start_paused = true)]
async fn new_process_continues_the_connection_of_the_agent() {
    let mut source = Connecting::new("hand-over");
    let listener = source.listen();
    let agent = Connecting::accept(&listener).await;
    assert_eq!(agent.add("a", 0).await, "");
    // In the middle of the snapshot: the pods named so far stay.
    source.hand_over().await;
    assert!(!source.health.is_ready(), "the snapshot is incomplete");
    assert_eq!(agent.add("b", 1).await, "");
    assert_eq!(agent.snapshot_sent().await, "");
    assert!(source.health.is_ready());
    source.hand_over().await;
    assert!(source.health.is_ready(), "at once");
    assert!(agent.snapshot_sent().await.contains("received before"));
    assert_eq!(agent.del("a").await, "");
    source.proxy.serves(&["b"]).await;
    agent.receives_nothing().await;
    assert_eq!(source.proxy.enroller.attempts(&uid("b")), 1);
    timeout(Duration::from_secs(60), listener.accept()).await.expect_err("no second connection");
}

#[tokio::test(start_paused = true)]
async fn each_request_is_answered_once_by_either_process() {
    let mut source = Connecting::new("in-flight");
    let listener = source.listen();
    let agent = Connecting::accept(&listener).await;
    assert_eq!(agent.snapshot_sent().await, "");
    // The running process answers the request in progress.
    let release = source.proxy.enroller.hold_next(&uid("a"));
    agent.send(&script::add("a"), &[namespace(0).as_fd()]).await;
    while source.proxy.enroller.attempts(&uid("a")) == 0 {
        tokio::task::yield_now().await;
    }
    let released = async {
        sleep(Duration::from_secs(1)).await;
        release.send(()).expect("the attempt waits");
    };
    tokio::join!(source.hand_over(), released);
    assert_eq!(agent.response().await, "");
    // The new process answers the request that arrives while the source is paused.
    let (state, paused) = source.handle.pause().await.expect("it runs");
    agent.send(&script::add("b"), &[namespace(1).as_fd()]).await;
    agent.receives_nothing().await;
    // The new process fails, so the running one continues.
    drop((state, paused));
    assert_eq!(agent.response().await, "");
    agent.receives_nothing().await;
    source.proxy.serves(&["a", "b"]).await;
}

#[tokio::test(start_paused = true)]
async fn new_process_connects_if_there_was_no_connection() {
    let mut source = Connecting::new("unconnected");
    source.hand_over().await;
    assert!(!source.health.is_ready());
    let agent = Connecting::accept(&source.listen()).await;
    assert_eq!(agent.snapshot_sent().await, "");
}

#[tokio::test(start_paused = true)]
async fn reconnects_after_malformed_message() {
    let source = Connecting::new("malformed");
    let listener = source.listen();
    let agent = Connecting::accept(&listener).await;
    assert!(!agent.request(b"\xff", &[]).await.is_empty());
    let agent = Connecting::accept(&listener).await;
    assert_eq!(agent.snapshot_sent().await, "");
}

#[tokio::test(start_paused = true)]
async fn backs_off_from_agent_that_sends_no_snapshot() {
    let source = Connecting::new("back-off");
    let listener = source.listen();
    let begun = Instant::now();
    for _ in 0..12 {
        drop(Connecting::accept(&listener).await);
    }
    let waited = begun.elapsed();
    assert!(waited > Duration::from_secs(10), "{waited:?}");
    let agent = Connecting::accept(&listener).await;
    assert_eq!(agent.snapshot_sent().await, "");
    drop(agent);
    let begun = Instant::now();
    Connecting::accept(&listener).await;
    assert!(begun.elapsed() < Duration::from_millis(100), "the snapshot ended the series");
}
