//! Tests of the protocol without I/O: valid, misordered and invalid requests.

use proptest::collection::vec;
use proptest::prelude::*;

use super::script::{self, add, del, encode, info, keep, snapshot_sent};
use super::*;

/// Stands for a descriptor.
type Fd = u8;

/// The reason of the rejection.
fn rejected(session: &mut Session, bytes: &[u8], descriptors: &[Fd]) -> RequestError {
    session.receive(bytes, descriptors.to_vec()).expect_err("rejected")
}

/// The pods that the snapshot retains.
fn retained(session: &mut Session) -> Vec<String> {
    match session.receive::<Fd>(&snapshot_sent(), Vec::new()) {
        Ok(Command::Retain(named)) => named.iter().map(ToString::to_string).collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn zds_messages_have_the_bytes_of_the_reference_encoder() {
    assert_eq!(hello(), [0x08, 0x01]);
    assert_eq!(response(None), [0x0a, 0x00]);
    assert_eq!(response(Some("no")), b"\x0a\x04\x0a\x02no");
    assert_eq!(add("u"), b"\x0a\x17\x0a\x01u\x12\x12\x0a\x05web-1\x12\x04shop\x1a\x03web");
    assert_eq!(del("u"), b"\x12\x03\x12\x01u");
    assert_eq!(snapshot_sent(), b"\x1a\x00");
    assert_eq!(keep("u"), b"\x2a\x03\x0a\x01u");
}

#[test]
fn response_is_bounded_and_failure_has_reason() {
    let response = |reason: &str| {
        let bytes = response(Some(reason));
        assert!(bytes.len() <= 1024, "istio-cni reads no more");
        let decoded = WorkloadResponse::decode(bytes.as_slice()).expect("a response");
        let Some(Response::Ack(Ack { error })) = decoded.payload else { panic!("{decoded:?}") };
        error
    };
    assert!(!response("").is_empty(), "an empty reason is a success");
    let long = "\u{e4}".repeat(4000);
    assert!(long.starts_with(&response(&long)));
}

#[test]
fn add_request_contains_pod_and_its_namespace() {
    let command = Session::new().receive(&add("pod-a"), vec![7]).expect("valid");
    let Command::Add { facts, namespace } = command else { panic!("{command:?}") };
    assert_eq!((facts.uid.as_str(), namespace), ("pod-a", 7));
    let names = [facts.name.as_str(), &facts.namespace, &facts.service_account];
    assert_eq!(names, ["web-1", "shop", "web"]);
}

#[test]
fn snapshot_retains_only_added_and_kept_pods() {
    let mut session = Session::new();
    session.receive(&add("a"), vec![1]).expect("valid");
    session.receive::<Fd>(&keep("b"), Vec::new()).expect("valid");
    session.receive(&add("c"), vec![2]).expect("valid");
    let command = session.receive::<Fd>(&del("c"), Vec::new()).expect("valid");
    assert!(matches!(command, Command::Remove(uid) if uid.as_str() == "c"));
    session.receive(&add("a"), vec![3]).expect("a duplicate");
    assert_eq!(retained(&mut session), ["a", "b"]);
    assert!(retained(&mut Session::new()).is_empty(), "a new connection names pods again");
}

#[test]
fn keep_and_second_snapshot_are_rejected_after_snapshot() {
    let mut session = Session::new();
    assert!(retained(&mut session).is_empty());
    let error = rejected(&mut session, &keep("a"), &[]);
    assert!(matches!(error, RequestError::KeepAfterSnapshot));
    let error = rejected(&mut session, &snapshot_sent(), &[]);
    assert!(matches!(error, RequestError::SecondSnapshot));
    session.receive(&add("a"), vec![1]).expect("changes are allowed");
    session.receive::<Fd>(&del("a"), Vec::new()).expect("changes are allowed");
}

#[test]
fn rejects_missing_surplus_and_misplaced_descriptors() {
    let mut session = Session::new();
    for descriptors in [&[][..], &[1, 2]] {
        let error = rejected(&mut session, &add("a"), descriptors);
        assert!(matches!(error, RequestError::Descriptors(n) if n == descriptors.len()));
        assert!(!error.ends_connection());
    }
    for bytes in [keep("b"), del("c"), snapshot_sent()] {
        let error = rejected(&mut session, &bytes, &[1]);
        assert!(matches!(error, RequestError::UnexpectedDescriptor));
        assert!(!error.ends_connection());
    }
    assert_eq!(retained(&mut session), ["a", "b"], "an error does not remove a named pod");
}

#[test]
fn rejects_incomplete_and_hostile_descriptions() {
    let mut session = Session::new();
    let bytes = encode(Payload::Add(AddWorkload { uid: "a".to_owned(), workload_info: None }));
    assert!(matches!(rejected(&mut session, &bytes, &[1]), RequestError::NoWorkloadInfo));
    for uid in ["", "a/b", "a b", "a\n", &"a".repeat(254)] {
        for (bytes, descriptors) in [(add(uid), &[1][..]), (keep(uid), &[]), (del(uid), &[])] {
            let error = rejected(&mut session, &bytes, descriptors);
            assert!(matches!(error, RequestError::Uid { .. }), "{uid:?}: {error:?}");
        }
    }
    // The slashes would add segments to the path of the identity.
    let info = WorkloadInfo { service_account: "web/../admin".to_owned(), ..info() };
    let hostile = AddWorkload { uid: "b".to_owned(), workload_info: Some(info) };
    let error = rejected(&mut session, &encode(Payload::Add(hostile)), &[1]);
    assert!(matches!(error, RequestError::Facts(_)), "{error:?}");
    assert_eq!(retained(&mut session), ["a", "b"]);
}

#[test]
fn malformed_message_ends_connection_and_unknown_one_does_not() {
    let error = rejected(&mut Session::new(), b"\x0a\xff", &[1]);
    assert!(matches!(error, RequestError::Malformed(_)) && error.ends_connection());
    let newer = b"\x32\x02hi";
    let error = rejected(&mut Session::new(), newer, &[]);
    assert!(matches!(error, RequestError::Unknown) && !error.ends_connection());
}

proptest! {
    #[test]
    fn session_agrees_with_model_for_any_script(script in vec(any::<u8>(), 0..600)) {
        script::run(&script);
    }
}
