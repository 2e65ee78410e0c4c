//! Two processes in memory. At each message the connection, or one of the processes, ends.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use futures_util::future::join_all;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use underpass_config::{Hint as _, PodUid, Settings, Sources};
use underpass_interception::{Handover, Namespace};

use super::incoming::{self, AdoptionError};
use super::outgoing::OutgoingPods;
use crate::pods::annotations::ExemptReason;
use crate::pods::enrolment::{EnrolError, LeaveReason};
use crate::pods::facts::PodFacts;
use crate::pods::facts::tests::facts;
use crate::pods::registry::PodRegistry;
use crate::pods::source::{self, SourceState};
use crate::pods::status::PodState;
use crate::pods::testing::FakeEnroller;
use crate::process::pause_gate::PauseGate;
use crate::process::take_over::control_socket::ControlSocket;
use crate::process::take_over::{TakeOverError, TakeoverClient, TakeoverOutcome, TakeoverServer};

/// Namespaces of kinds that need no privilege.
const NAMESPACES: [&str; 3] = ["net", "uts", "ipc"];

/// More requests than any exchange has.
const MAX_REQUESTS: usize = 40;

fn uid(index: usize) -> PodUid {
    format!("pod-{index}").parse().unwrap()
}

fn pod(index: usize) -> PodFacts {
    PodFacts { uid: uid(index), ..facts() }
}

fn namespace(index: usize) -> Namespace {
    Namespace::open(format!("/proc/self/ns/{}", NAMESPACES[index])).unwrap()
}

fn path(name: &str) -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let (process, number) = (std::process::id(), NEXT.fetch_add(1, Relaxed));
    std::env::temp_dir().join(format!("pods-{name}-{process}-{number}.sock"))
}

fn settings(socket: &Path) -> Settings {
    let socket = format!("take_over.socket={}", socket.display());
    let flags = vec![socket, "node.pods.directory=/pods".to_owned()];
    Sources { flags, ..Sources::default() }.load().unwrap()
}

/// A process that serves the pods of all namespaces.
struct Running {
    enroller: FakeEnroller,
    registry: PodRegistry,
    endpoints: PauseGate,
    host_rules: PauseGate,
    socket: PathBuf,
    /// Ends with a take-over, or is aborted. Its result keeps the process alive for the new one.
    life: JoinHandle<(TakeoverOutcome, TakeoverServer)>,
}

impl Running {
    async fn start() -> Self {
        let (enroller, socket) = (FakeEnroller::default(), path("old"));
        let (endpoints, host_rules) = (PauseGate::default(), PauseGate::default());
        let registry = enroller.registry();
        for index in 0..NAMESPACES.len() {
            registry.add(pod(index), namespace(index)).first_outcome().await.unwrap();
        }
        let settings = settings(&socket);
        let mut server = TakeoverServer::listen(&settings, Vec::new(), None).await.unwrap();
        let (handle, mut pauses) = source::pauses();
        let mut pods = OutgoingPods::new(
            registry.clone(),
            handle,
            Arc::new(endpoints.clone()),
            host_rules.clone(),
        );
        let handed = registry.clone();
        let life = tokio::spawn(async move {
            let source = async {
                loop {
                    let state = SourceState { text: "a state".to_owned(), descriptors: Vec::new() };
                    pauses.next().await.pause(state).await;
                }
            };
            let answer = async {
                let conversation = server.accept().await;
                server.answer(conversation, &mut pods).await
            };
            let outcome = tokio::select! {
                outcome = answer => outcome,
                () = source => unreachable!("it never ends"),
            };
            if let TakeoverOutcome::Completed { .. } = outcome {
                handed.hand_over().gone().await;
            }
            (outcome, server)
        });
        Self { enroller, registry, endpoints, host_rules, socket, life }
    }

    /// Asserts that it serves every pod, and that nothing is paused.
    async fn assert_serves_all(&self) {
        assert_eq!(self.enroller.serving().len(), NAMESPACES.len());
        assert!(self.enroller.paused().is_empty() && self.enroller.left().is_empty());
        self.endpoints.pass(async {}).await.unwrap();
        self.host_rules.pass(async {}).await.unwrap();
    }
}

/// A process that takes over.
#[derive(Default)]
struct New {
    enroller: FakeEnroller,
}

