//! Tests of policy decisions on new connections, and on open ones when the mesh changes.

use underpass_config::{ControlPlane, DeltaResponse, LocalWorkloads, Mesh, Node, ResourceType};

use super::*;
use crate::decide::connection_registry::{ConnectionRegistry, Terminated};
use crate::decide::subject::Principal;
use crate::node::testing::{self, pod, workload_resource};

const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";

fn context(more: &[&str]) -> PolicyContext {
    PolicyContext::new(&testing::settings(more))
}

fn snapshot(generation: u64, policies: &str) -> Snapshot {
    let text = format!(
        "workloads:\n\
         - {{name: server, workloadIps: [10.0.0.1], protocol: HBONE, serviceAccount: server}}\n\
         - {{name: plain, workloadIps: [10.0.0.2]}}\n\
         services:\n\
         - {{name: web, namespace: default, hostname: web.example, vips: [/10.96.0.1], ports: {{80: 80}}}}\n\
         policies: [{policies}]\n"
    );
    let mesh = Mesh::from_text("mesh", &text).expect("a mesh");
    Snapshot::new(Arc::new(mesh), &context(&[]).own, generation)
}

fn policy(action: &str, rules: &str) -> String {
    format!(
        "{{name: p, namespace: default, scope: Namespace, action: {action}, dryRun: false, rules: {rules}}}"
    )
}

fn deny_client() -> String {
    policy("Deny", "[[[{principals: [{exact: cluster.local/ns/default/sa/client}]}]]]")
}

fn at(address: &str) -> SocketAddr {
    address.parse().expect("an address")
}

fn from_client() -> Subject {
    from_peer(CLIENT, &[])
}

fn from_peer(id: &str, aliases: &[&str]) -> Subject {
    let principal = Principal {
        id: id.parse().expect("an id"),
        aliases: aliases.iter().map(|alias| alias.parse().expect("a trust domain")).collect(),
    };
    Subject::inbound(at("10.0.0.9:40000"), at("10.0.0.1:8080"), Some(principal))
}

fn in_plain(source: &str) -> Subject {
    Subject::inbound(at(source), at("10.0.0.1:8080"), None)
}

fn outbound(asked: &str, hop: &str, peers: Option<&[&str]>) -> Subject {
    let ids = |peers: &[&str]| peers.iter().map(|id| id.parse().expect("an id")).collect();
    Subject::Outbound(Outbound {
        asked: at(asked),
        hop: at(hop),
        peers: peers.map(ids),
        by_address: true,
    })
}

fn decided(subject: &Subject, settings: &[&str]) -> Result<(), &'static str> {
    let checked = check(subject, &snapshot(1, ""), &context(settings)).map(drop);
    checked.map_err(|error| error.reason().code)
}

#[test]
fn refuses_connections_to_own_listeners() {
    for port in [15001, 15006, 15008] {
        let to = SocketAddr::new(at("10.0.0.1:1").ip(), port);
        let inbound = Subject::inbound(at("10.0.0.9:1"), to, None);
        assert_eq!(decided(&inbound, &[]), Err("own_listener"), "{port}");
        let loopback = format!("127.0.0.1:{port}");
        assert_eq!(decided(&outbound(&loopback, &loopback, None), &[]), Err("own_listener"));
        let other_pod = format!("10.0.0.2:{port}");
        assert_eq!(decided(&outbound(&other_pod, &other_pod, None), &[]), Ok(()));
    }
}

#[test]
fn hbone_workload_is_reached_only_by_tunnel_with_its_identity() {
    let (service, server) = ("10.96.0.1:80", "10.0.0.1:80");
    assert_eq!(decided(&outbound(server, server, None), &[]), Err("plaintext_to_hbone"));
    assert_eq!(decided(&outbound(service, server, None), &[]), Err("plaintext_to_hbone"));
    let own = [
        "spiffe://cluster.local/ns/default/sa/other",
        "spiffe://cluster.local/ns/default/sa/server",
    ];
    assert_eq!(decided(&outbound(service, "10.0.0.1:15008", Some(&own)), &[]), Ok(()));
    let others = Some(&own[..1]);
    assert_eq!(decided(&outbound(service, "10.0.0.1:15008", others), &[]), Err("other_identity"));
}

