//! Tests of the meshes that result from responses of a control plane.

mod deltas;

use std::net::IpAddr;
use std::sync::Arc;

use super::super::message::Resource;
use super::super::testing::{
    IntoResource, behind, encoded, node, policy, resource, response, service, workload,
};
use super::super::workload::Workload;
use super::*;
use crate::mesh::{Connection, Destination, PolicyAction};

const ADDRESS: ResourceType = ResourceType::Address;
const POLICY: ResourceType = ResourceType::Authorization;
/// The values of `Authorization.scope` and `.action`.
const GLOBAL: i32 = 0;
const NAMESPACE: i32 = 1;
const SELECTOR: i32 = 2;
const ALLOW: i32 = 0;
const DENY: i32 = 1;

struct Client(ControlPlane);

impl Client {
    fn new() -> Self {
        Self(ControlPlane::new(node(), LocalWorkloads::default(), false))
    }

    fn apply(&mut self, kind: ResourceType, resources: Vec<Resource>, removed: &[&str]) -> Applied {
        self.0.receive(response(kind, resources, removed)).unwrap()
    }

    /// Applies an item. Returns the mesh.
    fn set<T: IntoResource>(&mut self, item: T) -> Mesh {
        let applied = self.apply(T::KIND, vec![resource(item)], &[]);
        assert_eq!(applied.rejected, []);
        self.0.snapshot()
    }

    fn remove(&mut self, kind: ResourceType, name: &str) -> Mesh {
        self.apply(kind, Vec::new(), &[name]);
        self.0.snapshot()
    }

    /// Sends a resource that is rejected for `reason`.
    fn rejected(&mut self, sent: Resource, kind: ResourceType, reason: &str) -> Mesh {
        let name = sent.name.clone();
        let applied = self.apply(kind, vec![sent], &[]);
        let [(rejected, rejection)] = &*applied.rejected else { panic!("{:?}", applied.rejected) };
        assert_eq!((&**rejected, &*rejection.to_string()), (&*name, reason));
        let detail = applied.answer.error_detail.unwrap();
        assert_eq!(detail.message, format!("{name}: {reason}"));
        self.0.snapshot()
    }
}

fn at(address: [u8; 4]) -> IpAddr {
    address.into()
}

fn endpoints(mesh: &Mesh, hostname: &str) -> Vec<String> {
    let name = format!("ns/{hostname}").parse().unwrap();
    let Some(Destination::Service(service)) = mesh.named(&name) else { return Vec::new() };
    service.endpoints.iter().map(|endpoint| endpoint.workload.name.to_string()).collect()
}

/// Whether policies allow a plaintext connection to this port of the workload.
fn allows(mesh: &Mesh, address: [u8; 4], port: u16) -> bool {
    let workload = mesh.workload("", at(address)).unwrap();
    let connection = Connection {
        source: at([192, 0, 2, 1]),
        destination: (address, port).into(),
        identity: None,
        aliases: &[],
    };
    mesh.policies(&workload.namespace, Some(workload)).layers().all(|layer| {
        let mut denying = layer.deciding(PolicyAction::Deny);
        let mut allowing = layer.deciding(PolicyAction::Allow).peekable();
        !denying.any(|policy| policy.matches(&connection))
            && (allowing.peek().is_none() || allowing.any(|policy| policy.matches(&connection)))
    })
}

#[test]
fn accepts_references_in_any_order() {
    let mut client = Client::new();
    let mesh = client.set(behind("s", workload("a", [10, 0, 0, 1])));
    assert_eq!(mesh.workload("", at([10, 0, 0, 1])).unwrap().to_string(), "ns/a");
    assert_eq!(endpoints(&mesh, "s"), [""; 0]);
    let mesh = client.set(service("s", [10, 96, 0, 1]));
    assert_eq!(endpoints(&mesh, "s"), ["a"]);
    let found = mesh.service("", at([10, 96, 0, 1]), "ns").unwrap();
    assert_eq!(found.endpoints[0].ports.get(80), Some(8080));
    let mesh = client.set(behind("s", workload("b", [10, 0, 0, 2])));
    assert_eq!(endpoints(&mesh, "s"), ["a", "b"]);
    let mesh = client.remove(ADDRESS, "cluster//Pod/ns/a");
    assert_eq!(endpoints(&mesh, "s"), ["b"]);
    assert!(!mesh.has_workload("", at([10, 0, 0, 1])));
    // The service is removed and added again. Its endpoints stay known.
    let mesh = client.remove(ADDRESS, "ns/s");
    assert!(mesh.service("", at([10, 96, 0, 1]), "ns").is_none());
    assert_eq!(endpoints(&client.set(service("s", [10, 96, 0, 9])), "s"), ["b"]);
    assert_eq!(mesh.size().services, 0);
}

