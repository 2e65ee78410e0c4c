//! End-to-end tests of the selection of access log lines, and of the export of traces and logs to a
//! collector.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

use std::fs;
use std::process::ExitCode;

use tokio::io::AsyncWriteExt as _;
use underpass_tests::{
    APP, Family, Mesh, Pki, Pod, Proxy, Scene, ScriptedCollector, Server, Settings, Suite, World,
    exchange, finish, read_to_end, until,
};

/// OTLP's port.
const OTLP: u16 = 4318;
const COMPLETE: &[&str] = &["access: connection complete"];
const APPLIED: &[&str] = &["applied the changed settings of the log"];

fn main() -> ExitCode {
    let mut suite = Suite::new();
    suite.test("access log selects connections as the settings file says", access_log);
    suite.test("spans of both proxies of a tunnel are related", traces);
    suite.test("collector gets the lines of the log with their trace", logs);
    suite.test("unreachable collector is logged once and delays no connection", unreachable);
    suite.test("proxy process of a node exports spans and follows the settings", node);
    suite.run()
}

/// Opens, uses and ends a connection.
async fn connection(from: &Pod, to: &Pod) {
    let app = to.listen(APP);
    let (mut client, mut server, _) = from.meet(&app, to.at(Family::V4, APP)).await;
    exchange(&mut client, &mut server).await;
    finish(&mut client, &mut server).await;
}

async fn access_log() {
    let scene = Scene::new().await;
    let settings = |access: &str| {
        scene.client_settings().section(&format!("logging: {{access: {{{access}}}}}"))
    };
    let mut proxy = scene.client.proxy(&settings("connections: failures")).await;
    let _server = scene.server.proxy(&scene.server_settings()).await;
    connection(&scene.client, &scene.server).await;
    // The port has no listener.
    scene.client.dial_and_see_reset(scene.server.at(Family::V4, APP + 1)).await;
    let failed = proxy.line(&["access: connection failed"]).await;
    assert!(failed.contains(" reason=") && !failed.contains(" connect_ms="), "{failed}");
    assert_eq!(proxy.count(COMPLETE), 0, "{}", proxy.log());

    settings("connections: none, namespaces: [default=all]").write(&scene.client);
    proxy.more_than(0, APPLIED).await;
    connection(&scene.client, &scene.server).await;
    let line = proxy.line(COMPLETE).await;
    for field in [" connect_ms=", " first_byte_ms=", " duration=\"", " trace_id=\""] {
        assert!(line.contains(field), "{field}: {line}");
    }

    scene.client_settings().section("logging: {filter: 'info,access=off'}").write(&scene.client);
    proxy.more_than(1, APPLIED).await;
    connection(&scene.client, &scene.server).await;
    settings("sample_ratio: 0").write(&scene.client);
    proxy.more_than(2, APPLIED).await;
    connection(&scene.client, &scene.server).await;
    proxy.stop().await;
    assert_eq!(proxy.count(COMPLETE), 1, "{}", proxy.log());
}

/// Two pods with proxies that export to a collector in the server's pod.
async fn exporting(more: &str) -> (Scene, ScriptedCollector, Proxy, Proxy) {
    let scene = Scene::new().await;
    let collector = ScriptedCollector::start(&scene.server, OTLP);
    let endpoint = format!("http://{}", scene.server.at(Family::V4, OTLP));
    let section = format!("tracing: {{otlp: {{endpoint: \"{endpoint}\"{more}}}}}");
    let client = scene.client_settings().section(&section);
    let server = scene.server_settings().section(&section);
    let server = server.set(&format!("interception.inbound.exclude_ports={OTLP}"));
    let (client, server) = tokio::join!(scene.client.proxy(&client), scene.server.proxy(&server));
    (scene, collector, client, server)
}

async fn traces() {
    let (scene, collector, mut client, _server) = exporting("").await;
    connection(&scene.client, &scene.server).await;
    let outbound = collector.item("client", "outbound connection").await;
    let inbound = collector.item("server", "inbound connection").await;
    assert_eq!(outbound.parent_span_id, [0; 0]);
    assert_eq!(inbound.parent_span_id, outbound.span_id);
    let connect = collector.item("client", "connect").await;
    for (service, step, parent) in [
        ("client", "policy", &outbound),
        ("client", "connect", &outbound),
        ("client", "handshake", &connect),
        ("client", "copy", &outbound),
        ("server", "policy", &inbound),
        ("server", "connect", &inbound),
        // It precedes the request.
        ("server", "handshake", &outbound),
        ("server", "copy", &inbound),
    ] {
        let span = collector.item(service, step).await;
        assert_eq!(span.parent_span_id, parent.span_id, "{service} {step}");
        assert_eq!(span.trace_id, outbound.trace_id, "{service} {step}");
    }
    let identity = scene.pki.id("server").to_string();
    assert_eq!(outbound.attribute("underpass.destination.identity"), Some(&*identity));
    assert_eq!(outbound.attribute("server.port"), Some("8080"));
    assert_eq!(outbound.attribute("error.type"), None);
    let id: String = outbound.trace_id.iter().map(|byte| format!("{byte:02x}")).collect();
    client.line(&["access", &format!("trace_id=\"{id}\"")]).await;
    // The exporter's own connections are not captured.
    assert_eq!(client.count(&["access", &format!(":{OTLP}")]), 0, "{}", client.log());
}

