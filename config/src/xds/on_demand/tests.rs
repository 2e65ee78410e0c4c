//! Tests of lookups, with the answers as istiod sends them: names of resources with the requested
//! names as aliases, or removed names.

use std::collections::BTreeSet;

use super::super::control_plane::{Applied, ControlPlane, LocalWorkloads, Urgency};
use super::super::message::{DeltaResponse, Resource};
use super::super::request::NOTHING;
use super::super::resource_type::ResourceType;
use super::super::testing::{behind, encoded, node, resource, response, service, workload};
use super::super::workload::{
    GatewayAddress, GatewayDestination, NamespacedHostname, Service, Workload,
};
use super::*;
use crate::mesh::{Destination, Mesh};

const ADDRESS: ResourceType = ResourceType::Address;

struct Client(ControlPlane);

impl Client {
    fn new() -> Self {
        let local = LocalWorkloads { node: Some("here".into()), named: None };
        Self(ControlPlane::new(node(), local, true))
    }

    /// Applies a response with these resources and removed names. Returns the mesh.
    fn apply(&mut self, resources: Vec<Resource>, removed: &[&str]) -> Mesh {
        self.receive(response(ADDRESS, resources, removed));
        self.0.snapshot()
    }

    fn receive(&mut self, response: DeltaResponse) -> Applied {
        self.0.receive(response).unwrap()
    }

    /// The names that looking up `names` subscribes to and unsubscribes from, in that order.
    fn look_up(&mut self, names: &[&str]) -> [Vec<String>; 2] {
        changes(&self.0.look_up(&lookups(names)))
    }
}

fn lookups(names: &[&str]) -> Vec<Lookup> {
    let lookup = |name: &&str| match name.parse::<crate::mesh::NetworkAddress>() {
        Ok(at) => Lookup::address(&at.network, at.address),
        Err(_) => Lookup::hostname(&name.parse().unwrap()),
    };
    names.iter().map(lookup).collect()
}

/// The names that requests subscribe to and unsubscribe from. A request that only unsubscribes has
/// the name without a resource, which is left out.
fn changes(requests: &[DeltaRequest]) -> [Vec<String>; 2] {
    let ends = |one: &DeltaRequest| !one.resource_names_unsubscribe.is_empty();
    for request in requests {
        assert!(!request.resource_names_subscribe.is_empty() || !ends(request));
    }
    let mut changes = all_names(requests);
    changes[0].retain(|name| name != NOTHING);
    changes
}

fn all_names(requests: &[DeltaRequest]) -> [Vec<String>; 2] {
    let names = |names: fn(&DeltaRequest) -> &Vec<String>| {
        requests.iter().flat_map(names).cloned().collect()
    };
    [names(|one| &one.resource_names_subscribe), names(|one| &one.resource_names_unsubscribe)]
}

fn answered(mesh: &Mesh, name: &str) -> bool {
    mesh.is_answered(&lookups(&[name])[0])
}

fn at(n: u8) -> std::net::IpAddr {
    [10, 0, 0, n].into()
}

fn no_names() -> Vec<String> {
    Vec::new()
}

#[test]
fn first_request_subscribes_to_no_address_and_to_all_policies() {
    let mut client = Client::new();
    let requests = client.0.open();
    assert_eq!(changes(&requests[..1]), [vec!["*".to_owned()], vec!["*".to_owned()]]);
    assert_eq!(changes(&requests[1..]), [no_names(), no_names()]);
    assert!(!client.0.is_synced());
    client.receive(response(ResourceType::Authorization, Vec::new(), &[]));
    assert!(client.0.is_synced());
}

