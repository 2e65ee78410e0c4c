//! A table of policies, certificates and settings: a pod of the node is reached without a tunnel
//! exactly when it is reached by a tunnel, with equal records and metrics.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use tokio::io::AsyncWriteExt as _;
use underpass_tests::{
    APP, End, Family, Listener, Mesh, Pki, Settings, Suite, exchange, read_to_end,
};

use crate::scene::{AccessLog, MODES, Scene, since};

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test_both("policies have the same effect with and without a tunnel", policies);
    suite.test("certificates have the same effect with and without a tunnel", certificates);
    suite.test("settings have the same effect with and without a tunnel", settings);
    suite.test(
        "routes by a service or through a waypoint are the same with and without a tunnel",
        routes,
    );
    suite.test(
        "a connection to a pod that is missing in the mesh uses a tunnel",
        pod_missing_in_mesh,
    );
}

/// The observable facts of one connection.
#[derive(Debug, PartialEq, Eq)]
struct Observed {
    reached: bool,
    records: Vec<String>,
    metrics: BTreeMap<String, u64>,
}

/// One row of the table.
struct Case {
    name: &'static str,
    mesh: Mesh,
    settings: [Settings; 2],
    reached: bool,
    /// The destination, if it is not the application of `b`.
    to: Option<SocketAddr>,
    /// Whether the destination records the connection too.
    recorded: bool,
    direct: bool,
}

impl Case {
    fn new(scene: &Scene, name: &'static str, reached: bool) -> Self {
        let settings = ["a", "b"].map(|name| scene.with_identity(name));
        let mesh = scene.mesh();
        Self { name, mesh, settings, reached, to: None, recorded: true, direct: true }
    }

    fn policy(scene: &Scene, name: &'static str, action: &str, rule: &str, reached: bool) -> Self {
        let mesh = scene.mesh().policy("rule", action, &format!("[[[{rule}]]]"));
        Self { mesh, ..Self::new(scene, name, reached) }
    }

    /// Compares both modes.
    async fn check(self, scene: &Scene, family: Family) {
        scene.set_mesh(&self.mesh);
        let mut all = Vec::new();
        for mode in MODES {
            let (observed, direct) = self.observe(scene, mode, family).await;
            assert_eq!(observed.reached, self.reached, "{}, {mode}: {observed:?}", self.name);
            let expected = u64::from(self.direct && mode == "direct");
            assert_eq!(direct, expected, "{}, {mode}: connections without a tunnel", self.name);
            all.push(observed);
        }
        assert_eq!(all.first(), all.last(), "{}", self.name);
    }

    /// Connects from `a` to `b`, exchanges bytes and ends cleanly. Also returns the number of
    /// connections without a tunnel.
    async fn observe(&self, scene: &Scene, mode: &str, family: Family) -> (Observed, u64) {
        let app = scene.b.listen(APP);
        let [a, b] = self.settings.clone();
        let served = scene.node(mode, a, b).await;
        AccessLog::start();
        let (before, direct) = (served.metrics("istio_tcp_"), served.direct_connections());
        let to = self.to.unwrap_or_else(|| scene.b.at(family, APP));
        let reached = talk(scene, &app, to).await;
        let records = AccessLog::records(if self.recorded { 2 } else { 1 }).await;
        let metrics = since(&before, &served.metrics("istio_tcp_"));
        let direct = served.direct_connections() - direct;
        served.stop().await;
        (Observed { reached, records, metrics }, direct)
    }
}

async fn talk(scene: &Scene, app: &Listener, to: SocketAddr) -> bool {
    let Ok(mut client) = scene.a.dial(to).await else { return false };
    let (mut server, peer) = tokio::select! {
        accepted = app.accept() => accepted,
        ended = read_to_end(&mut client) => {
            assert_eq!(ended, (vec![], End::Reset));
            return false;
        }
    };
    assert!(scene.a.ips().contains(&peer.ip()), "the application sees the client");
    exchange(&mut client, &mut server).await;
    client.shutdown().await.expect("an end");
    server.shutdown().await.expect("an end");
    assert_eq!(read_to_end(&mut client).await, (vec![], End::Fin));
    true
}