#[test]
fn earlier_snapshot_and_unchanged_services_stay() {
    let mut client = Client::new();
    client.set(service("s", [10, 96, 0, 1]));
    client.set(service("t", [10, 96, 0, 2]));
    let before = client.set(behind("s", workload("a", [10, 0, 0, 1])));
    let after = client.set(behind("s", workload("b", [10, 0, 0, 2])));
    assert_eq!((endpoints(&before, "s").len(), endpoints(&after, "s").len()), (1, 2));
    let [_, untouched] = *before.services() else { panic!("two services") };
    assert!(Arc::ptr_eq(untouched, after.services()[1]));
}

#[test]
fn snapshot_names_addresses_that_differ_from_previous_one() {
    let touched = |new: &Mesh, old: &Mesh| {
        let mut all: Vec<_> = new.touched_since(old)?.map(ToString::to_string).collect();
        all.sort();
        Some(all)
    };
    let mut client = Client::new();
    let first = client.set(service("s", [10, 96, 0, 1]));
    let second = client.set(behind("s", workload("a", [10, 0, 0, 1])));
    assert_eq!(touched(&second, &first).unwrap(), ["/10.0.0.1", "/10.96.0.1"]);
    client.apply(ADDRESS, vec![resource(workload("b", [10, 0, 0, 2]))], &[]);
    client.0.index();
    let third = client.set(workload("b", [10, 0, 0, 3]));
    assert_eq!(touched(&third, &second).unwrap(), ["/10.0.0.2", "/10.0.0.3"]);
    assert_eq!(touched(&third, &first), None, "not the previous one");
    assert_eq!(touched(&second, &third), None, "older");
    let fourth = client.set(policy("p", NAMESPACE, DENY));
    assert_eq!(touched(&fourth, &third).unwrap(), [""; 0]);
    let file = fourth.with_fallback(Some(Arc::new(Mesh::default())));
    assert_eq!(touched(&file, &third), None, "another file");
    let mut range = service("r", [10, 97, 0, 0]);
    range.addresses[0].length = Some(16);
    assert_eq!(touched(&client.set(range), &fourth), None);
    let many = (0..2000_u32).map(|n| {
        let [_, _, c, d] = n.to_be_bytes();
        resource(workload(&n.to_string(), [10, 1, c, d]))
    });
    let before = client.0.snapshot();
    client.apply(ADDRESS, many.collect(), &[]);
    assert_eq!(touched(&client.0.snapshot(), &before), None);
}

#[test]
fn moved_workload_leaves_its_old_address_and_service() {
    let mut client = Client::new();
    client.set(service("s", [10, 96, 0, 1]));
    client.set(service("t", [10, 96, 0, 2]));
    client.set(behind("s", workload("a", [10, 0, 0, 1])));
    let mesh = client.set(behind("t", workload("a", [10, 0, 0, 2])));
    assert!(!mesh.has_workload("", at([10, 0, 0, 1])));
    assert_eq!([endpoints(&mesh, "s").len(), endpoints(&mesh, "t").len()], [0, 1]);
    assert_eq!((mesh.size().workloads, mesh.workloads_named("ns", "a").len()), (1, 1));
}

/// A new pod gets the address of one that is not removed yet.
#[test]
fn address_of_two_workloads_denotes_newer_one() {
    let mut client = Client::new();
    client.set(workload("old", [10, 0, 0, 1]));
    let mesh = client.set(workload("new", [10, 0, 0, 1]));
    assert_eq!(&*mesh.workload("", at([10, 0, 0, 1])).unwrap().name, "new");
    let mesh = client.remove(ADDRESS, "cluster//Pod/ns/old");
    assert_eq!(&*mesh.workload("", at([10, 0, 0, 1])).unwrap().name, "new");
}

