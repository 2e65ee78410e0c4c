//! Tests of the daemon's side of a call, over a real socket.

use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream as StdUnixStream;

use tokio::net::UnixStream;
use tokio::task::JoinHandle;

use super::*;
use crate::pods::cni::CniSource;
use crate::pods::cni::results::CniResults;
use crate::pods::cni::testing::{Folder, attached, facts, namespace};
use crate::pods::registry::PodRegistry;
use crate::pods::source::{SourceEnd, SourceHandle, SourceHealth};
use crate::pods::testing::{FakeEnroller, start};

/// A listening daemon, stopped on drop.
struct Daemon {
    folder: Folder,
    enroller: FakeEnroller,
    registry: PodRegistry,
    running: JoinHandle<SourceEnd>,
    handle: SourceHandle,
}

impl Daemon {
    async fn start() -> Self {
        let (folder, enroller) = (Folder::new(), FakeEnroller::default());
        let (registry, health) = (enroller.registry(), SourceHealth::default());
        let (running, handle) = start(source(&folder), &registry, &health, None);
        while !health.is_ready() {
            assert!(!running.is_finished(), "{:?}", running.await);
            tokio::task::yield_now().await;
        }
        Self { folder, enroller, registry, running, handle }
    }

    /// Pauses the source, and continues in another process with the same pods.
    async fn hand_over(&mut self) {
        let (state, paused) = self.handle.pause().await.unwrap();
        self.running.abort();
        // Dropped before it resumes.
        (&mut self.running).await.unwrap_err();
        drop(paused);
        let source = source(&self.folder);
        let health = SourceHealth::default();
        (self.running, self.handle) = start(source, &self.registry, &health, Some(state));
    }

    async fn connect(&self) -> Handover {
        Handover::new(UnixStream::connect(self.folder.path("cni.sock")).await.unwrap())
    }

