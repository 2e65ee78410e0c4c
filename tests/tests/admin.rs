//! End-to-end tests of administration: the Unix socket, the read-only address, and the commands.
#![expect(clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use underpass_tests::{
    End, Family, Mesh, Pki, Pod, Scene, Server, Settings, Suite, World, exchange, http_get,
    read_to_end, tool, until,
};

const ADDRESS: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 15000);

fn main() -> ExitCode {
    let mut suite = Suite::new();
    suite.test("admin socket is found by the command and has mode 0600", socket);
    suite.test("admin address is off by default and only reads", address);
    suite.test("log filter changes while the proxy runs", log_filter);
    suite.test("config dump shows mesh, certificate and settings", config_dump);
    suite.test("rules are shown with counters and the state of their installation", rules);
    suite.test("pod with renewed tunnels opens new ones for new connections", renew_tunnels);
    suite.test("drained pod refuses new inbound connections and serves open ones", drain);
    suite.test("drain terminates inbound connections at its deadline", drain_deadline);
    suite.test("the liveness probe of a running proxy succeeds", liveness);
    suite.test("new process takes over the admin socket and address", take_over);
    suite.test("proxy process of a node serves the socket that the broker has created", || {
        node("auto", true)
    });
    suite.test("node without a broker serves the same paths", || node("off", false));
    suite.test("command without a proxy names the socket and a remedy", no_proxy);
    suite.run()
}

/// The default socket of a pod's network namespace.
fn socket_of(pod: &Pod) -> PathBuf {
    let namespace = pod.namespace().id().inode();
    PathBuf::from(format!("/run/underpass/admin-{namespace}.sock"))
}

async fn get(pod: &Pod, path: &str) -> Value {
    let printed = pod.underpass(&["admin", "get", path]).await.ok();
    serde_json::from_str(&printed).expect("JSON")
}