#[test]
fn missing_policy_of_workload_denies_everything() {
    let mut client = Client::new();
    let mut selected = workload("a", [10, 0, 0, 1]);
    selected.authorization_policies = vec!["ns/p".into()];
    let mesh = client.set(selected);
    assert!(!allows(&mesh, [10, 0, 0, 1], 80) && !allows(&mesh, [10, 0, 0, 1], 81));
    let mesh = client.set(policy("p", SELECTOR, ALLOW));
    assert!(allows(&mesh, [10, 0, 0, 1], 80) && !allows(&mesh, [10, 0, 0, 1], 81));
    let mesh = client.set(policy("p", SELECTOR, DENY));
    assert!(!allows(&mesh, [10, 0, 0, 1], 80) && allows(&mesh, [10, 0, 0, 1], 81));
    let mesh = client.remove(POLICY, "ns/p");
    assert!(!allows(&mesh, [10, 0, 0, 1], 81));
}

#[test]
fn policy_applies_to_its_scope() {
    let mut client = Client::new();
    client.set(workload("a", [10, 0, 0, 1]));
    client.set(Workload { namespace: "far".into(), ..workload("b", [10, 0, 0, 2]) });
    for scope in [GLOBAL, NAMESPACE] {
        let mesh = client.set(policy("p", scope, DENY));
        assert_eq!([80, 81].map(|port| allows(&mesh, [10, 0, 0, 1], port)), [false, true]);
        let far = mesh.workload("", at([10, 0, 0, 2])).map(|one| &**one);
        let of_far = mesh.policies("far", far);
        assert_eq!(of_far.iter().count(), usize::from(scope == GLOBAL));
    }
    let mesh = client.set(policy("p", SELECTOR, DENY));
    assert!(allows(&mesh, [10, 0, 0, 1], 80));
    assert_eq!(mesh.size().policies, 1);
}

#[test]
fn rejected_policy_keeps_accepted_version_or_denies() {
    let mut client = Client::new();
    client.set(workload("a", [10, 0, 0, 1]));
    client.set(policy("p", NAMESPACE, DENY));
    let mut unsupported = policy("p", NAMESPACE, 7);
    let mesh =
        client.rejected(resource(unsupported.clone()), POLICY, "action: unsupported value 7");
    assert_eq!([80, 81].map(|port| allows(&mesh, [10, 0, 0, 1], port)), [false, true]);
    // Without an accepted version.
    unsupported.name = "q".into();
    let mesh = client.rejected(resource(unsupported), POLICY, "action: unsupported value 7");
    assert_eq!([80, 81].map(|port| allows(&mesh, [10, 0, 0, 1], port)), [false, false]);
    let mesh = client.remove(POLICY, "ns/q");
    assert!(allows(&mesh, [10, 0, 0, 1], 81));
    // The scope of an unreadable policy is unknown too.
    let truncated = encoded(POLICY, "far/r", vec![0x0a, 200]);
    let reason =
        "cannot be decoded: failed to decode Protobuf message: Authorization.name: invalid varint";
    let mesh = client.rejected(truncated, POLICY, reason);
    assert!(!allows(&mesh, [10, 0, 0, 1], 81));
    let mut known = policy("r", NAMESPACE, DENY);
    known.namespace = "far".into();
    assert!(allows(&client.set(known), [10, 0, 0, 1], 81));
}

#[test]
fn rejected_dry_run_policy_denies_nothing() {
    let mut client = Client::new();
    client.set(workload("a", [10, 0, 0, 1]));
    let mut unsupported = policy("p", NAMESPACE, 7);
    unsupported.dry_run = true;
    let mesh = client.rejected(resource(unsupported), POLICY, "action: unsupported value 7");
    assert!(allows(&mesh, [10, 0, 0, 1], 80));
}

