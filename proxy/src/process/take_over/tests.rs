//! Tests of both sides of a take-over, with peers that stop answering or exit.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio::time::Instant;
use underpass_config::{Settings, Sources};
use underpass_interception::Handover;

use super::role::Role;
use super::*;
use crate::process::pause_gate::PauseGate;
use crate::traffic::listeners::{Kind, Listeners};

fn settings(flags: &[&str]) -> Settings {
    let flags = ["take_over.socket=off"].iter().chain(flags).map(|flag| (*flag).to_owned());
    Sources { file: None, environment: Vec::new(), flags: flags.collect() }.load().unwrap()
}

/// The gates of a fixed pod.
#[derive(Default)]
struct Gates {
    accept: PauseGate,
    rules: PauseGate,
}

impl Gates {
    fn pod(&self) -> FixedPod {
        FixedPod { accepting: Arc::new(self.accept.clone()), rules: self.rules.clone() }
    }
}

/// A server, its gates, and both ends of a connection.
async fn server() -> (TakeoverServer, Gates, Handover, Handover) {
    let gates = Gates::default();
    let listeners = Listeners::<Kind>::testing().duplicate();
    let server = TakeoverServer::listen(&settings(&[]), listeners, None).await.unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    (server, gates, Handover::new(ours), Handover::new(theirs))
}

fn role(flags: &[&str]) -> String {
    Role::new(&settings(flags)).unwrap().to_string()
}

#[test]
fn path_of_any_bytes_is_one_word() {
    for path in [&b"/run/underpass/admin-1.sock"[..], b"/a b\t%20/\xc2\xa0\xff\n"] {
        let path = PathBuf::from(OsString::from_vec(path.to_vec()));
        let word = encode(&path);
        assert!(!word.contains(char::is_whitespace), "{word:?}");
        assert_eq!(decode(&word), path);
    }
    assert_eq!(encode(Path::new("/run/admin.sock")), "/run/admin.sock");
}

/// Sends each line and waits for its answer.
async fn exchange(conversation: &Handover, lines: &[&str]) {
    for line in lines {
        conversation.send(line, &[]).await.unwrap();
        conversation.receive().await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn completed_take_over_keeps_gates_closed() {
    let (mut server, gates, ours, theirs) = server().await;
    let role = role(&[]);
    let lines = [role.as_str(), RULES, ACCEPT, READY];
    let mut pod = gates.pod();
    let (outcome, ()) = tokio::join!(server.answer(ours, &mut pod), exchange(&theirs, &lines));
    assert!(matches!(outcome, TakeoverOutcome::Completed { pid: Some(_) }), "{outcome:?}");
    for gate in [&gates.accept, &gates.rules] {
        let passed = tokio::time::timeout(Duration::from_millis(1), gate.pass(async {})).await;
        assert!(passed.is_err(), "the gate is open");
    }
}

/// Sends the last request, after the others.
async fn send_ready(theirs: &Handover, role: &str) {
    exchange(theirs, &[role, RULES, ACCEPT]).await;
    theirs.send(READY, &[]).await.unwrap();
}

#[tokio::test]
async fn running_process_resumes_if_last_answer_cannot_be_sent() {
    let (mut server, gates, ours, theirs) = server().await;
    let end = async move { send_ready(&theirs, &role(&[])).await };
    let mut pod = gates.pod();
    let (outcome, ()) = tokio::join!(server.answer(ours, &mut pod), end);
    assert!(matches!(outcome, TakeoverOutcome::Abandoned), "{outcome:?}");
    assert_eq!(gates.accept.pass(async {}).await, Some(()));
}

/// Work that does not end.
struct Unfinished(FixedPod);

impl Subject for Unfinished {
    const REQUESTS: &'static str = RULES;

    async fn perform(&mut self, request: &str) -> Option<Reply> {
        self.0.perform(request).await
    }

    fn timeout(&self) -> Duration {
        self.0.timeout()
    }

    async fn pause(&mut self) {
        self.0.pause().await;
    }

    async fn complete(&mut self) {
        std::future::pending().await
    }

    fn resume(&mut self) {
        self.0.resume();
    }
}

#[tokio::test(start_paused = true)]
async fn running_process_resumes_if_its_work_does_not_end() {
    let (mut server, gates, ours, theirs) = server().await;
    let mut subject = Unfinished(gates.pod());
    let began = Instant::now();
    let client = async {
        send_ready(&theirs, &role(&[])).await;
        // Keeps the connection until the running process closes it.
        assert!(theirs.receive().await.unwrap().is_none());
    };
    let answer = async {
        let conversation = ours;
        server.answer(conversation, &mut subject).await
    };
    let (outcome, ()) = tokio::join!(answer, client);
    assert!(matches!(outcome, TakeoverOutcome::Abandoned), "{outcome:?}");
    assert!(began.elapsed() < ANSWER_TIMEOUT);
    assert_eq!(gates.accept.pass(async {}).await, Some(()));
}

#[tokio::test(start_paused = true)]
async fn silent_new_process_times_out_and_gates_reopen() {
    let role = role(&[]);
    let turns: [(&[&str], Duration); 4] = [
        (&[], ANSWER_TIMEOUT),
        (&[&role], PREPARE_TIMEOUT),
        (&[&role, RULES], PREPARE_TIMEOUT),
        (&[&role, RULES, ACCEPT], SWITCH_TIMEOUT),
    ];
    for (lines, deadline) in turns {
        let (mut server, gates, ours, theirs) = server().await;
        let began = Instant::now();
        let mut pod = gates.pod();
        let (outcome, ()) = tokio::join!(server.answer(ours, &mut pod), exchange(&theirs, lines));
        assert!(matches!(outcome, TakeoverOutcome::Abandoned), "{outcome:?}");
        assert_eq!(began.elapsed(), deadline, "after {lines:?}");
        assert_eq!(gates.accept.pass(async {}).await, Some(()));
        assert_eq!(gates.rules.pass(async {}).await, Some(()));
    }
}

#[test]
fn refused_take_over_names_both_roles() {
    let own = Role::new(&settings(&[])).unwrap();
    assert_eq!(own.refusal(&role(&["proxy.workers=3", "limits.handshakes=7"])), None);
    for flag in [
        "proxy.outbound_port=1",
        "proxy.inbound_port=1",
        "proxy.hbone_port=1",
        "interception.profile=none",
        "interception.profile=osm",
    ] {
        let other = role(&[flag]);
        let refusal = own.refusal(&other).unwrap();
        assert!(refusal.contains(&other) && refusal.contains(&own.to_string()), "{refusal}");
    }
    assert!(own.refusal("").is_some());
}

#[tokio::test(start_paused = true)]
async fn client_times_out_when_running_process_is_silent() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let client = TakeoverClient::new(Handover::new(ours), PathBuf::from("/nowhere.sock"));
    let began = Instant::now();
    let outcome = client.rules().await;
    assert!(matches!(outcome, Err(TakeOverError::NoAnswer { request: RULES, .. })), "{outcome:?}");
    assert_eq!(began.elapsed(), ANSWER_TIMEOUT);
}

#[tokio::test]
async fn end_of_running_process_in_mid_line_closes_connection() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let client = TakeoverClient::new(Handover::new(ours), PathBuf::from("/nowhere.sock"));
    let (outcome, ()) = tokio::join!(client.rules(), async {
        theirs.read_exact(&mut [0; RULES.len() + 1]).await.unwrap();
        theirs.write_all(b"o").await.unwrap();
        drop(theirs);
    });
    assert!(matches!(outcome, Err(TakeOverError::Closed { request: RULES })), "{outcome:?}");
}