    /// Sends the request on a new connection and returns the answer.
    async fn ask(&self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Answer {
        exchange(&self.connect().await, &request.encode(), descriptors).await
    }

    async fn serves(&self, count: usize) {
        while self.enroller.serving().len() != count {
            tokio::task::yield_now().await;
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.running.abort();
    }
}

/// A source whose socket is in `folder`.
fn source(folder: &Folder) -> CniSource {
    let (socket, watches) = (folder.path("cni.sock"), JoinSet::new());
    let results = CniResults::new(folder.path("results"));
    CniSource { socket, facts: facts().0, results, watches, upkeep: None }
}

async fn exchange(connection: &Handover, line: &str, descriptors: &[BorrowedFd<'_>]) -> Answer {
    connection.send(line, descriptors).await.unwrap();
    let (line, _) = connection.receive().await.unwrap().unwrap();
    Answer::decode(&line).unwrap()
}

fn code(answer: Answer) -> u32 {
    match answer {
        Answer::Done => 0,
        Answer::Refused(refusal) => refusal.code,
    }
}

fn add(name: &str) -> Request {
    Request::Add(Box::new(attached(name, &[])))
}

#[tokio::test]
async fn add_check_and_delete_of_a_pod_succeed() {
    let daemon = Daemon::start().await;
    let namespace = namespace("uts");
    let check = Request::Check(Box::new(attached("web", &[])));
    let delete = Request::Delete(attached("web", &[]).attachment);
    assert_eq!(daemon.ask(&Request::Status, &[]).await, Answer::Done);
    assert_eq!(code(daemon.ask(&check, &[namespace.as_fd()]).await), 3);
    for _ in 0..2 {
        assert_eq!(daemon.ask(&add("web"), &[namespace.as_fd()]).await, Answer::Done);
    }
    assert_eq!(daemon.ask(&check, &[namespace.as_fd()]).await, Answer::Done);
    for _ in 0..2 {
        assert_eq!(daemon.ask(&delete, &[]).await, Answer::Done);
    }
    daemon.serves(0).await;
}

#[tokio::test]
async fn delete_request_of_killed_plugin_is_performed() {
    let daemon = Daemon::start().await;
    let pod = attached("web", &[]);
    assert_eq!(daemon.ask(&add("web"), &[namespace("uts").as_fd()]).await, Answer::Done);
    let connection = daemon.connect().await;
    connection.send(&Request::Delete(pod.attachment).encode(), &[]).await.unwrap();
    drop(connection);
    daemon.serves(0).await;
}

#[tokio::test]
async fn killing_the_plugin_undoes_its_addition() {
    let daemon = Daemon::start().await;
    let (pod, namespace) = (attached("web", &[]), namespace("uts"));
    let held = daemon.enroller.hold_next(&pod.pod.uid);
    let connection = daemon.connect().await;
    connection.send(&add("web").encode(), &[namespace.as_fd()]).await.unwrap();
    while daemon.enroller.attempts(&pod.pod.uid) == 0 {
        tokio::task::yield_now().await;
    }
    drop(connection);
    // The daemon knows the pod until it notices that the plugin has exited.
    let check = Request::Check(Box::new(pod));
    while code(daemon.ask(&check, &[namespace.as_fd()]).await) != 3 {}
    drop(held);
    daemon.serves(0).await;
}

#[tokio::test]
async fn addition_whose_answer_is_not_read_is_undone() {
    let daemon = Daemon::start().await;
    let stream = StdUnixStream::connect(daemon.folder.path("cni.sock")).unwrap();
    stream.set_nonblocking(true).unwrap();
    let answered = UnixStream::from_std(stream.try_clone().unwrap()).unwrap();
    let connection = Handover::new(UnixStream::from_std(stream).unwrap());
    connection.send(&add("web").encode(), &[namespace("uts").as_fd()]).await.unwrap();
    answered.readable().await.unwrap();
    assert_eq!(daemon.enroller.serving().len(), 1);
    drop((connection, answered));
    daemon.serves(0).await;
    assert!(!daemon.registry.is_known(&attached("web", &[]).pod.uid));
}

#[tokio::test]
async fn wrong_descriptors_are_refused() {
    let daemon = Daemon::start().await;
    let (file, namespace) = (File::open("/proc/version").unwrap(), namespace("uts"));
    for (descriptors, message) in [
        (vec![], "the message has 0 descriptors instead of one"),
        (
            vec![namespace.as_fd(), namespace.as_fd()],
            "the message has 2 descriptors instead of one",
        ),
        (vec![file.as_fd()], "not a namespace"),
    ] {
        let Answer::Refused(refusal) = daemon.ask(&add("web"), &descriptors).await else {
            panic!("{message}");
        };
        assert_eq!(refusal.code, 101);
        assert!(refusal.message.contains(message), "{}", refusal.message);
    }
    daemon.serves(0).await;
}

#[tokio::test]
async fn malformed_request_is_refused_and_the_connection_stays_open() {
    let daemon = Daemon::start().await;
    let connection = daemon.connect().await;
    for line in ["{", r#"{"version":9,"command":"status"}"#] {
        let Answer::Refused(refusal) = exchange(&connection, line, &[]).await else {
            panic!("{line}");
        };
        assert_eq!(refusal.code, 11);
        assert!(refusal.hint.contains("cni install"), "{}", refusal.hint);
    }
    assert_eq!(exchange(&connection, &Request::Status.encode(), &[]).await, Answer::Done);
}

#[tokio::test]
async fn garbage_collection_takes_effect_with_its_last_message() {
    let daemon = Daemon::start().await;
    for (name, kind) in [("web", "uts"), ("db", "ipc")] {
        assert_eq!(daemon.ask(&add(name), &[namespace(kind).as_fd()]).await, Answer::Done);
    }
    let line = |names: &[&str], last| {
        let valid = names.iter().map(|name| attached(name, &[]).attachment).collect();
        Request::Collect { network: attached("web", &[]).network, valid, last }.encode()
    };
    let connection = daemon.connect().await;
    assert_eq!(exchange(&connection, &line(&["web"], false), &[]).await, Answer::Done);
    daemon.serves(2).await;
    assert_eq!(exchange(&connection, &line(&["other"], true), &[]).await, Answer::Done);
    daemon.serves(1).await;
    assert_eq!(daemon.enroller.serving()[0].as_str(), "uid-of-web");
}

#[tokio::test(start_paused = true)]
async fn silent_connection_is_closed() {
    let daemon = Daemon::start().await;
    let connection = daemon.connect().await;
    assert!(connection.receive().await.unwrap().is_none());
}

#[tokio::test(start_paused = true)]
async fn addition_that_takes_too_long_is_refused_and_undone() {
    let daemon = Daemon::start().await;
    let pod = attached("web", &[]);
    let _held = daemon.enroller.hold_next(&pod.pod.uid);
    let Answer::Refused(refusal) = daemon.ask(&add("web"), &[namespace("uts").as_fd()]).await
    else {
        panic!("the attempt waits");
    };
    assert_eq!((refusal.code, &*refusal.message), (11, "the pod was not enrolled within 25 s"));
    let check = Request::Check(Box::new(pod));
    assert_eq!(code(daemon.ask(&check, &[namespace("uts").as_fd()]).await), 3);
}

#[tokio::test]
async fn many_calls_at_once_are_answered() {
    let daemon = Daemon::start().await;
    let connections: Vec<Handover> = {
        let mut connections = Vec::new();
        for _ in 0..2 * MAX_CONCURRENT_CALLS {
            connections.push(daemon.connect().await);
        }
        connections
    };
    // The last calls are accepted when the first ones have ended.
    for connection in connections {
        let answer = exchange(&connection, &Request::Status.encode(), &[]).await;
        assert_eq!(answer, Answer::Done);
    }
}

#[tokio::test(start_paused = true)]
async fn new_process_continues_with_socket_and_pods() {
    let mut daemon = Daemon::start().await;
    let [first, second] = [namespace("uts"), namespace("ipc")];
    assert_eq!(daemon.ask(&add("web"), &[first.as_fd()]).await, Answer::Done);
    // The running process finishes the call in progress.
    let uid = attached("db", &[]).pod.uid;
    let release = daemon.enroller.hold_next(&uid);
    let adding = daemon.connect().await;
    adding.send(&add("db").encode(), &[second.as_fd()]).await.unwrap();
    while daemon.enroller.attempts(&uid) == 0 {
        tokio::task::yield_now().await;
    }
    let released = async {
        sleep(Duration::from_secs(1)).await;
        release.send(()).unwrap();
    };
    tokio::join!(daemon.hand_over(), released);
    let (answer, _) = adding.receive().await.unwrap().unwrap();
    assert_eq!(Answer::decode(&answer).unwrap(), Answer::Done);
    assert_eq!(daemon.enroller.serving().len(), 2);
    assert_eq!(daemon.enroller.attempts(&uid), 1, "no pod is enrolled again");
    // The new process knows the pods, also one whose namespace it cannot open by its path.
    let check = Request::Check(Box::new(attached("web", &[])));
    assert_eq!(daemon.ask(&check, &[first.as_fd()]).await, Answer::Done);
    for name in ["web", "db"] {
        let delete = Request::Delete(attached(name, &[]).attachment);
        assert_eq!(daemon.ask(&delete, &[]).await, Answer::Done);
    }
    daemon.serves(0).await;
}

#[tokio::test(start_paused = true)]
async fn call_continues_after_pause_request_is_withdrawn() {
    let daemon = Daemon::start().await;
    let uid = attached("web", &[]).pod.uid;
    let release = daemon.enroller.hold_next(&uid);
    let adding = daemon.connect().await;
    adding.send(&add("web").encode(), &[namespace("uts").as_fd()]).await.unwrap();
    while daemon.enroller.attempts(&uid) == 0 {
        tokio::task::yield_now().await;
    }
    let paused = timeout(Duration::from_secs(1), daemon.handle.pause()).await;
    paused.expect_err("the call is not finished");
    sleep(2 * FINISH_TIMEOUT).await;
    release.send(()).unwrap();
    let (answer, _) = adding.receive().await.unwrap().unwrap();
    assert_eq!(Answer::decode(&answer).unwrap(), Answer::Done);
}

#[tokio::test(start_paused = true)]
async fn call_that_is_not_finished_in_time_is_undone() {
    let mut daemon = Daemon::start().await;
    let uid = attached("web", &[]).pod.uid;
    let _held = daemon.enroller.hold_next(&uid);
    let adding = daemon.connect().await;
    adding.send(&add("web").encode(), &[namespace("uts").as_fd()]).await.unwrap();
    while daemon.enroller.attempts(&uid) == 0 {
        tokio::task::yield_now().await;
    }
    daemon.hand_over().await;
    assert!(adding.receive().await.unwrap().is_none(), "the plugin reports an error");
    assert!(!daemon.registry.is_known(&uid));
}