#[test]
fn policy_with_unknown_field_is_rejected() {
    let mut client = Client::new();
    client.set(workload("a", [10, 0, 0, 1]));
    // Field 14 in a match, in rules, in a group, in the policy.
    let unknown = [0x72, 1, b'x'];
    let nested = |number: u8, content: Vec<u8>| {
        let length = u8::try_from(content.len()).unwrap();
        [vec![number << 3 | 2, length], content].concat()
    };
    let content = |depth: usize| {
        let levels = [5, 1, 2];
        let body = levels.iter().take(depth).rev();
        body.fold(unknown.to_vec(), |content, number| nested(*number, content))
    };
    for depth in 0..=3 {
        let mut sent = policy("p", NAMESPACE, ALLOW);
        sent.groups.clear();
        let sent = [sent.encode_to_vec(), content(depth)].concat();
        let mesh = client.rejected(encoded(POLICY, "ns/p", sent), POLICY, "unknown field 14");
        assert!(!allows(&mesh, [10, 0, 0, 1], 80), "{depth}");
    }
}

#[test]
fn rejected_workload_keeps_accepted_version_or_withholds_address() {
    const REASON: &str = "tunnel_protocol: unsupported value 2";
    let mut client = Client::new();
    let legacy = |name: &str, address| {
        let mut legacy = workload(name, address);
        legacy.tunnel_protocol = 2;
        resource(legacy)
    };
    let mut plain = workload("a", [10, 0, 0, 1]);
    plain.tunnel_protocol = 0;
    client.set(plain);
    let mesh = client.rejected(legacy("a", [10, 0, 0, 1]), ADDRESS, REASON);
    assert!(mesh.has_workload("", at([10, 0, 0, 1])) && !mesh.speaks_hbone("", at([10, 0, 0, 1])));
    // Connections to an unknown address would be in plaintext.
    let mesh = client.rejected(legacy("b", [10, 0, 0, 2]), ADDRESS, REASON);
    assert!(mesh.workload("", at([10, 0, 0, 2])).is_none());
    assert!(mesh.speaks_hbone("", at([10, 0, 0, 2])));
    let mesh = client.rejected(legacy("b", [10, 0, 0, 3]), ADDRESS, REASON);
    assert_eq!([2, 3].map(|n| mesh.speaks_hbone("", at([10, 0, 0, n]))), [false, true]);
    assert_eq!(client.0.rejected().len(), 2, "both");
    let mesh = client.remove(ADDRESS, "cluster//Pod/ns/b");
    assert!(!mesh.speaks_hbone("", at([10, 0, 0, 3])));
    let listed: Vec<_> = client.0.rejected().map(|(_, name, _)| name.to_string()).collect();
    assert_eq!(listed, ["cluster//Pod/ns/a"]);
    client.rejected(legacy("b", [10, 0, 0, 2]), ADDRESS, REASON);
    let mut plain = workload("b", [10, 0, 0, 2]);
    plain.tunnel_protocol = 0;
    assert!(!client.set(plain).speaks_hbone("", at([10, 0, 0, 2])));
    assert_eq!(client.0.rejected().len(), 1, "an accepted version replaces the rejected one");
}

#[test]
fn rejected_version_withholds_its_further_addresses() {
    let mut client = Client::new();
    let accepted = workload("a", [10, 0, 0, 1]);
    let mut moved = Workload { tunnel_protocol: 2, ..accepted.clone() };
    moved.addresses.extend(workload("a", [10, 0, 0, 2]).addresses);
    let reject = |client: &mut Client| {
        let sent = resource(moved.clone());
        client.rejected(sent, ADDRESS, "tunnel_protocol: unsupported value 2")
    };
    client.set(Workload { tunnel_protocol: 0, ..accepted.clone() });
    let mesh = reject(&mut client);
    assert!(mesh.has_workload("", at([10, 0, 0, 1])));
    assert_eq!([1, 2].map(|n| mesh.speaks_hbone("", at([10, 0, 0, n]))), [false, true]);
    // The accepted version again, and a new one.
    let mesh = client.set(Workload { tunnel_protocol: 0, ..accepted.clone() });
    assert!(!mesh.speaks_hbone("", at([10, 0, 0, 2])));
    reject(&mut client);
    assert!(!client.set(accepted).speaks_hbone("", at([10, 0, 0, 2])));
    let mut unknown = service("s", [10, 96, 0, 2]);
    unknown.visibility = 9;
    client.set(service("s", [10, 96, 0, 1]));
    let reason = "visibility: unsupported value 9";
    let mesh = client.rejected(resource(unknown), ADDRESS, reason);
    assert!(
        mesh.speaks_hbone("", at([10, 96, 0, 2])) && !mesh.speaks_hbone("", at([10, 96, 0, 1]))
    );
    assert!(!client.remove(ADDRESS, "ns/s").speaks_hbone("", at([10, 96, 0, 2])));
}

