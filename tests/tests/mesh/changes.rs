//! Tests of changes of the mesh file: applied, rejected, and their effect on open connections.

use std::fs;
use std::os::unix::fs::symlink;

use underpass_tests::{
    APP, End, Family, Mesh, SERVER, Scene, Server, Suite, exchange, read_to_end,
};

use crate::{change, from_client, proxies, usual};

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test(
        "a change of a peer's identity in the mesh refuses connections to it",
        other_identity,
    );
    suite.test(
        "a change of a peer's protocol to HBONE refuses plaintext connections to it",
        other_protocol,
    );
    suite.test(
        "an invalid document is reported with its location, and the previous one stays",
        bad_document,
    );
    suite.test("`config check` reports an invalid document", config_check);
    suite.test(
        "the files of a folder form one mesh, which is reloaded when a ConfigMap changes",
        folder,
    );
    suite.test("deleting the mesh file keeps the last mesh", deleted_file);
}

async fn other_identity() {
    let (scene, mut client, _server) = proxies(usual).await;
    let app = scene.server.listen(APP);
    let (mut one, mut other, _) = scene.client.meet(&app, scene.app(Family::V4)).await;
    exchange(&mut one, &mut other).await;
    let impostor = Mesh::default().hbone(&scene.client).workload_with(
        SERVER,
        &scene.server.ips(),
        "HBONE",
        ", trustDomain: elsewhere",
    );
    change(&scene, &impostor, &mut [&mut client]).await;
    assert_eq!(read_to_end(&mut one).await.1, End::Reset);
    client.line(&["connection failed", "reason=\"no_longer_allowed\"", "default/server"]).await;
    scene.client.dial_and_see_reset(scene.app(Family::V4)).await;
}

async fn other_protocol() {
    let plain = |scene: &Scene| Mesh::default().hbone(&scene.client).tcp(&scene.server);
    let (scene, mut client, mut server) = proxies(plain).await;
    let app = scene.server.listen(APP);
    let (mut one, mut other, _) = scene.client.meet(&app, scene.app(Family::V4)).await;
    exchange(&mut one, &mut other).await;
    change(&scene, &usual(&scene), &mut [&mut client, &mut server]).await;
    assert_eq!(read_to_end(&mut one).await.1, End::Reset);
    client
        .line(&[
            "connection failed",
            "reason=\"no_longer_allowed\"",
            "its protocol in the mesh is HBONE",
        ])
        .await;
    let mut wire = scene.server.capture();
    let (mut one, mut other, _) = scene.client.meet(&app, scene.app(Family::V4)).await;
    exchange(&mut one, &mut other).await;
    let frames = wire.drain().expect("the capture is read");
    let is_plain = |frame: &[u8]| frame.windows(7).any(|window| window == b"request");
    assert!(!frames.iter().any(|frame| is_plain(frame)), "plaintext");
}

async fn bad_document() {
    let (scene, mut client, mut server) =
        proxies(|scene| usual(scene).policy("policy", "Allow", &from_client())).await;
    let _app = Server::echo(&scene.server, APP);
    scene.echoed().await;
    for (bad, reported) in [
        ("workloads:\n- {name: a, workloadIps: [10.0.0.1], protcol: HBONE}\n", "mesh.yaml:2:"),
        ("workloads: [", "mesh.yaml:"),
        (
            "policies:\n- {name: p, namespace: default, scope: Namespace, action: Allow, dryRun: false, rules: [[[{sourceIps: [10.0.0]}]]]}\n",
            "sourceIps",
        ),
        (
            "workloads:\n- {name: a, workloadIps: [10.0.0.1], authorizationPolicies: [default/missing]}\n",
            "default/missing",
        ),
    ] {
        let before = server.count(&["the last valid one stays in effect", reported]);
        fs::write(scene.client.folder().join("mesh.yaml"), bad).expect("a bad mesh file");
        server.more_than(before, &["the last valid one stays in effect", reported]).await;
        scene.echoed().await;
    }
    change(
        &scene,
        &usual(&scene).policy("deny-all", "Allow", "[]"),
        &mut [&mut client, &mut server],
    )
    .await;
    scene.client.dial_and_see_reset(scene.app(Family::V4)).await;
}

async fn config_check() {
    let scene = Scene::new().await;
    let file = scene.client.folder().join("mesh.yaml");
    let settings = scene.client_settings();
    settings.write(&scene.client);
    let settings = settings.file(&scene.client);
    let arguments = ["config", "check", "--config", settings.to_str().expect("a path")];
    scene.client.underpass(&arguments).await.ok();
    let bad = "workloads:\n- {name: a, workloadIps: [10.0.0.1], services: {default/x: {80: 80}}}\n";
    fs::write(&file, bad).expect("a bad mesh file");
    let (_, reported) = scene.client.underpass(&arguments).await.exited(2);
    assert!(reported.contains("mesh.yaml:2:") && reported.contains("default/x"), "{reported}");
}

async fn folder() {
    let scene = Scene::new().await;
    let folder = scene.client.folder().join("meshes");
    // The layout of a ConfigMap that kubelet mounts.
    let version = |name: &str, policies: &str| {
        let versions = folder.join(name);
        fs::create_dir_all(&versions).expect("a folder");
        fs::write(versions.join("workloads.yaml"), usual(&scene).text()).expect("a mesh file");
        fs::write(versions.join("policies.yaml"), policies).expect("a mesh file");
        let swapped = folder.join("..data_tmp");
        symlink(name, &swapped).expect("a link");
        fs::rename(&swapped, folder.join("..data")).expect("a link");
    };
    version("..1", "policies: []\n");
    for file in ["workloads.yaml", "policies.yaml"] {
        symlink(format!("..data/{file}"), folder.join(file)).expect("a link");
    }
    let settings = scene.server_settings().set(&format!("mesh.file={}", folder.display()));
    let _client = scene.client.proxy(&scene.client_settings()).await;
    let mut server = scene.server.proxy(&settings).await;
    let _app = Server::echo(&scene.server, APP);
    scene.echoed().await;
    version("..2", &Mesh::default().policy("deny-all", "Allow", "[]").text());
    server.line(&["the change of the mesh is in force", "generation=2"]).await;
    scene.client.dial_and_see_reset(scene.app(Family::V4)).await;
    server.line(&["connection failed", "policy_denied"]).await;
}

async fn deleted_file() {
    let (scene, _client, mut server) = proxies(usual).await;
    let _app = Server::echo(&scene.server, APP);
    fs::remove_file(scene.client.folder().join("mesh.yaml")).expect("the file existed");
    server.line(&["the last valid one stays in effect", "mesh.yaml"]).await;
    scene.echoed().await;
}