#[test]
fn lookup_is_answered_by_resource_with_its_address_or_by_removed_name() {
    let mut client = Client::new();
    let asked = ["/10.0.0.1", "/10.0.0.2", "/10.96.0.1"];
    assert_eq!(client.look_up(&asked)[0], asked);
    assert_eq!(client.look_up(&asked), [no_names(), no_names()], "it is asked once");
    let empty = client.apply(Vec::new(), &[]);
    assert_eq!(asked.map(|name| answered(&empty, name)), [false; 3]);
    // More than was asked.
    let more = vec![resource(workload("a", [10, 0, 0, 1])), resource(workload("b", [10, 0, 0, 9]))];
    let answer = response(ADDRESS, more, &["/10.0.0.2"]);
    assert_eq!(client.receive(answer).urgency, Urgency::Awaited);
    let mesh = client.0.snapshot();
    assert_eq!(asked.map(|name| answered(&mesh, name)), [true, true, false]);
    assert!(mesh.has_workload("", at(1)) && mesh.has_workload("", at(9)));
    assert!(!answered(&mesh, "/10.0.0.9"), "it was not asked");
    assert!(client.0.is_absent(&lookups(&asked)[1]) && client.0.awaits(&lookups(&asked)[2]));
    assert!(Mesh::default().is_answered(&lookups(&asked)[0]), "a complete mesh");
}

#[test]
fn removed_or_moved_resource_is_asked_again() {
    let mut client = Client::new();
    client.look_up(&["/10.0.0.1"]);
    assert!(answered(
        &client.apply(vec![resource(workload("a", [10, 0, 0, 1]))], &[]),
        "/10.0.0.1"
    ));
    let mesh = client.apply(vec![resource(workload("a", [10, 0, 0, 2]))], &[]);
    assert!(!answered(&mesh, "/10.0.0.1"));
    let again = ["/10.0.0.1".to_owned()];
    // istiod answers no subscription to a name that it has.
    assert_eq!(client.look_up(&["/10.0.0.1"]), [again.to_vec(), again.to_vec()]);
    assert!(answered(
        &client.apply(vec![resource(workload("b", [10, 0, 0, 1]))], &[]),
        "/10.0.0.1"
    ));
    let removed = response(ADDRESS, Vec::new(), &["cluster//Pod/ns/b"]);
    assert_eq!(client.receive(removed).urgency, Urgency::Immediate);
    assert!(!answered(&client.0.snapshot(), "/10.0.0.1"));
}

#[test]
fn known_lookup_is_refreshed_and_stays_answered() {
    let mut client = Client::new();
    client.look_up(&["/10.96.0.1", "/10.0.0.7"]);
    let sent = [resource(service("s", [10, 96, 0, 1]))];
    client.apply(sent.to_vec(), &["/10.0.0.7"]);
    let names = ["/10.96.0.1".to_owned()];
    let requests = client.0.refresh(&lookups(&["/10.96.0.1", "/10.0.0.7"]));
    assert_eq!(changes(&requests), [names.to_vec(), names.to_vec()]);
    assert_eq!(requests[0].resource_names_unsubscribe, names);
    // The service is unchanged, and has a new endpoint.
    let [unchanged] = sent;
    let mesh =
        client.apply(vec![unchanged, resource(behind("s", workload("a", [10, 0, 0, 1])))], &[]);
    assert!(answered(&mesh, "/10.96.0.1"));
    assert_eq!(mesh.services()[0].endpoints.len(), 1);
}

#[test]
fn lookup_that_is_let_go_takes_its_resources_along() {
    let mut client = Client::new();
    client.look_up(&["/10.96.0.1", "/10.0.0.2"]);
    let mut local = workload("local", [10, 0, 0, 3]);
    local.node = "here".into();
    let endpoint = behind("s", workload("a", [10, 0, 0, 1]));
    let sent = [resource(endpoint), resource(workload("b", [10, 0, 0, 2])), resource(local)];
    client.apply([vec![resource(service("s", [10, 96, 0, 1]))], sent.to_vec()].concat(), &[]);
    let requests = client.0.let_go(&lookups(&["/10.0.0.2"]));
    let ended = ["/10.0.0.2", "cluster//Pod/ns/b"].map(str::to_owned).to_vec();
    assert_eq!(all_names(&requests), [vec![NOTHING.to_owned()], ended]);
    let mesh = client.0.snapshot();
    assert!(!answered(&mesh, "/10.0.0.2") && !mesh.has_workload("", at(2)));
    assert!(answered(&mesh, "/10.96.0.1") && mesh.has_workload("", at(1)));
    let [_, mut names] = changes(&client.0.let_go(&lookups(&["/10.96.0.1"])));
    names.sort();
    assert_eq!(names, ["/10.96.0.1", "cluster//Pod/ns/a", "ns/s"]);
    let mesh = client.0.snapshot();
    assert_eq!((mesh.size().workloads, mesh.size().services), (1, 0));
    let retained: Vec<_> = client.0.open()[0].initial_resource_versions.keys().cloned().collect();
    assert_eq!(retained, ["cluster//Pod/ns/local"]);
}

