//! End-to-end tests of the mesh: services and endpoints, policies and their effect on open
//! connections, and changes of the file.
#![expect(clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod changes;
mod control_plane;
mod gateways;
mod policies;
mod services;
mod settings;

use std::net::IpAddr;
use std::process::ExitCode;

use underpass_tests::{CLIENT, Mesh, Proxy, SERVER, Scene, Suite};

fn main() -> ExitCode {
    let mut suite = Suite::new();
    services::add_tests(&mut suite);
    gateways::add_tests(&mut suite);
    policies::add_tests(&mut suite);
    changes::add_tests(&mut suite);
    settings::add_tests(&mut suite);
    control_plane::add_tests(&mut suite);
    suite.run()
}

/// The mesh of the usual scene.
fn usual(scene: &Scene) -> Mesh {
    Mesh::default().hbone(&scene.client).hbone(&scene.server)
}

/// The mesh of the usual scene, with additional fields of the server.
fn with_server(scene: &Scene, more: &str) -> Mesh {
    let ips: Vec<IpAddr> = scene.server.ips();
    Mesh::default().hbone(&scene.client).workload_with(SERVER, &ips, "HBONE", more)
}

/// The scene with a proxy in each pod that uses `mesh`. Returns the client's and the server's
/// proxy.
async fn proxies(mesh: impl FnOnce(&Scene) -> Mesh) -> (Scene, Proxy, Proxy) {
    let scene = Scene::new().await;
    scene.set_mesh(&mesh(&scene));
    let (client, server) = (scene.client_settings(), scene.server_settings());
    let (client, server) = tokio::join!(scene.client.proxy(&client), scene.server.proxy(&server));
    (scene, client, server)
}

/// Replaces the mesh file, and waits until `proxies` have applied it.
async fn change(scene: &Scene, mesh: &Mesh, proxies: &mut [&mut Proxy]) {
    const IN_FORCE: &[&str] = &["the change of the mesh is in force"];
    let before: Vec<_> = proxies.iter().map(|proxy| proxy.count(IN_FORCE)).collect();
    scene.set_mesh(mesh);
    for (proxy, before) in proxies.iter_mut().zip(before) {
        proxy.more_than(before, IN_FORCE).await;
    }
}

/// A rule for the service account `account`.
fn from(account: &str) -> String {
    format!("[[[{{principals: [{{exact: cluster.local/ns/default/sa/{account}}}]}}]]]")
}

/// A rule for the scene's client.
fn from_client() -> String {
    from(CLIENT)
}