/// Cilium names workloads by the UID of the pod, which an older version did not record.
#[test]
fn workloads_without_names_are_rejected_and_withhold_their_addresses() {
    let mut client = Client::new();
    let sent = |workload| Resource { version: String::new(), ..resource(workload) };
    let nameless = |host| sent(Workload { uid: String::new(), ..workload("a", [10, 0, 0, host]) });
    let usable = || sent(workload("b", [10, 0, 0, 3]));
    let applied = client.apply(ADDRESS, vec![nameless(1), nameless(2), usable()], &[]);
    let reasons: Vec<_> = applied.rejected.iter().map(|(_, reason)| reason.to_string()).collect();
    assert_eq!(reasons, ["has no name", "has no name"]);
    let mesh = client.0.snapshot();
    assert_eq!(mesh.size().workloads, 1);
    assert!((1..=3).all(|host| mesh.speaks_hbone("", at([10, 0, 0, host]))));
    // The whole state of the next stream has their names.
    client.0.open();
    client.apply(ADDRESS, vec![sent(workload("a", [10, 0, 0, 1])), usable()], &[]);
    client.apply(POLICY, Vec::new(), &[]);
    let mesh = client.0.snapshot();
    assert!(mesh.has_workload("", at([10, 0, 0, 1])) && !mesh.speaks_hbone("", at([10, 0, 0, 2])));
}

#[test]
fn rejected_service_withholds_address() {
    let mut client = Client::new();
    let mut unknown = service("s", [10, 96, 0, 1]);
    unknown.visibility = 9;
    let reason = "visibility: unsupported value 9";
    let mesh = client.rejected(resource(unknown), ADDRESS, reason);
    assert!(mesh.speaks_hbone("", at([10, 96, 0, 1])));
    let mesh = client.set(service("s", [10, 96, 0, 1]));
    assert!(!mesh.speaks_hbone("", at([10, 96, 0, 1])));
}

#[test]
fn rejected_service_withholds_whole_range() {
    let mut client = Client::new();
    let mut unknown = service("s", [10, 96, 0, 7]);
    unknown.addresses[0].length = Some(24);
    unknown.visibility = 9;
    let reason = "visibility: unsupported value 9";
    let mesh = client.rejected(resource(unknown.clone()), ADDRESS, reason);
    let withheld = [[10, 96, 0, 0], [10, 96, 0, 255], [10, 96, 1, 0], [10, 95, 255, 255]]
        .map(|address| mesh.speaks_hbone("", at(address)));
    assert_eq!(withheld, [true, true, false, false]);
    // A prefix length that no address has.
    unknown.addresses[0].length = Some(99);
    let mesh =
        client.rejected(resource(unknown), ADDRESS, "addresses.length: unsupported value 99");
    assert!(mesh.speaks_hbone("", at([10, 96, 0, 7])));
    assert!(!mesh.speaks_hbone("", at([10, 96, 0, 8])));
    let mesh = client.remove(ADDRESS, "ns/s");
    assert!(!mesh.speaks_hbone("", at([10, 96, 0, 7])));
}

#[test]
fn rejects_resource_with_name_of_another() {
    let mut client = Client::new();
    let other = Resource { name: "x".into(), ..resource(workload("a", [10, 0, 0, 1])) };
    client.rejected(other, ADDRESS, "its content is named cluster//Pod/ns/a");
    let other = Resource { name: "ns/x".into(), ..resource(policy("p", NAMESPACE, DENY)) };
    client.rejected(other, POLICY, "its content is named ns/p");
}