#[test]
fn lookup_of_resource_that_was_sent_is_answered() {
    let mut client = Client::new();
    client.look_up(&["/10.96.0.1"]);
    let endpoint = behind("s", workload("a", [10, 0, 0, 1]));
    client.apply(vec![resource(service("s", [10, 96, 0, 1])), resource(endpoint)], &[]);
    let name = vec!["ns/s".to_owned()];
    assert_eq!(client.look_up(&["ns/s"]), [name.clone(), name]);
    // The lookup of the address needs the subscription of the service.
    assert_eq!(client.0.let_go(&lookups(&["ns/s", "ns/never-asked"])), []);
    assert_eq!(client.0.snapshot().size().services, 1);
    client.look_up(&["ns/s"]);
    let [_, ended] = changes(&client.0.let_go(&lookups(&["ns/s", "/10.96.0.1"])));
    assert_eq!(ended, ["/10.96.0.1", "cluster//Pod/ns/a", "ns/s"], "each once");
}

#[test]
fn removed_resource_is_unsubscribed_from_unless_it_is_a_lookup() {
    let mut client = Client::new();
    client.look_up(&["/10.96.0.1", "/10.96.0.2", "ns/t"]);
    let sent = [service("s", [10, 96, 0, 1]), service("t", [10, 96, 0, 2])];
    client.apply(sent.map(resource).to_vec(), &[]);
    let removed = response(ADDRESS, Vec::new(), &["ns/s", "ns/t", "ns/unknown", NOTHING]);
    let applied = client.receive(removed);
    assert_eq!(applied.urgency, Urgency::Immediate, "a known service is removed");
    assert_eq!(changes(&applied.unsubscriptions), [no_names(), vec!["ns/s".to_owned()]]);
    assert_eq!(client.look_up(&["ns/s"]), [vec!["ns/s".to_owned()], no_names()]);
    let absent = response(ADDRESS, Vec::new(), &["ns/s"]);
    assert_eq!(client.receive(absent).unsubscriptions, []);
}

#[test]
fn no_lookup_is_name_without_resource() {
    NOTHING.parse::<crate::mesh::NetworkAddress>().unwrap_err();
    for address in ["0.0.0.0", "::", "10.0.0.1"].map(|text| text.parse().unwrap()) {
        for network in ["", "-", "-/-"] {
            assert_ne!(Lookup::address(network, address).as_str(), NOTHING);
        }
    }
    // A name of a namespace begins with a letter or digit.
    for namespace in ["", "ns", "0"] {
        let (namespace, hostname) = (namespace.into(), "-".into());
        let name = crate::mesh::NamespacedHostname { namespace, hostname };
        assert_ne!(Lookup::hostname(&name).as_str(), NOTHING);
    }
}

#[test]
fn rejected_answer_allows_no_plaintext() {
    let mut client = Client::new();
    client.look_up(&["/10.0.0.1", "/10.0.0.2"]);
    let mut legacy = workload("a", [10, 0, 0, 1]);
    legacy.tunnel_protocol = 2;
    let mut broken = encoded(ADDRESS, "cluster//Pod/ns/b", vec![0xff]);
    broken.aliases = vec!["/10.0.0.2".into()];
    let mesh = client.apply(vec![resource(legacy), broken], &[]);
    assert!(mesh.speaks_hbone("", at(1)) && answered(&mesh, "/10.0.0.1"));
    assert!(mesh.speaks_hbone("", at(2)) && answered(&mesh, "/10.0.0.2"));
}