#[test]
fn mesh_only_egress_reaches_mesh_and_exceptions_only() {
    let mesh_only = ["egress=mesh-only"];
    let excepted =
        ["egress=mesh-only", "egress_exceptions.cidrs=192.0.2.0/24", "egress_exceptions.ports=53"];
    for (asked, hop, settings, expected) in [
        ("192.0.2.1:443", "192.0.2.1:443", &[][..], Ok(())),
        ("192.0.2.1:443", "192.0.2.1:443", &mesh_only, Err("egress_denied")),
        ("10.0.0.2:443", "10.0.0.2:443", &mesh_only, Ok(())),
        ("10.96.0.1:80", "192.0.2.1:80", &mesh_only, Ok(())),
        ("192.0.2.1:443", "192.0.2.1:443", &excepted, Ok(())),
        ("198.51.100.1:53", "198.51.100.1:53", &excepted, Ok(())),
        ("198.51.100.1:54", "198.51.100.1:54", &excepted, Err("egress_denied")),
    ] {
        assert_eq!(
            decided(&outbound(asked, hop, None), settings),
            expected,
            "{asked} {settings:?}"
        );
    }
}

#[test]
fn strict_mtls_refuses_plaintext_except_probes_and_overrides() {
    let strict = ["proxy.mtls=strict"];
    let by_port = ["proxy.mtls=strict", "proxy.mtls_overrides=default/server:8080=permissive"];
    assert_eq!(decided(&in_plain("10.0.0.9:1"), &[]), Ok(()));
    assert_eq!(decided(&in_plain("10.0.0.9:1"), &strict), Err("plaintext_refused"));
    assert_eq!(decided(&in_plain("169.254.7.127:1"), &strict), Err("plaintext_refused"));
    assert_eq!(decided(&in_plain("10.0.0.9:1"), &by_port), Ok(()));
    assert_eq!(decided(&from_client(), &strict), Ok(()));
}

#[test]
fn matching_allow_policy_is_returned() {
    let subject = from_peer("spiffe://cluster.local/ns/default/sa/client", &[]);
    let allowed_by = |mesh: &str| {
        let policy = check(&subject, &snapshot(1, mesh), &context(&[])).unwrap();
        policy.map(|policy| policy.to_string())
    };
    assert_eq!(allowed_by(""), None);
    let allow = policy("Allow", "[[[]]]");
    assert!(
        allowed_by(&allow).is_some_and(|name| allow.contains(name.rsplit('/').next().unwrap()))
    );
}

#[test]
fn deny_policy_by_principal_applies_to_peer_under_trust_domain_alias() {
    let decided = |context: &PolicyContext, action: &str, principal: &str| {
        let rule = format!("[[[{{principals: [{{exact: {principal}}}]}}]]]");
        let subject = from_peer("spiffe://old/ns/default/sa/client", &["cluster.local", "old"]);
        check(&subject, &snapshot(1, &policy(action, &rule)), context)
            .map(drop)
            .map_err(|error| error.reason().code)
    };
    let context = context(&[]);
    for domain in ["cluster.local", "old"] {
        let principal = format!("{domain}/ns/default/sa/client");
        assert_eq!(decided(&context, "Deny", &principal), Err("policy_denied"), "{domain}");
        assert_eq!(decided(&context, "Allow", &principal), Ok(()), "{domain}");
    }
    let foreign = "other/ns/default/sa/client";
    assert_eq!(decided(&context, "Deny", foreign), Ok(()));
    assert_eq!(decided(&context, "Allow", foreign), Err("policy_denied"));
}