async fn logs() {
    let (scene, collector, _client, _server) = exporting(", logs: true").await;
    connection(&scene.client, &scene.server).await;
    let outbound = collector.item("client", "outbound connection").await;
    let line = collector.item("client", "connection complete").await;
    assert_eq!(
        (&line.trace_id, line.attribute("direction")),
        (&outbound.trace_id, Some("outbound"))
    );
    assert_eq!(line.attribute("bytes_sent"), Some("6"));
    collector.item("server", "ready").await;
}

async fn unreachable() {
    let scene = Scene::new().await;
    let closed = scene.server.at(Family::V4, OTLP);
    let section = format!("tracing: {{otlp: {{endpoint: \"http://{closed}\"}}}}");
    let mut proxy = scene.client.proxy(&scene.client_settings().section(&section)).await;
    let server = scene.server_settings();
    let server = server.set(&format!("interception.inbound.exclude_ports={OTLP}"));
    let _server = scene.server.proxy(&server).await;
    let failed = async || {
        let metrics = scene.client.metrics().await;
        metrics.sum("underpass_telemetry_failed_requests_total", &[("signal", "traces")])
    };
    assert_eq!(failed().await, Some(0.0));
    until("two requests have failed", async || {
        connection(&scene.client, &scene.server).await;
        failed().await >= Some(2.0)
    })
    .await;
    let logged = proxy.line(&["WARN", "cannot export telemetry"]).await;
    assert!(logged.contains("Connection refused") && logged.contains("hint="), "{logged}");
    assert_eq!(proxy.count(&["cannot export telemetry"]), 1, "{}", proxy.log());
    proxy.stop().await;
    assert!(proxy.log().contains("stopped"), "{}", proxy.log());
}

async fn node() {
    let mut world = World::new();
    let (mut node, mut outside) = (world.pod("node").await, world.pod("outside").await);
    world.wire(&mut node, &mut outside).await;
    let (mut a, mut b) = (world.pod("a").await, world.pod("b").await);
    world.wire(&mut a, &mut b).await;
    let (pki, folder) = (Pki::new(world.folder()), world.folder().join("pods"));
    fs::create_dir(&folder).expect("a folder");
    for pod in [&a, &b] {
        pod.write_facts(&folder, "");
    }
    let collector = ScriptedCollector::start(&outside, OTLP);
    let mesh = Mesh::default().hbone(&a).hbone(&b).write(&node, "mesh");
    let endpoint = outside.at(Family::V4, OTLP);
    let settings = |connections: &str| {
        Settings::node("node", &format!("directory: {folder:?}"))
            .section(&format!("identity: {{local_ca: {:?}}}", pki.dir()))
            .mesh(&mesh)
            .section(&format!("tracing: {{otlp: {{endpoint: \"http://{endpoint}\"}}}}"))
            .section(&format!("logging: {{access: {{connections: {connections}}}}}"))
    };
    let mut daemon = node.proxy(&settings("none")).await;
    for pod in ["default/a", "default/b"] {
        daemon.line(&["pod enrolled", pod]).await;
    }
    let _app = Server::echo(&b, APP);
    let echo = async || {
        let mut stream = a.dial(b.at(Family::V4, APP)).await.expect("connected");
        stream.shutdown().await.expect("FIN is sent");
        read_to_end(&mut stream).await;
    };
    echo().await;
    let outbound = collector.item("a", "outbound connection").await;
    let inbound = collector.item("b", "inbound connection").await;
    assert_eq!(inbound.parent_span_id, outbound.span_id);
    assert_eq!(daemon.count(COMPLETE), 0, "{}", daemon.log());
    settings("all").write(&node);
    until("the proxy process logs connections", async || {
        echo().await;
        daemon.count(COMPLETE) > 0
    })
    .await;
}