async fn socket() {
    let (scene, mut proxy) = Scene::with_plain_client(&[]).await;
    let version = get(&scene.client, "/version").await;
    assert_eq!(version.get("pid"), Some(&Value::from(proxy.pid())), "{version}");
    let socket = socket_of(&scene.client);
    let mode = std::fs::metadata(&socket).expect("a socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let curl = ["-s", "--unix-socket", socket.to_str().expect("UTF-8"), "http://localhost/version"];
    let printed = tool(&scene.client, "curl", &curl).await.ok();
    assert_eq!(serde_json::from_str::<Value>(&printed).expect("JSON"), version);
    assert!(proxy.stop().await.success());
    assert!(!socket.exists(), "the socket is removed with the proxy");
}

async fn address() {
    let (scene, mut proxy) = Scene::with_plain_client(&[]).await;
    assert!(scene.client.dial(ADDRESS).await.is_err(), "the address is off by default");
    proxy.stop().await;
    let (scene, _proxy) = Scene::with_plain_client(&["admin.address=127.0.0.1:15000"]).await;
    let (status, body) = http_get(&scene.client, ADDRESS, "/version").await;
    assert!(status == 200 && body.contains("\"profile\":\"ambient\""), "{status} {body}");
    let status = ["-s", "-o", "/dev/null", "-w", "%{http_code}"];
    for (more, expected) in [
        (&["-X", "POST", "http://127.0.0.1:15000/logging?filter=debug"][..], "403"),
        (&["-H", "Host: evil.example", "http://127.0.0.1:15000/version"], "403"),
        (&["http://127.0.0.1:15000/nothing"], "404"),
    ] {
        let arguments = [&status[..], more].concat();
        assert_eq!(tool(&scene.client, "curl", &arguments).await.ok(), expected, "{more:?}");
    }
}

async fn log_filter() {
    let (scene, mut proxy) = Scene::with_plain_client(&["logging.filter=info"]).await;
    assert_eq!(scene.client.underpass(&["admin", "log"]).await.ok(), "info\n");
    let printed = scene.client.underpass(&["admin", "log", "info,access=off"]).await.ok();
    assert_eq!(printed, "info,access=off\n");
    proxy.line(&["the filter of the log was changed", "info,access=off"]).await;
    drop(scene.connected(Family::V4).await);
    assert_eq!(scene.client.underpass(&["admin", "log", "--reset"]).await.ok(), "info\n");
    drop(scene.connected(Family::V4).await);
    assert_eq!(proxy.access_lines(1).await.len(), 1, "{}", proxy.log());
}

async fn config_dump() {
    let (scene, _client, _server) = Scene::with_proxies().await;
    let _open = scene.connected(Family::V4).await;
    let dump = get(&scene.client, "/config_dump").await;
    let state = &dump["workloadState"]["default/client"];
    assert_eq!(text(state, "state"), "Up", "{dump}");
    let [outbound] = list(&state["connections"], "outbound") else { unreachable!("{dump}") };
    let tunnel = SocketAddr::new(scene.server.ip(Family::V4), 15008).to_string();
    assert_eq!([text(outbound, "protocol"), text(outbound, "actualDst")], ["HBONE", &tunnel]);
    let names: Vec<_> = list(&dump, "workloads").iter().map(|one| text(one, "name")).collect();
    assert_eq!(names, ["client", "server"], "{dump}");
    let [certificate] = list(&dump, "certificates") else { unreachable!("{dump}") };
    assert_eq!(text(certificate, "identity"), scene.pki.id("client").to_string());
    assert_eq!(text(certificate, "state"), "Available");
    assert_eq!(text(&dump["config"], "workload.name"), "client");
    let printed = scene.client.underpass(&["admin", "get", "/certificates"]).await.ok();
    assert!(printed.contains("\"state\":\"valid\""), "{printed}");
    assert!(!printed.contains("PRIVATE KEY") && !dump.to_string().contains("PRIVATE KEY"));
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().map(Vec::as_slice).unwrap_or_default()
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

/// Exchanges bytes between the applications of both pods.
async fn connection(scene: &Scene) {
    let (mut client, mut server) = scene.connected(Family::V4).await;
    exchange(&mut client, &mut server).await;
}

async fn rules() {
    let (scene, _client, _server) = Scene::with_proxies().await;
    connection(&scene).await;
    let rules = get(&scene.client, "/rules").await;
    assert_eq!(rules["is_intact"], Value::from(true), "{rules}");
    let caught = list(&rules, "rules").iter().any(|rule| rule["packets"].as_u64() > Some(0));
    assert!(caught, "{rules}");
    tool(&scene.client, "nft", &["flush", "ruleset"]).await.ok();
    until("the rules are repaired", async || {
        get(&scene.client, "/rules").await["is_intact"] == true
    })
    .await;
    let (_, error) = scene.client.underpass(&["admin", "get", "/rules?pod=a/b"]).await.exited(1);
    assert!(error.contains("no pod a/b"), "{error}");
}

async fn renew_tunnels() {
    let (scene, _client, _server) = Scene::with_proxies().await;
    let (mut client, mut server) = scene.connected(Family::V4).await;
    let printed = scene.client.underpass(&["admin", "renew-tunnels"]).await.ok();
    assert_eq!(printed, "closing the tunnels of default/client\n");
    exchange(&mut client, &mut server).await;
    connection(&scene).await;
    let tunnels = |metrics: underpass_tests::Metrics| metrics.sum("underpass_tunnels_open", &[]);
    let open = tunnels(scene.client.metrics().await);
    assert!(open >= Some(2.0), "the new connection has another tunnel: {open:?}");
    let unknown = ["admin", "renew-tunnels", "default/x"];
    let (_, error) = scene.client.underpass(&unknown).await.exited(1);
    assert!(error.contains("no pod default/x"), "{error}");
}

/// A connection whose byte the server has echoed; `None` if it was refused.
async fn echoed(scene: &Scene) -> Option<TcpStream> {
    let mut client = scene.client.dial(scene.app(Family::V4)).await.ok()?;
    client.write_u8(7).await.ok()?;
    (client.read_u8().await.ok()? == 7).then_some(client)
}

async fn drain() {
    let (scene, _client, mut proxy) = Scene::with_proxies().await;
    let _app = Server::echo(&scene.server, scene.app(Family::V4).port());
    let mut open = echoed(&scene).await.expect("a connection");
    let drain = ["admin", "drain", "--deadline", "60s"];
    let draining = async { scene.server.underpass(&drain).await.ok() };
    let using = async {
        until("new connections are refused", async || echoed(&scene).await.is_none()).await;
        proxy.line(&["connection failed", "reason=\"draining\""]).await;
        let readiness = SocketAddr::from(([127, 0, 0, 1], 15021));
        let (status, body) = http_get(&scene.server, readiness, "/healthz/ready").await;
        assert_eq!((status, &*body), (503, "not ready: an operator drains the pod\n"));
        let (status, _) = scene.server.underpass(&["status"]).await.exited(3);
        assert!(status.contains("hint: `underpass admin undrain` ends the drain"), "{status}");
        open.write_u8(8).await.expect("an open connection");
        assert_eq!(open.read_u8().await.expect("an open connection"), 8);
        drop(open);
    };
    let (printed, ()) = tokio::join!(draining, using);
    assert!(printed.starts_with("draining default/server: "), "{printed}");
    assert!(printed.ends_with("\ndefault/server is drained\n"), "{printed}");
    let printed = scene.server.underpass(&["admin", "undrain"]).await.ok();
    assert_eq!(printed, "default/server accepts inbound connections\n");
    // After a refused tunnel the client's proxy waits up to 2 s.
    until("connections are accepted again", async || echoed(&scene).await.is_some()).await;
    scene.server.underpass(&["status"]).await.ok();
}

async fn drain_deadline() {
    let (scene, _client, mut proxy) = Scene::with_proxies().await;
    let _app = Server::echo(&scene.server, scene.app(Family::V4).port());
    let mut open = echoed(&scene).await.expect("a connection");
    let drain = ["admin", "drain", "--deadline", "100ms"];
    let printed = scene.server.underpass(&drain).await.ok();
    let ended = "\ndefault/server is drained: 2 inbound connections terminated\n";
    assert!(printed.ends_with(ended), "the stream and its tunnel: {printed}");
    assert_eq!(read_to_end(&mut open).await, (vec![], End::Reset));
    proxy.line(&["connection failed", "reason=\"drained\""]).await;
}

async fn liveness() {
    let (scene, _proxy) = Scene::with_plain_client(&[]).await;
    let readiness = SocketAddr::from(([127, 0, 0, 1], 15021));
    let (status, body) = http_get(&scene.client, readiness, "/healthz/live").await;
    assert_eq!((status, body.as_str()), (200, "alive\n"));
}

async fn take_over() {
    let scene = Scene::new().await;
    let settings = scene.client_settings().set("admin.address=127.0.0.1:15000");
    let mut old = scene.client.proxy(&settings).await;
    let new = scene.client.proxy(&settings.clone().take_over()).await;
    old.line(&["another process has taken over", &format!("pid={}", new.pid())]).await;
    let pid = Value::from(new.pid());
    assert_eq!(get(&scene.client, "/version").await["pid"], pid);
    let (_, body) = http_get(&scene.client, ADDRESS, "/version").await;
    assert!(body.contains(&format!("\"pid\":{pid},")), "{body}");
    assert!(old.ended().await.success(), "{}", old.log());
    assert_eq!(
        get(&scene.client, "/version").await["pid"],
        pid,
        "the old process removed the socket"
    );
}

/// A node with the pod `a`.
async fn node(broker: &str, has_proxy_process: bool) {
    let mut world = World::new();
    let (node, mut a, mut b) =
        (world.pod("node").await, world.pod("a").await, world.pod("b").await);
    world.wire(&mut a, &mut b).await;
    let (pki, folder) = (Pki::new(world.folder()), world.folder().join("pods"));
    std::fs::create_dir_all(&folder).expect("a folder");
    a.write_facts(&folder, "");
    let mesh = Mesh::default().hbone(&a).write(&node, "mesh");
    let identity = format!("identity: {{local_ca: {:?}}}", pki.dir());
    let settings = Settings::node("node", &format!("directory: {folder:?}"));
    let settings = settings.section(&identity).mesh(&mesh);
    let settings = settings.set(&format!("privileges.broker={broker}"));
    let mut daemon = node.proxy(&settings).await;
    daemon.line(&["pod enrolled", "default/a"]).await;
    let version = get(&node, "/version").await;
    assert_eq!(text(&version, "command"), "node", "{version}");
    let is_other = version["pid"] != daemon.pid();
    assert_eq!(is_other, has_proxy_process, "{version}");
    let rules = get(&node, "/rules?pod=default/a").await;
    assert_eq!(rules["is_intact"], Value::from(true), "{rules}");
    let (_, error) = node.underpass(&["admin", "get", "/rules?pod=default/c"]).await.exited(1);
    assert!(error.contains("default/c: no such pod is known to this proxy"), "{error}");
    let printed = node.underpass(&["admin", "drain", "default/a"]).await.ok();
    assert_eq!(printed, "default/a is drained\n", "it has no connection");
    let (status, _) = node.underpass(&["status"]).await.exited(3);
    assert!(
        status.contains("default/a: draining: new inbound connections are refused"),
        "{status}"
    );
    node.underpass(&["admin", "undrain", "default/a"]).await.ok();
    node.underpass(&["status"]).await.ok();
    let (status, body) = http_get(&node, ADDRESS, "/config_dump").await;
    assert!(status == 200 && body.contains("spiffe://"), "{status} {body}");
    assert!(daemon.stop().await.success(), "{}", daemon.log());
    assert!(!socket_of(&node).exists(), "the broker removes the socket");
}

async fn no_proxy() {
    let scene = Scene::new().await;
    let (_, error) = scene.client.underpass(&["admin", "get", "/version"]).await.exited(1);
    let socket = socket_of(&scene.client);
    assert!(error.contains(&format!("error: no proxy listens at {}", socket.display())), "{error}");
    assert!(error.contains("hint: start the proxy"), "{error}");
}