impl New {
    async fn take_over(
        &self,
        registry: &PodRegistry,
        socket: &Path,
    ) -> Result<Option<SourceState>, AdoptionError> {
        let connected = TakeoverClient::connect_if(true, &settings(socket)).await?;
        let client = Arc::new(connected.expect("a process runs").0);
        let state = incoming::adopt(&client, registry).await?;
        client.accept_unless_ended().await?;
        client.ready().await?;
        registry.finish_adoption();
        Ok(state)
    }
}

/// Passes messages between both processes, and closes both connections after `messages` requests.
/// Returns whether the exchange was complete.
async fn relay(listener: ControlSocket, to: PathBuf, messages: usize, then: impl FnOnce()) -> bool {
    let new = listener.accept().await.unwrap().with_longest_line(1 << 20);
    let old = Handover::new(UnixStream::connect(&to).await.unwrap()).with_longest_line(1 << 20);
    for _ in 0..messages {
        for (from, to) in [(&new, &old), (&old, &new)] {
            let Ok(Some((line, attached))) = from.receive().await else { return true };
            let attached: Vec<_> = attached.iter().map(std::os::fd::AsFd::as_fd).collect();
            to.send(&line, &attached).await.unwrap();
        }
    }
    then();
    false
}

#[tokio::test]
async fn pods_and_source_move_and_running_process_drains() {
    let (running, new) = (Running::start().await, New::default());
    let registry = new.enroller.registry();
    let state = new.take_over(&registry, &running.socket).await.unwrap();
    assert_eq!(state.unwrap().text, "a state");
    assert!(matches!(running.life.await.unwrap().0, TakeoverOutcome::Completed { .. }));
    assert_eq!(new.enroller.serving().len(), NAMESPACES.len());
    assert_eq!(running.enroller.departures(), [LeaveReason::HandedOver; NAMESPACES.len()]);
    for index in 0..NAMESPACES.len() {
        assert_eq!(new.enroller.attempts(&uid(index)), 1);
        let (facts, in_namespace) = registry.known(&uid(index)).unwrap();
        assert_eq!((facts, in_namespace), (pod(index), namespace(index).id()));
    }
}

#[tokio::test]
async fn broken_connection_at_each_message_leaves_every_pod_to_running_process() {
    let complete = join_all((1..MAX_REQUESTS).map(break_connection)).await;
    let incomplete = complete.iter().filter(|complete| !**complete).count();
    assert!(incomplete > 10 && incomplete < complete.len(), "{complete:?}");
}

/// Returns whether the exchange was complete before.
async fn break_connection(messages: usize) -> bool {
    let (running, new, at) = (Running::start().await, New::default(), path("relay"));
    let registry = new.enroller.registry();
    let listener = ControlSocket::bind(&at, None).unwrap();
    let relayed = relay(listener, running.socket.clone(), messages, || {});
    let (outcome, complete) = tokio::join!(new.take_over(&registry, &at), relayed);
    match outcome {
        // The last message was passed.
        Ok(_) => {
            let outcome = running.life.await.unwrap().0;
            assert!(matches!(outcome, TakeoverOutcome::Completed { .. }), "{outcome:?}");
        }
        Err(error) => {
            assert!(
                matches!(
                    error,
                    AdoptionError::TakeOver(TakeOverError::Closed { .. })
                        | AdoptionError::Pod(EnrolError::TakeOver(_))
                ),
                "after {messages}: {error:?}"
            );
            assert!(!complete, "after {messages}");
            while !running.life.is_finished() {
                tokio::task::yield_now().await;
            }
            running.assert_serves_all().await;
        }
    }
    complete
}

#[tokio::test]
async fn killed_running_process_at_each_message_leaves_every_pod_to_new_process() {
    let complete = join_all((1..MAX_REQUESTS).map(kill_running)).await;
    assert!(complete.contains(&true) && complete.contains(&false), "{complete:?}");
}

/// Returns whether the exchange was complete before.
async fn kill_running(messages: usize) -> bool {
    let (running, new, at) = (Running::start().await, New::default(), path("relay"));
    let registry = new.enroller.registry();
    let listener = ControlSocket::bind(&at, None).unwrap();
    let kill = || running.life.abort();
    let relayed = relay(listener, running.socket.clone(), messages, kill);
    let (outcome, complete) = tokio::join!(new.take_over(&registry, &at), relayed);
    outcome.unwrap();
    // Its source enrols the pods that were not passed.
    for index in 0..NAMESPACES.len() {
        registry.add(pod(index), namespace(index)).first_outcome().await.unwrap();
    }
    assert_eq!(new.enroller.serving().len(), NAMESPACES.len());
    complete
}

