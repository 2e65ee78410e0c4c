//! Tests of both sides of a take-over, with peers that stop answering or exit.

use std::path::PathBuf;

use tokio::net::UnixStream;
use tokio::time::Instant;
use underpass_config::Sources;
use underpass_interception::Handover;

use super::*;
use crate::process::pause_gate::Gates;
use crate::traffic::listeners::{Kind, Listeners};

fn settings(flags: &[&str]) -> Settings {
    let flags = ["take_over.socket=off"].iter().chain(flags).map(|flag| (*flag).to_owned());
    Sources { file: None, environment: Vec::new(), flags: flags.collect() }.load().unwrap()
}

/// A server, its gates, and both ends of a connection.
fn server() -> (TakeoverServer, Gates, Handover, Handover) {
    let gates = Gates::default();
    let listeners = Listeners::<Kind>::testing().duplicate().unwrap();
    let server = TakeoverServer::listen(&settings(&[]), listeners, gates.clone(), None).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    (server, gates, Handover::new(ours), Handover::new(theirs))
}

fn role(flags: &[&str]) -> String {
    Role::new(&settings(flags)).unwrap().to_string()
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
    let (mut server, gates, ours, theirs) = server();
    let role = role(&[]);
    let lines = [role.as_str(), RULES, ACCEPT, READY];
    let (outcome, ()) = tokio::join!(server.answer(ours), exchange(&theirs, &lines));
    assert!(matches!(outcome, TakeoverOutcome::Completed { pid: Some(_) }), "{outcome:?}");
    for gate in [&gates.accept, &gates.rules] {
        let passed = tokio::time::timeout(Duration::from_millis(1), gate.pass(async {})).await;
        assert!(passed.is_err(), "the gate is open");
    }
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
        let (mut server, gates, ours, theirs) = server();
        let began = Instant::now();
        let (outcome, ()) = tokio::join!(server.answer(ours), exchange(&theirs, lines));
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
    assert!(matches!(outcome, Err(TakeOverError::NoAnswer { request: RULES })), "{outcome:?}");
    assert_eq!(began.elapsed(), ANSWER_TIMEOUT);
}

#[tokio::test]
async fn take_over_succeeds_if_old_process_has_exited() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let client = TakeoverClient::new(Handover::new(ours), PathBuf::from("/nowhere.sock"));
    drop(theirs);
    // An exit of the running process before `ready` is an error.
    let outcome = client.accept().await;
    assert!(matches!(outcome, Err(TakeOverError::Closed { request: ACCEPT })), "{outcome:?}");
    client.ready().await.unwrap();
}