/// A pod gets another address, and the lookup of the new one is answered by a rejected version.
#[test]
fn rejected_version_at_looked_up_address_allows_no_plaintext() {
    let mut client = Client::new();
    client.look_up(&["/10.0.0.1", "/10.0.0.2"]);
    client.apply(vec![resource(workload("a", [10, 0, 0, 1]))], &[]);
    let mut moved = workload("a", [10, 0, 0, 2]);
    moved.tunnel_protocol = 2;
    let mesh = client.apply(vec![resource(moved)], &[]);
    assert!(mesh.speaks_hbone("", at(2)) && answered(&mesh, "/10.0.0.2"));
    assert!(mesh.has_workload("", at(1)) && answered(&mesh, "/10.0.0.1"));
    // The new address needs the resource too.
    client.0.let_go(&lookups(&["/10.0.0.1"]));
    let mesh = client.0.snapshot();
    assert!(mesh.speaks_hbone("", at(2)) && answered(&mesh, "/10.0.0.2"));
    client.0.let_go(&lookups(&["/10.0.0.2"]));
    assert!(!client.0.snapshot().speaks_hbone("", at(2)));
}

#[test]
fn next_stream_asks_for_lookups_without_answer_again() {
    let mut client = Client::new();
    client.look_up(&["/10.0.0.1"]);
    let sent = resource(workload("a", [10, 0, 0, 1]));
    let version = sent.version.clone();
    client.apply(vec![sent], &[]);
    let first = client.0.open().remove(0);
    assert_eq!(first.resource_names_subscribe, ["*", "/10.0.0.1"]);
    assert_eq!(first.initial_resource_versions["cluster//Pod/ns/a"], version);
    // An unchanged resource would not be sent, and so answer no lookup.
    client.look_up(&["/10.0.0.2"]);
    let first = client.0.open().remove(0);
    assert_eq!(first.initial_resource_versions["cluster//Pod/ns/a"], "");
    assert_eq!(first.resource_names_subscribe.len(), 3);
}

/// As many lookups as a process may have, with long names.
fn long_names() -> Vec<Lookup> {
    let long = "x".repeat(240);
    let names: Vec<_> = (0..16_384).map(|n| format!("namespace/{long}{n:05}")).collect();
    lookups(&names.iter().map(|name| &**name).collect::<Vec<_>>())
}

/// As many workloads with long names, at the addresses 10.1.0.0/18.
fn long_workloads() -> Vec<Resource> {
    let long = "x".repeat(240);
    let sent = (0..16_384_u32).map(|n| {
        let [_, _, c, d] = n.to_be_bytes();
        let uid = format!("cluster//Pod/ns/{long}{n:05}");
        resource(Workload { uid, ..workload("a", [10, 1, c, d]) })
    });
    sent.collect()
}

/// Fails if a request is above a quarter of the limit of the peer.
fn assert_are_small(requests: &[DeltaRequest]) {
    let sizes: Vec<_> = requests.iter().map(prost::Message::encoded_len).collect();
    assert!(sizes.iter().all(|size| *size <= (1 << 20) + 1000), "{sizes:?}");
}

fn set(names: impl IntoIterator<Item = String>) -> BTreeSet<String> {
    names.into_iter().collect()
}

