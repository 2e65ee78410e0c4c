//! Tests of the mesh of a control plane: first state, changes, rejected resources, outages, and
//! malformed responses.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use underpass_config::{DeltaResponse, ResourceType};
use underpass_tests::{
    APP, CLIENT, End, Family, Mesh, Proxy, SERVER, Scene, ScriptedControlPlane, Server, Settings,
    Suite, deny_port, exchange, field, hbone_workload, http_get, number, read_to_end, resource,
    response, tool, until, within,
};

/// istiod's port.
const PORT: u16 = 15012;
const ADDRESS: ResourceType = ResourceType::Address;
const POLICY: ResourceType = ResourceType::Authorization;
/// The uid of the client.
const OWN: &str = "Kubernetes//Pod/default/client";
const CONNECTED: &str = "connected to the control plane";

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test("a control plane's mesh routes traffic, and its policies apply at once", changes);
    suite.test("connections wait for the first state of the control plane", first_state);
    suite.test("a rejected resource is named, and its last good version stays", rejected);
    suite.test("an outage of the control plane keeps the last mesh", outage);
    suite.test("a long outage of the control plane makes the proxy unready if set", long_outage);
    suite.test("a control plane that misbehaves changes nothing", misbehaving);
    suite.test(
        "a connection waits for the lookup of its address, and is never plaintext before",
        on_demand,
    );
    suite.test("a pod in another network than the control plane's is refused", other_network);
    suite.test("a mesh file beside a control plane cannot widen its policies", with_file);
}

/// The addresses and the policies of the usual scene.
fn usual(scene: &Scene) -> [DeltaResponse; 2] {
    let workloads = [&scene.client, &scene.server].map(hbone_workload).into();
    [response(ADDRESS, workloads, &[]), response(POLICY, Vec::new(), &[])]
}

fn settings(scene: &Scene, plane: &ScriptedControlPlane, name: &str) -> Settings {
    let files = if name == CLIENT { &scene.client_files } else { &scene.server_files };
    Settings::new(name).identity(files).section(&plane.settings())
}

/// The scene with a control plane in the client's pod, whose proxy has a mesh file. The server's
/// proxy has the control plane.
async fn served() -> (Scene, ScriptedControlPlane, Proxy, Proxy) {
    let scene = Scene::new().await;
    let plane = ScriptedControlPlane::start(&scene.client, PORT, &scene.pki);
    plane.set_first(&usual(&scene));
    let client = scene.client.proxy(&scene.client_settings()).await;
    let server = scene.server.proxy(&settings(&scene, &plane, SERVER)).await;
    (scene, plane, client, server)
}

async fn changes() {
    let (scene, mut plane, _client, mut server) = served().await;
    let headers = plane.opened().await;
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    assert_eq!(["clusterid", "x-test"].map(header), [Some("Kubernetes"), Some("1")]);
    let first = plane.request().await;
    assert_eq!(
        first.node.expect("a node").id,
        "ztunnel~1.1.1.1~server.default~default.svc.cluster.local"
    );
    assert_eq!((&*first.type_url, first.resource_names_subscribe.len()), (ADDRESS.url(), 0));
    assert_eq!(plane.request().await.type_url, POLICY.url());
    for _ in 0..2 {
        let answer = plane.request().await;
        assert_eq!((&*answer.response_nonce, answer.error_detail), ("nonce", None));
    }
    let app = scene.server.listen(APP);
    let (mut one, mut other, _) = scene.client.meet(&app, scene.app(Family::V4)).await;
    exchange(&mut one, &mut other).await;
    plane.send(&response(POLICY, vec![deny_port("deny", APP)], &[]));
    assert_eq!(read_to_end(&mut one).await.1, End::Reset);
    server.line(&["connection failed", "reason=\"no_longer_allowed\"", "default/deny"]).await;
    scene.client.dial_and_see_reset(scene.app(Family::V4)).await;
    let before = server.count(&["the change of the mesh is in force"]);
    plane.send(&response(POLICY, Vec::new(), &["default/deny"]));
    server.more_than(before, &["the change of the mesh is in force"]).await;
    let (mut one, mut other, _) = scene.client.meet(&app, scene.app(Family::V4)).await;
    exchange(&mut one, &mut other).await;
}

