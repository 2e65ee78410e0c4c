//! The conversation of two processes, and what becomes of it when one of them falls silent.

use std::path::PathBuf;

use tokio::net::UnixStream;
use tokio::time::Instant;
use underpass_config::Sources;
use underpass_interception::Handover;

use super::*;
use crate::traffic::listeners::Listeners;

fn settings(flags: &[&str]) -> Settings {
    let flags = ["take_over.socket=off"].iter().chain(flags).map(|flag| (*flag).to_owned());
    Sources { file: None, environment: Vec::new(), flags: flags.collect() }.load().unwrap()
}

/// An offer, its gates, and both ends of a conversation.
fn offer() -> (Offer, Gates, Handover, Handover) {
    let gates = Gates::default();
    let offer = Offer::make(&settings(&[]), Listeners::testing(), gates.clone(), None).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    (offer, gates, Handover::new(ours), Handover::new(theirs))
}

fn role(flags: &[&str]) -> String {
    Role::of(&settings(flags)).unwrap().to_string()
}

/// Says these, and hears an answer to each.
async fn say(conversation: &Handover, lines: &[&str]) {
    for line in lines {
        conversation.send(line, &[]).await.unwrap();
        conversation.receive().await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn whoever_says_all_of_it_has_taken_over_and_the_gates_stay_closed() {
    let (mut offer, gates, ours, theirs) = offer();
    let role = role(&[]);
    let lines = [role.as_str(), RULES, ACCEPT, READY];
    let (offered, ()) = tokio::join!(offer.answer(ours), say(&theirs, &lines));
    assert!(matches!(offered, Offered::Taken { pid: Some(_) }), "{offered:?}");
    for gate in [&gates.accept, &gates.rules] {
        let passed = tokio::time::timeout(Duration::from_millis(1), gate.pass(async {})).await;
        assert!(passed.is_err(), "it is open");
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_falls_silent_is_waited_for_and_then_all_is_as_before() {
    let role = role(&[]);
    let turns: [(&[&str], Duration); 4] = [
        (&[], ANSWER),
        (&[&role], PREPARE),
        (&[&role, RULES], PREPARE),
        (&[&role, RULES, ACCEPT], TURN),
    ];
    for (lines, deadline) in turns {
        let (mut offer, gates, ours, theirs) = offer();
        let began = Instant::now();
        let (offered, ()) = tokio::join!(offer.answer(ours), say(&theirs, lines));
        assert!(matches!(offered, Offered::TakenBack), "{offered:?}");
        assert_eq!(began.elapsed(), deadline, "after {lines:?}");
        assert_eq!(gates.accept.pass(async {}).await, Some(()));
        assert_eq!(gates.rules.pass(async {}).await, Some(()));
    }
}

#[test]
fn another_kind_of_proxy_is_told_what_differs() {
    let own = Role::of(&settings(&[])).unwrap();
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
async fn a_process_that_does_not_answer_is_not_waited_for_for_ever() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let claim = Claim::over(Handover::new(ours), PathBuf::from("/nowhere.sock"));
    let began = Instant::now();
    let outcome = claim.rules().await;
    assert!(matches!(outcome, Err(TakeOverError::NoAnswer { asked: RULES })), "{outcome:?}");
    assert_eq!(began.elapsed(), ANSWER);
}

#[tokio::test]
async fn where_the_process_that_runs_has_ended_its_consent_is_not_needed() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let claim = Claim::over(Handover::new(ours), PathBuf::from("/nowhere.sock"));
    drop(theirs);
    // Unlike before: then there is nobody to accept.
    let outcome = claim.accept().await;
    assert!(matches!(outcome, Err(TakeOverError::Left { asked: ACCEPT })), "{outcome:?}");
    claim.ready().await.unwrap();
}