/// A long outage with many lookups and resources in use.
#[test]
fn names_of_next_stream_are_split_into_requests_of_limited_size() {
    let mut client = Client::new();
    let (names, sent) = (long_names(), long_workloads());
    let uids: Vec<_> = sent.iter().map(|one| one.name.clone()).collect();
    client.0.look_up(&names);
    client.apply(sent, &[]);
    let requests = client.0.open();
    assert_are_small(&requests);
    let [subscribed, ended] = changes(&requests);
    assert_eq!((&*ended, &*subscribed[0]), (&["*".to_owned()][..], "*"));
    assert_eq!(subscribed.len(), 2 * 16_384 + 1, "each once");
    let asked = names.iter().map(Lookup::to_string).chain(uids.iter().cloned());
    assert_eq!(set(subscribed[1..].iter().cloned()), set(asked));
    assert_eq!(requests.iter().filter(|request| request.node.is_some()).count(), 1);
    // No response is the whole state: what it lacks stays.
    client.apply(vec![resource(workload("b", [10, 0, 0, 1]))], &[&uids[0]]);
    assert_eq!(client.0.snapshot().size().workloads, 16_384);
}

#[test]
fn names_of_open_stream_are_split_into_requests_of_limited_size() {
    let mut client = Client::new();
    let names = long_names();
    let all = set(names.iter().map(Lookup::to_string));
    let asked = client.0.look_up(&names);
    assert_are_small(&asked);
    assert_eq!(changes(&asked).map(set), [all.clone(), set([])]);
    let hostname = |name: &Lookup| name.as_str().split_once('/').unwrap().1.to_owned();
    let services = names.iter().map(|name| {
        let service = service(&hostname(name), [10, 96, 0, 1]);
        resource(Service { namespace: "namespace".into(), ..service })
    });
    client.apply(services.collect(), &[]);
    let refreshed = client.0.refresh(&names);
    assert_are_small(&refreshed);
    assert_eq!(changes(&refreshed).map(set), [all.clone(), all.clone()]);
    let ends = |one: &DeltaRequest| !one.resource_names_unsubscribe.is_empty();
    assert!(refreshed.is_sorted_by_key(|one| !ends(one)), "unsubscribing comes first");
    // Resources that were sent along, and are removed.
    let sent = long_workloads();
    let uids = sent.iter().map(|one| one.name.clone()).collect::<Vec<_>>();
    client.apply(sent, &[]);
    let removed = uids.iter().map(|name| &**name).collect::<Vec<_>>();
    let removed = client.receive(response(ADDRESS, Vec::new(), &removed)).unsubscriptions;
    assert_are_small(&removed);
    assert_eq!(changes(&removed).map(set), [set([]), set(uids)]);
    let gone = client.0.let_go(&names);
    assert_are_small(&gone);
    assert_eq!(changes(&gone).map(set), [set([]), all]);
}

#[test]
fn route_depends_on_waypoints_and_gateways() {
    let gateway = |hostname: &str| GatewayAddress {
        destination: Some(GatewayDestination::Hostname(NamespacedHostname {
            namespace: "ns".into(),
            hostname: hostname.into(),
        })),
        hbone_mtls_port: 15008,
    };
    let mut client = Client::new();
    let mesh = client.apply(Vec::new(), &[]);
    let names = |mesh: &Mesh| {
        let lookups = mesh.lookups_to_address("", [10, 96, 0, 1].into());
        lookups.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(names(&mesh), ["/10.96.0.1"]);
    let mut waited = service("s", [10, 96, 0, 1]);
    waited.waypoint = Some(gateway("w"));
    let mesh = client.apply(vec![resource(waited)], &[]);
    assert_eq!(names(&mesh), ["/10.96.0.1", "ns/w"]);
    let mut far = behind("w", workload("far", [10, 0, 0, 1]));
    (far.network, far.network_gateway) = ("far".into(), Some(gateway("g")));
    let mesh = client.apply(vec![resource(service("w", [10, 96, 0, 2])), resource(far)], &[]);
    assert_eq!(names(&mesh), ["/10.96.0.1", "ns/w", "ns/g"]);
    assert!(matches!(mesh.named(&"ns/w".parse().unwrap()), Some(Destination::Service(_))));
    assert_eq!(mesh.lookups_to_name("", &"ns/w".parse().unwrap()).len(), 2);
    assert!(Mesh::default().lookups_to_address("", at(1)).is_empty());
}