async fn first_state() {
    let scene = Scene::new().await;
    let mut plane = ScriptedControlPlane::start(&scene.server, PORT, &scene.pki);
    let _server = scene.server.proxy(&scene.server_settings()).await;
    let app = scene.server.listen(APP);
    let client_settings = settings(&scene, &plane, CLIENT);
    let client = scene.client.proxy(&client_settings);
    let flow = async {
        plane.opened().await;
        until("the rules are installed", async || {
            tool(&scene.client, "nft", &["list", "ruleset"]).await.out.contains("redirect")
        })
        .await;
        let mut one = scene.client.dial(scene.app(Family::V4)).await.expect("a connection");
        one.write_all(b"early").await.expect("it is open");
        assert!(!app.is_reached(), "a connection without a mesh");
        for state in usual(&scene) {
            plane.send(&state);
        }
        let (mut other, _) = app.accept().await;
        let mut received = [0; 5];
        within("the early bytes", other.read_exact(&mut received)).await.expect("they arrive");
        assert_eq!(&received, b"early");
    };
    let (mut client, ()) = tokio::join!(client, flow);
    client.line(&["mesh received", "workloads=2"]).await;
}

async fn rejected() {
    let (scene, mut plane, _client, mut server) = served().await;
    let _app = Server::echo(&scene.server, APP);
    for _ in 0..4 {
        plane.request().await;
    }
    // An unknown field may narrow what the policy matches.
    let narrowed = [field(1, "p"), field(2, "default"), number(3, 1), number(4, 1), field(14, "x")];
    let narrowed = resource(POLICY, "default/p", narrowed.concat());
    plane.send(&response(POLICY, vec![narrowed, deny_port("other", 1)], &[]));
    let answer = plane.request().await;
    let message =
        answer.error_detail.clone().unwrap_or_else(|| panic!("no NACK: {answer:?}")).message;
    assert_eq!(message, "default/p: unknown field 14");
    server.line(&["cannot use a resource", "default/p", "unknown field 14"]).await;
    // Without an accepted version, the policy denies.
    scene.client.dial_and_see_reset(scene.app(Family::V4)).await;
    server.line(&["connection failed", "default/p (rejected)"]).await;
    plane.send(&response(POLICY, vec![deny_port("p", 2)], &[]));
    assert_eq!(plane.request().await.error_detail, None);
    server.line(&["mesh changed", "policies=2"]).await;
    scene.echoed().await;
}

async fn outage() {
    let (scene, mut plane, _client, mut server) = served().await;
    let _app = Server::echo(&scene.server, APP);
    scene.echoed().await;
    plane.set_first(&[]);
    plane.end_stream();
    plane.opened().await;
    plane.opened().await;
    let mut names: Vec<_> = plane.request().await.initial_resource_versions.into_keys().collect();
    names.sort();
    assert_eq!(names, ["Kubernetes//Pod/default/client", "Kubernetes//Pod/default/server"]);
    scene.echoed().await;
    server.more_than(1, &[CONNECTED]).await;
    // The new stream works.
    plane.send(&response(POLICY, vec![deny_port("deny", APP)], &[]));
    server.line(&["mesh changed", "policies=1"]).await;
    scene.client.dial_and_see_reset(scene.app(Family::V4)).await;
}

async fn long_outage() {
    let scene = Scene::new().await;
    let plane = ScriptedControlPlane::start(&scene.client, PORT, &scene.pki);
    plane.set_first(&usual(&scene));
    let settings = settings(&scene, &plane, SERVER).set("mesh.xds.unready_after=500ms");
    let _server = scene.server.proxy(&settings).await;
    let ready = scene.server.at(Family::V4, 15021);
    plane.stop();
    until("the proxy is not ready", async || {
        let (status, text) = http_get(&scene.server, ready, "/healthz/ready").await;
        status == 503 && text == "not ready: the control plane is lost (mesh.xds)\n"
    })
    .await;
}