#[tokio::test]
async fn pod_that_cannot_be_adopted_is_enrolled_again_and_others_are_unaffected() {
    let (running, new) = (Running::start().await, New::default());
    let registry = new.enroller.registry();
    new.enroller.fail_next(&uid(1), EnrolError::Panicked);
    new.enroller.fail_next(&uid(1), EnrolError::Pending);
    let (taken, ()) = tokio::join!(new.take_over(&registry, &running.socket), async {
        while new.enroller.attempts(&uid(1)) == 0 {
            tokio::task::yield_now().await;
        }
        let status = registry.status();
        let status = status.iter().find(|pod| pod.uid == uid(1)).unwrap();
        assert!(!matches!(status.state, PodState::Serving(_)));
    });
    taken.unwrap();
    assert!(matches!(running.life.await.unwrap().0, TakeoverOutcome::Completed { .. }));
    while new.enroller.serving().len() < NAMESPACES.len() {
        tokio::task::yield_now().await;
        if let Some(pod) = registry.status().iter().find(|pod| pod.uid == uid(1)) {
            let text = crate::admin::api::status::Pod::from(pod).to_string();
            let is_named = text.contains("it was not adopted from the previous process");
            assert!(is_named || new.enroller.attempts(&uid(1)) > 1, "{text}");
        }
    }
    assert_eq!(new.enroller.attempts(&uid(0)), 1);
    assert!(new.enroller.attempts(&uid(1)) >= 2);
}

#[tokio::test]
async fn exempt_pod_loses_its_rules_before_take_over_completes() {
    let (running, new) = (Running::start().await, New::default());
    let registry = new.enroller.registry();
    new.enroller.exempt_next(&uid(1), ExemptReason::OptedOut);
    new.take_over(&registry, &running.socket).await.unwrap();
    assert_eq!(running.enroller.without_rules(), [uid(1)]);
    assert_eq!(new.enroller.serving(), [uid(0), uid(2)]);
    running.life.await.unwrap();
    assert_eq!(running.enroller.departures(), [LeaveReason::HandedOver; NAMESPACES.len()]);
}

#[tokio::test(start_paused = true)]
async fn removed_pod_that_drains_refuses_take_over_as_busy() {
    let (running, new) = (Running::start().await, New::default());
    let registry = new.enroller.registry();
    let release = running.enroller.hold_leaving();
    drop(running.registry.remove(&uid(1)));
    let error = new.take_over(&registry, &running.socket).await.unwrap_err();
    assert!(matches!(error, AdoptionError::TakeOver(TakeOverError::Busy(_))), "{error:?}");
    assert!(error.hint().unwrap().starts_with("try again"));
    while !running.life.is_finished() {
        tokio::task::yield_now().await;
    }
    release.send(false).unwrap();
    assert!(running.enroller.paused().is_empty());
}

#[tokio::test]
async fn pod_that_changes_meanwhile_is_passed_again() {
    let (running, new) = (Running::start().await, New::default());
    let registry = new.enroller.registry();
    // Holds the adoption while the source of the running process goes on.
    let release = new.enroller.hold_next(&uid(0));
    let (taken, ()) = tokio::join!(new.take_over(&registry, &running.socket), async {
        while new.enroller.serving().len() < 2 {
            tokio::task::yield_now().await;
        }
        running.registry.remove(&uid(1)).gone().await;
        // Its listeners are open in the new process: the attempt waits.
        drop(running.registry.add(pod(1), namespace(1)));
        let labels = [("app".to_owned(), "web".to_owned())].into();
        drop(running.registry.add(PodFacts { labels, ..pod(2) }, namespace(2)));
        release.send(()).unwrap();
    });
    taken.unwrap();
    assert_eq!(new.enroller.departures(), [LeaveReason::RemovedByOther]);
    while new.enroller.serving().len() < NAMESPACES.len() {
        tokio::task::yield_now().await;
    }
    assert_eq!(registry.known(&uid(2)).unwrap().0.labels.len(), 1);
}