#[test]
fn strict_mtls_admits_probes_only_to_exempt_ports() {
    let with = |probes| ["proxy.mtls=strict", probes];
    for source in ["169.254.7.127:1", "[fd16:9254:7127:1337:ffff:ffff:ffff:ffff]:1"] {
        let probe = in_plain(source);
        assert_eq!(decided(&probe, &with("interception.kubelet_probes=on")), Ok(()));
        assert_eq!(decided(&probe, &with("interception.kubelet_probes=8080")), Ok(()));
        for refused in ["interception.kubelet_probes=off", "interception.kubelet_probes=8081"] {
            assert_eq!(decided(&probe, &with(refused)), Err("plaintext_refused"), "{refused}");
        }
    }
    let other = in_plain("169.254.7.128:1");
    let on = with("interception.kubelet_probes=on");
    assert_eq!(decided(&other, &on), Err("plaintext_refused"));
}

#[test]
fn unknown_local_address_gets_policies_of_own_workload() {
    let selected = "workloads:\n- {name: server, workloadIps: [10.0.0.1], authorizationPolicies: [default/p]}\n\
                    policies: [{name: p, namespace: default, scope: WorkloadSelector, action: Deny, dryRun: false, rules: [[]]}]\n";
    let mesh = Mesh::from_text("mesh", selected).expect("a mesh");
    let context = context(&[]);
    let snapshot = Snapshot::new(Arc::new(mesh), &context.own, 1);
    for address in ["10.0.0.1:80", "10.99.0.1:80", "[fd00::1]:80"] {
        let subject = Subject::inbound(at("10.0.0.9:1"), at(address), None);
        let denied = check(&subject, &snapshot, &context).map_err(|error| error.reason().code);
        assert_eq!(denied, Err("policy_denied"), "{address}");
    }
}

fn after(old: &Snapshot, new: &Snapshot, since: u64) -> Result<(), &'static str> {
    let context = context(&[]);
    let decision = Decision::permitted(Permitted { subject: from_client(), generation: since });
    let checked = MeshChange::new(old, new, &context).check(&decision);
    checked.map_err(|error| error.reason().code)
}

#[test]
fn mesh_change_terminates_connection_that_it_forbids() {
    let (open, closed) = (snapshot(1, ""), snapshot(2, &deny_client()));
    assert_eq!(after(&open, &closed, 1), Err("policy_denied"));
    assert_eq!(after(&open, &snapshot(2, &policy("Allow", "[[]]")), 1), Ok(()));
}

#[test]
fn connection_permitted_by_skipped_generation_is_decided_again() {
    // The second generation allowed it; the first and the third forbid it. A worker may skip the
    // second.
    let (first, third) = (snapshot(1, &deny_client()), snapshot(3, &deny_client()));
    assert_eq!(after(&first, &third, 2), Err("policy_denied"));
}

#[test]
fn unrelated_mesh_change_does_not_check_connection_again() {
    // The old mesh already denies it, so a check against the new one would refuse it.
    let (old, new) = (snapshot(1, &deny_client()), snapshot(2, &deny_client()));
    assert_eq!(after(&old, &new, 1), Ok(()));
}

#[test]
fn mesh_change_skips_connection_permitted_by_newer_generation() {
    // Generation 3 permits the connection; generation 2, which forbids it, is still being enforced.
    let (first, second) = (snapshot(1, ""), snapshot(2, &deny_client()));
    assert_eq!(after(&first, &second, 3), Ok(()));
    assert_eq!(after(&first, &second, 2), Ok(()));
}

/// The number of connections of a pod that a change terminates.
async fn terminated(pod: &Pod, old: &Snapshot, new: &Snapshot) -> usize {
    let (mut change, mut terminated) =
        (MeshChange::new(old, new, &pod.context), Terminated::default());
    pod.connections
        .for_worker(0)
        .terminate(&mut terminated, |decision| change.check(decision))
        .await;
    terminated.count()
}

