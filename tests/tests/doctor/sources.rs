//! The doctor with certificates of a CA and of SPIRE, with lookups on demand, and with a node
//! daemon.

use std::fs;
use std::path::Path;

use underpass_config::ResourceType;
use underpass_tests::{
    APP, CLIENT, Family, Mesh, Scene, ScriptedControlPlane, Server, Settings, SpireAgent, Suite,
    World, binary, hbone_workload, read_to_end, response, until,
};

use crate::{doctor, doctor_of_proxy, without_dns};

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test("a certificate is requested from the CA", issued_by_authority);
    suite.test("the peers of a proxy with lookups on demand are tried", on_demand);
    suite.test("the processes and the certificates of a node with SPIRE are checked", node);
}

async fn issued_by_authority() {
    let scene = Scene::new().await;
    let (token, clients) =
        (scene.world.folder().join("token"), scene.world.folder().join("clients"));
    fs::write(&token, "a-secret").expect("a file");
    let client =
        "clients:\n- token: a-secret\n  identities: [\"spiffe://cluster.local/ns/default/sa/*\"]\n";
    fs::write(&clients, client).expect("a file");
    let address = scene.server.at(Family::V4, 15012);
    let (listen, text) = (address.to_string(), |path: &Path| path.display().to_string());
    let (dir, clients) = (text(scene.pki.dir()), text(&clients));
    let arguments = [
        "ca",
        "serve",
        "--dir",
        &dir,
        "--listen",
        &listen,
        "--clients",
        &clients,
        "--name",
        "ca.test",
    ];
    let _authority = scene.server.background(binary(), &arguments);
    until("the CA listens", async || scene.client.dial(address).await.is_ok()).await;
    let roots = scene.pki.dir().join("roots.pem");
    let ca = format!(
        "identity: {{istio_ca: {{address: \"https://{address}\", server_name: ca.test, roots: {roots:?}, token: {token:?}}}}}"
    );
    let settings = Settings::new(CLIENT).section(&ca).mesh(&scene.mesh);
    let findings = doctor(&scene.client, &without_dns(&scene.client, settings)).await;
    findings.assert("certificate", "ok", "ns/default/sa/client, valid for another");
}

async fn on_demand() {
    let scene = Scene::new().await;
    let mut plane = ScriptedControlPlane::start(&scene.server, 15012, &scene.pki);
    let own = vec![hbone_workload(&scene.client)];
    plane.set_first(&[
        response(ResourceType::Authorization, Vec::new(), &[]),
        response(ResourceType::Address, own, &[]),
    ]);
    let settings = Settings::new(CLIENT).identity(&scene.client_files).section(&plane.settings());
    let settings = without_dns(&scene.client, settings).set("mesh.xds.on_demand=true");
    let _client = scene.client.proxy(&settings).await;
    let server = scene.server.proxy(&scene.server_settings()).await;
    let findings = doctor_of_proxy(&scene.client).await;
    assert!(findings.find("peers-connect").is_none(), "no peer is known: {findings:?}");
    let _app = Server::echo(&scene.server, APP);
    let stream = scene.client.dial(scene.app(Family::V4)).await.expect("it listens");
    let lookup = format!("/{}", scene.server.ip(Family::V4));
    while !plane.request().await.resource_names_subscribe.contains(&lookup) {}
    let workloads = [&scene.client, &scene.server].map(hbone_workload).into();
    plane.send(&response(ResourceType::Address, workloads, &[]));
    drop(stream);
    scene.echoed().await;
    let findings = doctor_of_proxy(&scene.client).await;
    findings.assert("peers-connect", "ok", "tunnels to all 1 peers can be opened");
    drop(server);
    let mut stream = scene.client.dial(scene.app(Family::V4)).await.expect("it listens");
    read_to_end(&mut stream).await;
    let findings = doctor_of_proxy(&scene.client).await;
    findings.assert("peers-connect", "failure", "spiffe://cluster.local/ns/default/sa/server at");
}

async fn node() {
    let mut world = World::new();
    let (mut node, mut a) = (world.pod("node").await, world.pod("a").await);
    world.wire(&mut node, &mut a).await;
    let folder = world.folder().join("pods");
    fs::create_dir_all(&folder).expect("a folder");
    a.write_facts(&folder, "");
    let agent = SpireAgent::start(world.folder());
    let mesh = Mesh::default().hbone(&a).write(&node, "mesh");
    let settings = Settings::node("node", &format!("directory: {folder:?}"));
    let settings = without_dns(&node, settings.section(&agent.settings()).mesh(&mesh));
    let findings = doctor(&node, &settings).await;
    findings.assert("certificate", "ok", "spiffe://cluster.local/ns/default/sa/a");
    findings.assert("ports-free", "ok", "no program listens");
    let mut daemon = node.proxy(&settings).await;
    daemon.line(&["pod enrolled", "default/a"]).await;
    let findings = doctor(&node, &settings).await;
    assert_eq!(findings.failures(), [""; 0], "{findings:?}");
    for (id, part) in [
        ("ports-free", "only the running proxy listens"),
        ("version-running", "runs this program"),
        ("proxy-ready", "is ready"),
        ("limits-in-use", "open files of the running proxy"),
        ("proxy-problems", "reports no problem"),
    ] {
        findings.assert(id, "ok", part);
    }
}