#[test]
fn policies_and_local_workloads_are_urgent() {
    let local =
        LocalWorkloads { node: Some("here".into()), named: Some(("ns".into(), "own".into())) };
    let mut client = Client(ControlPlane::new(node(), local, false));
    let mut on_node = workload("a", [10, 0, 0, 1]);
    on_node.node = "here".into();
    let moved = workload("a", [10, 0, 0, 4]);
    for (item, urgent) in [
        (on_node, true),
        (moved.clone(), true),
        (moved, false),
        (workload("own", [10, 0, 0, 2]), true),
        (workload("b", [10, 0, 0, 3]), false),
    ] {
        assert_eq!(
            client.apply(ADDRESS, vec![resource(item)], &[]).urgency == Urgency::Immediate,
            urgent
        );
    }
    for (removed, urgent) in [("own", true), ("own", false), ("b", false)] {
        let uid = format!("cluster//Pod/ns/{removed}");
        assert_eq!(
            client.apply(ADDRESS, Vec::new(), &[&uid]).urgency == Urgency::Immediate,
            urgent,
            "{removed}"
        );
    }
    assert_eq!(
        client.apply(POLICY, vec![resource(policy("p", NAMESPACE, DENY))], &[]).urgency,
        Urgency::Immediate
    );
    assert_eq!(client.apply(POLICY, Vec::new(), &["ns/p"]).urgency, Urgency::Immediate);
}

/// The mesh file adds items that the control plane does not have.
#[test]
fn control_plane_precedes_file_and_both_must_allow() {
    let file = "workloads:
- {name: a, namespace: ns, workloadIps: [10.0.0.1, 10.0.0.9]}
- {name: f, namespace: ns, workloadIps: [10.0.0.2], protocol: HBONE, authorizationPolicies: [ns/seven]}
services: [{hostname: f, namespace: ns, vips: [/10.96.0.1, /10.96.0.2]}]
policies:
- {name: allow, namespace: ns, scope: Namespace, action: Allow, rules: [[[{destinationPorts: [80, 81, 7]}]]]}
- {name: seven, namespace: ns, scope: WorkloadSelector, action: Allow, rules: [[[{destinationPorts: [7]}]]]}
";
    let file = Arc::new(Mesh::from_text("mesh", file).unwrap());
    let mut client = Client::new();
    client.set(workload("a", [10, 0, 0, 1]));
    client.set(service("s", [10, 96, 0, 1]));
    let mesh = client.set(policy("p", NAMESPACE, ALLOW)).with_fallback(Some(file));
    assert!(mesh.speaks_hbone("", at([10, 0, 0, 1])));
    assert_eq!(&*mesh.service("", at([10, 96, 0, 1]), "ns").unwrap().name, "s");
    assert_eq!(&*mesh.service("", at([10, 96, 0, 2]), "ns").unwrap().name, "f");
    assert_eq!(&*mesh.workload("", at([10, 0, 0, 2])).unwrap().name, "f");
    assert_eq!(mesh.workloads_named("ns", "a")[0].addresses.len(), 1);
    assert_eq!(mesh.workloads_named("ns", "f").len(), 1);
    // The control plane allows 80 only, and the file does not add 81. The control plane may have
    // policies for the file's workload that it has not sent yet.
    let ports = [80, 81, 7];
    assert_eq!(ports.map(|port| allows(&mesh, [10, 0, 0, 1], port)), [true, false, false]);
    assert_eq!(ports.map(|port| allows(&mesh, [10, 0, 0, 2], port)), [false, false, false]);
}

/// The policy of a selector may exist before the control plane sends the workload.
#[test]
fn workload_that_control_plane_has_not_sent_is_denied() {
    let connection = Connection {
        source: at([192, 0, 2, 1]),
        destination: ([10, 0, 0, 1], 80).into(),
        identity: None,
        aliases: &[],
    };
    let denies = |mesh: &Mesh, own: Option<&crate::mesh::Workload>| {
        let mut layers = mesh.policies("ns", own).layers();
        layers.any(|layer| layer.deciding(PolicyAction::Deny).any(|one| one.matches(&connection)))
    };
    let mut client = Client::new();
    let mesh = client.set(policy("p", SELECTOR, DENY));
    assert!(denies(&mesh, None) && !mesh.has_policies_of(None));
    let mesh = client.set(workload("a", [10, 0, 0, 1]));
    let own = mesh.workload("", at([10, 0, 0, 1])).unwrap();
    assert!(!denies(&mesh, Some(own)) && mesh.has_policies_of(Some(own)));
    let file = Mesh::default();
    assert!(!denies(&file, None) && file.has_policies_of(None));
}