async fn misbehaving() {
    let (scene, plane, _client, mut server) = served().await;
    let _app = Server::echo(&scene.server, APP);
    let unknown = DeltaResponse { type_url: "unknown".to_owned(), ..DeltaResponse::default() };
    let nameless = response(ADDRESS, vec![resource(ADDRESS, "", Vec::new())], &[]);
    let deep = (0..10_000).fold(Vec::new(), |content, _| field(5, content));
    let raw: [&[u8]; 4] = [
        // A message of 4 GiB, a compressed one, a broken one, and one that never ends.
        &[0, 255, 255, 255, 255],
        &[1, 0, 0, 0, 1, 7],
        &[0, 0, 0, 0, 2, 0xff, 0xff],
        &[0, 0, 0, 1, 0, 9],
    ];
    for (round, attack) in (1..).zip([
        Attack::Response(unknown),
        Attack::Raw(raw[0]),
        Attack::Raw(raw[1]),
        Attack::Raw(raw[2]),
        Attack::Unfinished(raw[3]),
    ]) {
        match attack {
            Attack::Response(response) => plane.send(&response),
            Attack::Raw(bytes) => plane.send_raw(bytes.to_vec().into()),
            Attack::Unfinished(bytes) => {
                plane.send_raw(bytes.to_vec().into());
                plane.end_stream();
            }
        }
        // The client opens the stream again, and gets the usual state.
        server.more_than(round, &[CONNECTED]).await;
        scene.echoed().await;
    }
    // A resource without a name, and a deeply nested one, are rejected. A flood of changes is
    // applied.
    plane.send(&nameless);
    server.line(&["cannot use a resource", "has no name"]).await;
    plane.send(&response(POLICY, vec![resource(POLICY, "default/deep", deep)], &[]));
    server.line(&["cannot use a resource", "default/deep"]).await;
    plane.send(&response(POLICY, Vec::new(), &["default/deep"]));
    for round in 0..500_u32 {
        let name = format!("Kubernetes//Pod/default/flood{round}");
        let workload =
            [field(1, "flood"), field(2, "default"), field(3, [9, 9, 9, 9]), field(20, &name)];
        let flooding = resource(ADDRESS, &name, field(1, workload.concat()));
        plane.send(&response(ADDRESS, vec![flooding], &[]));
    }
    server.line(&["mesh changed", "workloads=502"]).await;
    scene.echoed().await;
}

