//! Tests of the protocol, with a model of the retained names.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::xds::message::Any;

const KIND: ResourceType = ResourceType::Address;

fn resource(name: &str, version: &str) -> Resource {
    let any = Any { type_url: KIND.url().into(), value: Bytes::from_static(b"x") };
    Resource {
        name: name.into(),
        version: version.into(),
        resource: Some(any),
        aliases: Vec::new(),
    }
}

fn response(nonce: &str, resources: Vec<Resource>, removed: &[&str]) -> DeltaResponse {
    DeltaResponse {
        type_url: KIND.url().into(),
        nonce: nonce.into(),
        resources: resources.into_iter().map(Bytes::from).collect(),
        removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
    }
}

/// An empty response of policies.
fn policies() -> DeltaResponse {
    let type_url = ResourceType::Authorization.url().to_owned();
    DeltaResponse { type_url, ..DeltaResponse::default() }
}

fn retained(session: &Session) -> BTreeMap<String, String> {
    session.retained(KIND)
}

fn session() -> Session {
    Session::new(Node { id: "ztunnel~1.2.3.4~a.b~c".into(), metadata: None })
}

#[test]
fn first_request_names_node_and_each_type_once() {
    let requests = session().open(None);
    let types: Vec<_> = requests.iter().map(|request| &*request.type_url).collect();
    assert_eq!(types, ResourceType::ALL.map(ResourceType::url));
    assert!(requests[0].node.is_some() && requests[1].node.is_none());
    for request in requests {
        assert_eq!(request.resource_names_subscribe, [""; 0]);
        assert!(request.initial_resource_versions.is_empty());
        assert!(request.response_nonce.is_empty() && request.error_detail.is_none());
    }
}

#[test]
fn acknowledges_with_nonce_and_retains_versions() {
    let mut session = session();
    let update = session.receive(response("n1", vec![resource("a", "1"), resource("b", "")], &[]));
    let answer = session.finish(update.unwrap(), &[]);
    assert_eq!((&*answer.response_nonce, answer.error_detail), ("n1", None));
    assert_eq!(answer.type_url, KIND.url());
    assert_eq!(
        retained(&session),
        [("a", "1"), ("b", "")].map(|(n, v)| (n.into(), v.into())).into()
    );
    let update = session.receive(response("n2", vec![resource("c", "3")], &["a", "unknown"]));
    session.finish(update.unwrap(), &[]);
    assert_eq!(
        retained(&session),
        [("b", ""), ("c", "3")].map(|(n, v)| (n.into(), v.into())).into()
    );
}

#[test]
fn nack_names_rejected_resources_and_keeps_their_versions() {
    let mut session = session();
    let update = session.receive(response("1", vec![resource("a", "1")], &[])).unwrap();
    session.finish(update, &[]);
    let both = vec![resource("a", "2"), resource("b", "2"), resource("c", "2")];
    let update = session.receive(response("2", both, &[])).unwrap();
    let rejected: [(Name, _); 2] =
        [("a".into(), Rejection::Type), ("b".into(), Rejection::Size(9))];
    let answer = session.finish(update, &rejected);
    let reason = answer.error_detail.unwrap();
    assert_eq!(reason.code, 3);
    assert_eq!(
        reason.message,
        "a: has no content of its type; b: has 9 bytes, more than the limit"
    );
    assert_eq!(answer.response_nonce, "2");
    // The control plane needs the name of "b" to compute its removal.
    let expected = [("a", "1"), ("b", ""), ("c", "2")].map(|(n, v)| (n.into(), v.into()));
    assert_eq!(retained(&session), expected.into());
}

/// A long outage of a large mesh: its names exceed the maximum size of a request.
#[test]
fn request_above_size_limit_asks_for_whole_state() {
    let mut session = session();
    let name = |n: usize| format!("cluster//Pod/namespace/workload-with-a-long-name-{n:08}");
    let count = MAX_REQUEST / name(0).len();
    let resources = (0..count).map(|n| resource(&name(n), "1")).collect();
    let update = session.receive(response("1", resources, &[])).unwrap();
    session.finish(update, &[]);
    assert!(session.open(None)[0].initial_resource_versions.is_empty());
    let whole = response("2", vec![resource(&name(7), "2"), resource("new", "1")], &[]);
    let update = session.receive(whole).unwrap();
    assert_eq!((update.removed.len(), update.outdated.len()), (0, 0));
    session.finish(update, &[]);
    assert_eq!(retained(&session).len(), count + 1);
    // The policies complete the whole state.
    assert_eq!(session.max_removals(&policies()), count + 1);
    let update = session.receive(policies()).unwrap();
    assert_eq!(update.outdated.len(), count - 1);
    assert!(!update.outdated.contains(&name(7)));
    session.finish(update, &[]);
    let left = [(name(7), "2"), ("new".to_owned(), "1")].map(|(n, v)| (n, v.to_owned()));
    assert_eq!(retained(&session), left.into());
    // Later responses are differences.
    assert_eq!(session.max_removals(&policies()), 0);
    let update = session.receive(response("3", vec![resource("a", "1")], &["new"])).unwrap();
    assert_eq!(update.removed, ["new"]);
}

