//! Tests of the settings `egress` and `mtls`: destinations outside the mesh, and inbound plaintext.

use std::io::ErrorKind;
use std::net::IpAddr;

use underpass_interception::{KUBELET_PROBE_V4, KUBELET_PROBE_V6};
use underpass_tests::{APP, Dial, End, Family, Mesh, Scene, Server, Suite, read_to_end, tool};

use crate::change;

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test_both(
        "with egress: mesh-only, connections to destinations outside the mesh are refused",
        mesh_only,
    );
    suite.test("an exception of egress: mesh-only allows a network or a port", exceptions);
    suite.test("strict mtls refuses plaintext and accepts a tunnel", strict);
    suite.test("mtls can be overridden for a port", strict_except_for_port);
    suite.test("an exempt kubelet probe is accepted with any mtls mode", probe);
    suite.test_both(
        "strict mtls refuses plaintext from the probe address unless probes are exempt",
        unexempted_probe,
    );
}

async fn mesh_only(family: Family) {
    let scene = Scene::new().await;
    let settings = scene.client_settings().set(&no_mesh(&scene)).set("egress=mesh-only");
    let mut client = scene.client.proxy(&settings).await;
    let app = scene.server.listen(APP);
    scene.client.dial_and_see_reset(scene.app(family)).await;
    client.line(&["connection failed", "reason=\"egress_denied\"", "egress_exceptions"]).await;
    assert!(!app.is_reached(), "the application was reached");
}

async fn exceptions() {
    let scene = Scene::new().await;
    let only = scene.client_settings().set(&no_mesh(&scene)).set("egress=mesh-only");
    let _app = Server::echo(&scene.server, APP);
    let network = format!("egress_exceptions.cidrs={}/32", scene.server.ip(Family::V4));
    for exception in [network, format!("egress_exceptions.ports={APP}")] {
        let mut client = scene.client.proxy(&only.clone().set(&exception)).await;
        scene.echoed().await;
        client.stop().await;
    }
    // A member without HBONE belongs to the mesh.
    let mut client = scene.client.proxy(&scene.client_settings().set("egress=mesh-only")).await;
    change(&scene, &Mesh::default().hbone(&scene.client).tcp(&scene.server), &mut [&mut client])
        .await;
    scene.echoed().await;
}

async fn strict() {
    let scene = Scene::new().await;
    let mut server = scene.server.proxy(&scene.server_settings().set("proxy.mtls=strict")).await;
    let _app = Server::echo(&scene.server, APP);
    scene.client.dial_and_see_reset(scene.app(Family::V4)).await;
    server.line(&["connection failed", "reason=\"plaintext_refused\"", "proxy.mtls"]).await;
    let _client = scene.client.proxy(&scene.client_settings()).await;
    scene.echoed().await;
}

async fn strict_except_for_port() {
    let scene = Scene::new().await;
    let settings = scene
        .server_settings()
        .set("proxy.mtls=strict")
        .set("proxy.mtls_overrides=default/server:8081=permissive");
    let _server = scene.server.proxy(&settings).await;
    let (_app, _open) = (Server::echo(&scene.server, APP), Server::echo(&scene.server, 8081));
    scene.client.dial_and_see_reset(scene.app(Family::V4)).await;
    scene.echoed_at(scene.server.at(Family::V4, 8081)).await;
}

async fn unexempted_probe(family: Family) {
    let scene = Scene::new().await;
    let strict = scene.server_settings().set("proxy.mtls=strict");
    let probe = match family {
        Family::V4 => IpAddr::from(KUBELET_PROBE_V4),
        Family::V6 => IpAddr::from(KUBELET_PROBE_V6),
    };
    tool(&scene.client, "ip", &["address", "add", &probe.to_string(), "dev", "lo"]).await.ok();
    let app = scene.server.listen(APP);
    let source = Some((probe, 0).into());
    for settings in [strict.clone(), strict.set("interception.kubelet_probes=8081")] {
        let mut server = scene.server.proxy(&settings).await;
        let to = scene.app(family);
        // The proxy accepts before it decides, so RST may follow the handshake.
        match scene.client.dial_as(to, Dial { source, ..Dial::default() }).await {
            Ok(mut stream) => assert_eq!(read_to_end(&mut stream).await, (Vec::new(), End::Reset)),
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
        }
        server.line(&["connection failed", "reason=\"plaintext_refused\""]).await;
        server.stop().await;
    }
    assert!(!app.is_reached(), "the application was reached");
}

async fn probe() {
    let scene = Scene::new().await;
    let settings = scene
        .server_settings()
        .set("proxy.mtls=strict")
        .set(&format!("interception.kubelet_probes={APP}"));
    let _server = scene.server.proxy(&settings).await;
    let address = KUBELET_PROBE_V4.to_string();
    tool(&scene.client, "ip", &["address", "add", &address, "dev", "lo"]).await.ok();
    let app = scene.server.listen(APP);
    let source = Some((KUBELET_PROBE_V4, 0).into());
    let probe = scene.client.dial_as(scene.app(Family::V4), Dial { source, ..Dial::default() });
    let (probe, _) = tokio::join!(probe, app.accept());
    probe.expect("the probe is accepted");
}

/// The setting for an empty mesh.
fn no_mesh(scene: &Scene) -> String {
    format!("mesh.file={}", scene.empty_mesh().display())
}