/// The misbehaviour of a control plane.
enum Attack {
    Response(DeltaResponse),
    Raw(&'static [u8]),
    /// The control plane sends these bytes, and ends the connection.
    Unfinished(&'static [u8]),
}

async fn on_demand() {
    let scene = Scene::new().await;
    let mut plane = ScriptedControlPlane::start(&scene.server, PORT, &scene.pki);
    let [addresses, policies] = usual(&scene);
    plane.set_first(&[policies]);
    let _server = scene.server.proxy(&scene.server_settings()).await;
    let client = settings(&scene, &plane, CLIENT).set("mesh.xds.on_demand=true");
    let mut client = scene.client.proxy(&client).await;
    let first = plane.request().await;
    assert_eq!(first.resource_names_subscribe, ["*"]);
    assert_eq!(first.resource_names_unsubscribe, ["*"]);
    let app = scene.server.listen(APP);
    let absent = response(ADDRESS, Vec::new(), &[&lookup(&scene, Family::V6)]);
    // The first address is not in the mesh, so the connection is plaintext. The second one is.
    for (tunnels, (family, answer)) in
        [(Family::V6, absent), (Family::V4, addresses)].into_iter().enumerate()
    {
        let mut one = scene.client.dial(scene.app(family)).await.expect("a connection");
        one.write_all(b"early").await.expect("it is open");
        let asked = lookups(&mut plane).await;
        assert!(asked.contains(&lookup(&scene, family)), "{asked:?}");
        assert!(!app.is_reached(), "a connection before the answer");
        let own = format!("/{}", scene.client.ip(family));
        plane.send(&response(ADDRESS, Vec::new(), &[&own, OWN]));
        plane.send(&answer);
        let (mut other, _) = app.accept().await;
        let mut received = [0; 5];
        within("the early bytes", other.read_exact(&mut received)).await.expect("they arrive");
        assert_eq!(&received, b"early");
        drop((one, other));
        client.more_than(tunnels, &["connection complete", "direction=\"outbound\""]).await;
        assert_eq!(client.count(&["connection complete", "dst.hbone_addr="]), tunnels);
    }
}

/// Without the check, the control plane would have no address of the network, and the connection
/// would be plaintext.
async fn other_network() {
    let scene = Scene::new().await;
    let mut plane = ScriptedControlPlane::start(&scene.server, PORT, &scene.pki);
    let [_, policies] = usual(&scene);
    plane.set_first(&[policies]);
    let _server = scene.server.proxy(&scene.server_settings()).await;
    let client = settings(&scene, &plane, CLIENT).set("mesh.xds.on_demand=true");
    let mut client = scene.client.proxy(&client.set("workload.network=wrong")).await;
    assert_eq!(plane.request().await.resource_names_subscribe, ["*"]);
    let app = scene.server.listen(APP);
    let answering = async {
        let asked = lookups(&mut plane).await;
        let addresses = [&scene.client, &scene.server].map(|pod| pod.ip(Family::V4));
        let [own, destination] = addresses.map(|address| format!("wrong/{address}"));
        assert!(asked.iter().any(|name| name == OWN), "{asked:?}");
        let found = vec![hbone_workload(&scene.client)];
        plane.send(&response(ADDRESS, found, &[&own, &destination]));
    };
    tokio::join!(scene.client.dial_and_see_reset(scene.app(Family::V4)), answering);
    assert!(!app.is_reached(), "a plaintext connection");
    let refused = ["connection failed", "reason=\"pod_not_in_mesh\"", "set workload.network to"];
    client.line(&refused).await;
}

/// The name of the lookup of the server's address.
fn lookup(scene: &Scene, family: Family) -> String {
    format!("/{}", scene.server.ip(family))
}

/// The names of the next subscription.
async fn lookups(plane: &mut ScriptedControlPlane) -> Vec<String> {
    loop {
        let request = plane.request().await;
        if !request.resource_names_subscribe.is_empty() {
            return request.resource_names_subscribe;
        }
    }
}

async fn with_file() {
    let scene = Scene::new().await;
    let plane = ScriptedControlPlane::start(&scene.client, PORT, &scene.pki);
    let [addresses, _] = usual(&scene);
    plane.set_first(&[addresses, response(POLICY, vec![deny_port("deny", APP)], &[])]);
    let mesh = Mesh::default().policy("widen", "Allow", "[[[{destinationPorts: [8080]}]]]");
    let file = mesh.write(&scene.server, "beside");
    let _client = scene.client.proxy(&scene.client_settings()).await;
    let beside = format!("mesh.file={}", file.display());
    let mut server = scene.server.proxy(&settings(&scene, &plane, SERVER).set(&beside)).await;
    let _app = Server::echo(&scene.server, APP);
    scene.client.dial_and_see_reset(scene.app(Family::V4)).await;
    server.line(&["connection failed", "default/deny"]).await;
    plane.send(&response(POLICY, Vec::new(), &["default/deny"]));
    server.line(&["mesh changed", "policies=0"]).await;
    scene.echoed().await;
    // The file may restrict connections further.
    let narrowed = Mesh::default().policy("narrow", "Deny", "[[]]");
    assert_eq!(narrowed.write(&scene.server, "beside"), file);
    server.more_than(1, &["mesh changed"]).await;
    scene.client.dial_and_see_reset(scene.app(Family::V4)).await;
}