/// Cilium sends its whole state on each stream, without versions and without removals.
#[test]
fn first_state_of_stream_without_versions_replaces_retained_one() {
    let mut session = session();
    let received = |session: &mut Session, response| {
        let update = session.receive(response).unwrap();
        let removed = [update.removed.clone(), update.outdated.clone()];
        session.finish(update, &[]);
        removed
    };
    let sent = |names: &[&str], removed: &[&str]| {
        response("1", names.iter().map(|name| resource(name, "")).collect(), removed)
    };
    let none = || [Vec::<String>::new(), Vec::new()];
    session.open(None);
    assert_eq!(received(&mut session, sent(&["uid-1", "uid-2", "uid-3"], &[])), none());
    assert_eq!(received(&mut session, policies()), none());
    assert_eq!(received(&mut session, sent(&["uid-4", "uid-5"], &[])), none(), "an event");
    assert_eq!(session.open(None)[0].initial_resource_versions.len(), 5);
    // Events that were queued before the stream began.
    let removed = ["uid-3".to_owned()];
    let queued = sent(&["uid-1", "uid-6"], &["uid-3"]);
    assert_eq!(received(&mut session, queued), [removed.to_vec(), Vec::new()]);
    assert_eq!(received(&mut session, sent(&["uid-1", "uid-4"], &[])), none());
    let [removed, mut outdated] = received(&mut session, policies());
    outdated.sort();
    assert_eq!((removed, outdated), (Vec::new(), vec!["uid-2".to_owned(), "uid-5".to_owned()]));
    assert_eq!(retained(&session).into_keys().collect::<Vec<_>>(), ["uid-1", "uid-4", "uid-6"]);
    // A control plane with versions computes the removals itself.
    received(&mut session, response("2", vec![resource("uid-1", "7")], &[]));
    session.open(None);
    assert_eq!(received(&mut session, sent(&["uid-6"], &[])), none());
    assert_eq!(received(&mut session, policies()), none());
}

/// Cilium answers the request for policies although the one for addresses has failed.
#[test]
fn policies_before_any_address_remove_nothing() {
    let mut session = session();
    session.open(None);
    let update = session.receive(response("1", vec![resource("uid-1", "")], &[])).unwrap();
    session.finish(update, &[]);
    session.open(None);
    let update = session.receive(policies()).unwrap();
    assert!(update.outdated.is_empty());
    session.finish(update, &[]);
    // A later response may be a change, and is not the whole state.
    let update = session.receive(response("2", vec![resource("uid-2", "")], &[])).unwrap();
    session.finish(update, &[]);
    let update = session.receive(policies()).unwrap();
    assert!(update.outdated.is_empty());
    session.finish(update, &[]);
    assert_eq!(retained(&session).len(), 2);
}

#[test]
fn nack_lists_limited_number_of_names() {
    let mut session = session();
    let names: Vec<_> = (0..1000).map(|n| format!("n{n}")).collect();
    let resources = names.iter().map(|name| resource(name, "1")).collect();
    let update = session.receive(response("1", resources, &[])).unwrap();
    let rejected: Vec<_> =
        names.iter().map(|name| (Name::from(&**name), Rejection::Type)).collect();
    let message = session.finish(update, &rejected).error_detail.unwrap().message;
    assert!(message.ends_with("n19: has no content of its type; and 980 more"), "{message}");
}

#[test]
fn is_synced_after_one_response_of_each_type() {
    let mut session = session();
    for kind in ResourceType::ALL {
        assert!(!session.is_synced(kind));
        let empty = DeltaResponse { type_url: kind.url().into(), ..DeltaResponse::default() };
        let update = session.receive(empty).unwrap();
        session.finish(update, &[]);
        assert!(session.is_synced(kind));
    }
}