#[tokio::test]
async fn registered_connection_stores_its_permit() {
    let (old, new) = (Arc::new(snapshot(1, "")), Arc::new(snapshot(2, &deny_client())));
    let (sender, mesh) = watch::channel(old.clone());
    let pod = pod(&[]);
    let registration = pod.connections.for_worker(0).register(Decision::default());
    assert_eq!(terminated(&pod, &old, &new).await, 0, "it has no permit yet");
    let allowed = permit(from_client(), &pod, &mesh, &registration).expect("a permit");
    assert_eq!(allowed.destination(), at("10.0.0.1:8080"));
    assert_eq!(terminated(&pod, &old, &new).await, 1);
    sender.send_replace(new);
    let later = pod.connections.for_worker(0).register(Decision::default());
    let denied = permit(from_client(), &pod, &mesh, &later).map(drop);
    assert!(matches!(denied, Err(ProxyError::Denied(_))), "{denied:?}");
}

/// The snapshots of a control plane before and after a change of the workload at `10.0.0.HOST`.
fn control_plane_change(host: u8) -> [Snapshot; 2] {
    let (context, kind) = (context(&[]), ResourceType::Address);
    let mut plane = ControlPlane::new(Node::default(), LocalWorkloads::default(), false);
    let mut next = |generation| {
        let response = DeltaResponse {
            type_url: kind.url().to_owned(),
            resources: vec![workload_resource(host).into()],
            ..DeltaResponse::default()
        };
        if generation > 1 {
            plane.receive(response).expect("a response");
        }
        Snapshot::new(Arc::new(plane.snapshot()), &context.own, generation)
    };
    [1, 2].map(&mut next)
}

#[test]
fn change_concerns_only_connections_to_its_addresses() {
    let registry = Arc::<ConnectionRegistry<Decision>>::default();
    let outbound = |asked: &str, hop: &str| {
        let subject = Outbound { asked: at(asked), hop: at(hop), peers: None, by_address: true };
        let permitted = Permitted { subject: Subject::Outbound(subject), generation: 1 };
        registry.register(Decision::permitted(permitted))
    };
    let _open = [
        outbound("10.0.0.1:80", "10.0.0.1:80"),
        outbound("10.96.0.1:80", "10.0.0.2:80"),
        outbound("10.0.0.2:80", "10.0.0.3:80"),
        registry.register(Decision::permitted(Permitted { subject: from_client(), generation: 1 })),
    ];
    let context = context(&[]);
    let concerned = |old: &Snapshot, new: &Snapshot| {
        let keys = registry.find(|index| MeshChange::new(old, new, &context).concerned(index));
        keys.map(|mut keys| {
            keys.sort_unstable();
            keys
        })
    };
    let [old, new] = control_plane_change(2);
    assert_eq!(concerned(&old, &new), Some(vec![1, 2]));
    let [old, mut new] = control_plane_change(9);
    assert_eq!(concerned(&old, &new), Some(vec![]));
    new.generation = 3;
    assert_eq!(concerned(&old, &new), None, "a skipped generation");
    assert_eq!(concerned(&snapshot(1, ""), &snapshot(2, "")), None, "files");
}

/// Both pods have the same address, in two namespaces.
#[tokio::test]
async fn mesh_change_is_checked_separately_for_each_pod() {
    let (old, new) = (Arc::new(snapshot(1, "")), snapshot(2, &deny_client()));
    let (_sender, mesh) = watch::channel(old.clone());
    let pods = [pod(&[]), pod(&["workload.namespace=other", "workload.name=other"])];
    let registrations = pods.each_ref().map(|pod| {
        let client = Principal { id: CLIENT.parse().expect("an id"), aliases: Arc::default() };
        let subject = Subject::inbound(at("10.0.0.9:40000"), at("192.0.2.1:80"), Some(client));
        let registration = pod.connections.for_worker(0).register(Decision::default());
        let permit = permit(subject, pod, &mesh, &registration).expect("a permit");
        assert_eq!(permit.pod().id, pod.id);
        registration
    });
    assert_eq!(terminated(&pods[0], &old, &new).await, 1);
    assert_eq!(
        terminated(&pods[1], &old, &new).await,
        0,
        "the policy applies to the first pod's namespace"
    );
    drop(registrations);
}