#[test]
fn roles_of_run_and_of_nodes_with_other_sources_differ() {
    let run = Role::new(&settings(&[])).unwrap();
    let nodes = [
        "node.pods.directory=/a",
        "node.pods.directory=/b",
        "node.pods.cni=/a",
        "node.pods.zds=/a",
    ];
    let nodes = nodes.map(|pods| role(&[pods, "interception.profile=ambient"]));
    for (index, node) in nodes.iter().enumerate() {
        assert!(run.refusal(node).is_some(), "{node}");
        assert!(nodes.iter().skip(index + 1).all(|other| other != node), "{node}");
    }
    let broken = role(&["node.pods.directory=/a\nb"]);
    assert!(!broken.contains('\n'), "a role is one line: {broken}");
}

#[tokio::test]
async fn ready_succeeds_if_running_process_has_ended() {
    let path = std::env::temp_dir().join(format!("take-over-{}.sock", std::process::id()));
    let socket = format!("take_over.socket={}", path.display());
    let settings = Sources { flags: vec![socket], ..Sources::default() }.load().unwrap();
    for ends in [true, false] {
        let server = TakeoverServer::listen(&settings, Vec::new(), None).await.unwrap();
        let greeted = Notify::new();
        let connect = async {
            let connected = TakeoverClient::connect_if(true, &settings).await;
            greeted.notify_one();
            connected
        };
        let greet = async {
            let mut pod = Gates::default().pod();
            let mut server = server;
            let conversation = server.accept().await;
            // Cancelled after the answer to the first message.
            tokio::select! {
                outcome = server.answer(conversation, &mut pod) => unreachable!("{outcome:?}"),
                () = greeted.notified() => {}
            }
            server
        };
        let (client, server) = tokio::join!(connect, greet);
        let (client, _handed) = client.unwrap().unwrap();
        let _running = (!ends).then_some(server);
        let outcome = client.accept().await;
        assert!(matches!(outcome, Err(TakeOverError::Closed { request: ACCEPT })), "{outcome:?}");
        assert_eq!(client.ready().await.is_ok(), ends);
        assert_eq!(client.accept_unless_ended().await.is_ok(), ends);
    }
}