async fn policies(family: Family) {
    let scene = &Scene::new().await;
    let principal =
        |name| format!("{{principals: [{{exact: cluster.local/ns/default/sa/{name}}}]}}");
    let source = |pod: &underpass_tests::Pod| format!("{{sourceIps: [\"{}\"]}}", pod.ip(family));
    let port = |port: u16| format!("{{destinationPorts: [{port}]}}");
    let namespace = |name| format!("{{namespaces: [{{exact: {name}}}]}}");
    let (itself, other) = (source(&scene.a), source(&scene.b));
    let rows: [(&str, &str, &str, bool); 12] = [
        ("allowed principal", "Allow", &principal("a"), true),
        ("other principal allowed", "Allow", &principal("b"), false),
        ("denied principal", "Deny", &principal("a"), false),
        ("other principal denied", "Deny", &principal("b"), true),
        ("allowed namespace", "Allow", &namespace("default"), true),
        ("denied namespace", "Deny", &namespace("default"), false),
        ("other namespace allowed", "Allow", &namespace("other"), false),
        ("allowed source", "Allow", &itself, true),
        ("other source allowed", "Allow", &other, false),
        ("denied source", "Deny", &itself, false),
        ("denied port", "Deny", &port(APP), false),
        ("other port denied", "Deny", &port(APP + 1), true),
    ];
    Case::new(scene, "no policy", true).check(scene, family).await;
    for (name, action, rule, reached) in rows {
        Case::policy(scene, name, action, rule, reached).check(scene, family).await;
    }
}

async fn certificates() {
    let scene = &Scene::new().await;
    let row = |name, reached| Case::new(scene, name, reached);
    let identity = |pod: &str, pki: &Pki, of: &str| scene.settings(pod).identity(&pki.issue(of));

    // Without a certificate no destination pod proves the workload.
    let mut case =
        Case { direct: false, recorded: false, ..row("source without a certificate", false) };
    case.settings[0] = scene.settings("a");
    case.check(scene, Family::V4).await;
    let mut case = Case { direct: false, ..row("destination without a certificate", false) };
    case.settings[1] = scene.settings("b");
    case.check(scene, Family::V4).await;

    let foreign = Pki::of(scene.world.folder(), "other.domain", "other-roots");
    let mut case = Case { direct: false, ..row("source of an unknown trust domain", false) };
    case.settings[0] = identity("a", &foreign, "a").set("workload.trustDomain=other.domain");
    case.check(scene, Family::V4).await;

    let same_name = Pki::of(scene.world.folder(), "cluster.local", "impostor-roots");
    let mut case = Case { direct: false, ..row("source of another authority", false) };
    case.settings[0] = identity("a", &same_name, "a");
    case.check(scene, Family::V4).await;

    let mut case = Case { direct: false, ..row("destination with another identity", false) };
    case.settings[1] = identity("b", &scene.pki, "c");
    case.check(scene, Family::V4).await;

    for revoked in ["a", "b"] {
        let mut case = Case { direct: false, ..row("revoked", false) };
        let list = scene.pki.revoke(&[&scene.pki.issue(revoked)]);
        case.settings =
            case.settings.map(|one| one.section(&format!("trust: {{crls: [{list:?}]}}")));
        case.check(scene, Family::V4).await;
    }
}

async fn settings() {
    let scene = &Scene::new().await;
    let with = |name, more: [&str; 2], reached| {
        let mut case = Case::new(scene, name, reached);
        let [a, b] = case.settings;
        case.settings = [a.set(more[0]), b.set(more[1])];
        case
    };
    let none = "proxy.workers=2";
    for case in [
        with("strict", [none, "proxy.mtls=strict"], true),
        with("permissive", [none, "proxy.mtls=permissive"], true),
        with("mesh only", ["egress=mesh-only", none], true),
    ] {
        case.check(scene, Family::V4).await;
    }
}

/// The address of a service.
const VIP: &str = "10.200.0.1";

async fn routes() {
    let scene = &Scene::new().await;
    let to = Some(SocketAddr::new(VIP.parse().expect("an address"), APP));
    let pod = scene.b.ip(Family::V4);
    let endpoint = format!(", services: {{default/s: {{{APP}: {APP}}}}}");
    let service = format!("hostname: s, vips: [/{VIP}], ports: {{{APP}: {APP}}}");
    let mesh = Mesh::default().hbone(&scene.a).service(&service);
    let mesh = mesh.workload_with("b", &scene.b.ips(), "HBONE", &endpoint);
    let case = Case { mesh, to, ..Case::new(scene, "service", true) };
    case.check(scene, Family::V4).await;
    // The waypoint is a pod of this node too, but processes the connection for the service.
    let mesh = scene.mesh().service(&format!("{service}, waypoint: {{destination: /{pod}}}"));
    let case = Case { mesh, to, direct: false, ..Case::new(scene, "waypoint", true) };
    case.check(scene, Family::V4).await;
}

async fn pod_missing_in_mesh() {
    let scene = &Scene::new().await;
    let mut case = Case { direct: false, ..Case::new(scene, "renamed pod", true) };
    case.settings[1] = case.settings[1].clone().set("workload.name=unknown");
    case.check(scene, Family::V4).await;
    let mut case = Case::new(scene, "source that only its address and identity prove", true);
    case.settings[0] = case.settings[0].clone().set("workload.name=unknown");
    case.check(scene, Family::V4).await;
}