#[test]
fn refuses_unknown_type_and_unusable_name() {
    let session = session();
    let unknown = DeltaResponse { type_url: "x".repeat(1000), ..DeltaResponse::default() };
    assert_eq!(session.receive(unknown).unwrap_err(), SessionError::UnknownType("x".repeat(100)));
    let overlong = response("1", vec![resource(&"x".repeat(MAX_NAME + 1), "1")], &[]);
    let nameless_policy = DeltaResponse { resources: vec![resource("", "1").into()], ..policies() };
    for response in [overlong, nameless_policy] {
        assert_eq!(session.receive(response).unwrap_err(), SessionError::Name);
    }
    let truncated = Bytes::from_static(&[10, 9, b'a']);
    let truncated = DeltaResponse { resources: vec![truncated], ..policies() };
    let error = session.receive(truncated).unwrap_err();
    assert!(error.to_string().starts_with("a resource cannot be decoded: "), "{error}");
}

#[test]
fn rejects_resources_above_limit_of_client() {
    let mut session = session();
    let many = |from: usize| (from..from + MAX_RESOURCES / 2).map(|n| resource(&n.to_string(), ""));
    let update = session.receive(response("1", many(0).collect(), &[])).unwrap();
    session.finish(update, &[]);
    let update = session.receive(response("2", many(MAX_RESOURCES / 2).collect(), &[])).unwrap();
    session.finish(update, &[]);
    session.receive(response("3", vec![resource("7", "2")], &[])).unwrap();
    let error = session.receive(response("4", vec![resource("new", "")], &[])).unwrap_err();
    assert_eq!(error, SessionError::TooMany(KIND));
}

#[test]
fn rejects_resource_of_other_type_without_content_or_too_large() {
    let mut other = resource("a", "1");
    other.resource.as_mut().unwrap().type_url = ResourceType::Authorization.url().into();
    let empty = Resource { resource: None, ..resource("b", "1") };
    let mut large = resource("c", "1");
    large.resource.as_mut().unwrap().value = vec![0; MAX_RESOURCE + 1].into();
    let update = session().receive(response("1", vec![other, empty, large], &[])).unwrap();
    let problems: Vec<_> = update.resources.into_iter().map(|item| item.problem).collect();
    let size = Rejection::Size(MAX_RESOURCE + 1);
    assert_eq!(problems, [Rejection::Type, Rejection::Type, size].map(Some));
}

proptest! {
    /// The session retains the names and versions of a model: the accepted resources, and those
    /// that were rejected without an accepted version.
    #[test]
    fn session_retains_names_and_versions_of_model(
        steps in prop::collection::vec(
            (prop::collection::vec((0..6_u8, 0..9_u8, any::<bool>()), 0..5), prop::collection::vec(0..6_u8, 0..3)),
            1..12,
        ),
    ) {
        let (mut session, mut model) = (session(), BTreeMap::<String, String>::new());
        for (nonce, (resources, removed)) in steps.into_iter().enumerate() {
            let removed: Vec<_> = removed.into_iter().map(|name| name.to_string()).collect();
            // Only the last resource with a name counts, so each name occurs once.
            let unique: BTreeMap<_, _> =
                resources.into_iter().map(|(name, version, bad)| (name, (version, bad))).collect();
            let sent = unique.iter().map(|(name, (version, _))| {
                resource(&name.to_string(), &version.to_string())
            });
            let removed_names: Vec<_> = removed.iter().map(|name| &**name).collect();
            let response = response(&nonce.to_string(), sent.collect(), &removed_names);
            let update = session.receive(response).unwrap();
            let bad = unique.iter().filter(|(_, (_, bad))| *bad);
            let rejected: Vec<_> =
                bad.map(|(name, _)| (Name::from(name.to_string()), Rejection::Type)).collect();
            let answer = session.finish(update, &rejected);
            prop_assert_eq!(answer.response_nonce, nonce.to_string());
            prop_assert_eq!(answer.error_detail.is_some(), !rejected.is_empty());
            for name in removed {
                model.remove(&name);
            }
            for (name, (version, bad)) in unique {
                let entry = model.entry(name.to_string());
                if bad { entry.or_default(); } else { entry.insert_entry(version.to_string()); }
            }
            prop_assert_eq!(retained(&session), model.clone());
        }
    }
}
