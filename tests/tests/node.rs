//! Tests of `underpass node`: identities, waits for certificate and mesh, drain, crash, and
//! isolation of pods, independent of the source of pods. `node_directory.rs` tests that source.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;

use nix::sys::signal::Signal;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use underpass_tests::{
    APP, Dial, End, Family, HBONE, Listener, Mesh, Pki, Pod, Proxy, Settings, Suite, TlsClient,
    World, exchange, http_get, read_to_end, until, within,
};

const V4: Family = Family::V4;

fn main() -> ExitCode {
    let mut suite = Suite::new();
    suite.test_both(
        "pods of a node reach each other and a pod with another proxy",
        pods_exchange_bytes,
    );
    suite.test("removing a pod does not disturb the stream of another pod", removal);
    suite.test("a pod with another service account than in the mesh is refused", other_identity);
    suite.test("connections of a new pod wait for its certificate", awaited_certificate);
    suite.test("connections of a new pod wait until the mesh has it", awaited_mesh);
    suite.test(
        "pods refuse connections after the daemon is killed, and the next daemon serves them",
        crash,
    );
    suite.test("a stopped daemon drains every pod, and keeps the rules", stop);
    suite.test(
        "a flood of connections from one pod does not disturb its neighbour",
        flood_of_one_pod,
    );
    suite.run()
}

/// The pods `a` and `b` of a node, and a pod `c` with a separate proxy, all wired to each other.
/// The daemon runs in a separate namespace.
struct Scene {
    world: World,
    node: Pod,
    a: Pod,
    b: Pod,
    c: Pod,
    pki: Pki,
}

impl Scene {
    async fn new() -> Self {
        let mut world = World::new();
        let node = world.pod("node").await;
        let (mut a, mut b) = (world.pod("a").await, world.pod("b").await);
        let mut c = world.pod("c").await;
        world.wire(&mut a, &mut c).await;
        world.wire(&mut b, &mut c).await;
        world.wire(&mut a, &mut b).await;
        let pki = Pki::new(world.folder());
        let scene = Self { world, node, a, b, c, pki };
        fs::create_dir(scene.folder()).expect("a folder");
        scene.set_mesh(&[&scene.a, &scene.b, &scene.c]);
        scene
    }

    /// The scene with a running daemon, its pods `a` and `b`, and the proxy of `c`.
    async fn served() -> (Self, Proxy, Proxy) {
        let scene = Self::new().await;
        let daemon = scene.daemon().await;
        let proxy = scene.proxy().await;
        for pod in [&scene.a, &scene.b] {
            scene.add(pod, pod.name());
        }
        scene.serves(&["a", "b"]).await;
        (scene, daemon, proxy)
    }

    /// The folder of the pods' files.
    fn folder(&self) -> PathBuf {
        self.world.folder().join("pods")
    }

    /// Writes the file of a pod with this service account.
    fn add(&self, pod: &Pod, account: &str) {
        let (name, netns) = (pod.name(), pod.namespace().path().display());
        let ips: Vec<String> =
            pod.ips().iter().map(|ip| format!("{ip:?}").replace(' ', "")).collect();
        let ips = ips.iter().map(|ip| format!("\"{ip}\"")).collect::<Vec<_>>().join(", ");
        let workload = format!("{{name: {name}, namespace: default, serviceAccount: {account}}}");
        let text = format!("uid: uid-{name}\nnetns: {netns}\nips: [{ips}]\nworkload: {workload}\n");
        let file = self.file(name);
        fs::write(file.with_extension("new"), text).expect("a file");
        fs::rename(file.with_extension("new"), file).expect("a file");
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder().join(format!("{name}.yaml"))
    }

    fn set_mesh(&self, pods: &[&Pod]) {
        let mesh = pods.iter().fold(Mesh::default(), |mesh, pod| mesh.hbone(pod));
        assert_eq!(mesh.write(&self.c, "mesh"), self.mesh());
    }

    fn mesh(&self) -> PathBuf {
        self.world.folder().join("mesh.yaml")
    }

    fn settings(&self) -> Settings {
        Settings::node("node", &format!("directory: {}", self.folder().display()))
            .mesh(&self.mesh())
            .section(&format!("identity: {{local_ca: {}}}", self.pki.dir().display()))
            .set("proxy.mtls=strict")
    }

    async fn daemon(&self) -> Proxy {
        self.node.proxy(&self.settings()).await
    }

    async fn proxy(&self) -> Proxy {
        let settings = Settings::new("c").identity(&self.pki.issue("c")).mesh(&self.mesh());
        self.c.proxy(&settings.set("proxy.mtls=strict")).await
    }

    /// The status of all pods.
    async fn status(&self) -> String {
        http_get(&self.node, SocketAddr::from(([127, 0, 0, 1], 15021)), "/healthz/pods").await.1
    }

    /// Waits until exactly these pods are served.
    async fn serves(&self, names: &[&str]) {
        let expected: String =
            names.iter().map(|name| format!("default/{name} uid-{name} serving\n")).collect();
        until(&format!("served:\n{expected}"), async || self.status().await == expected).await;
    }

    /// The address of `a` or `b` on the wire between them.
    fn between(pod: &Pod, family: Family) -> SocketAddr {
        let is_of_family = |ip: &IpAddr| ip.is_ipv4() == (family == V4);
        let address = pod.ips().into_iter().rev().find(is_of_family);
        SocketAddr::new(address.expect("an address"), APP)
    }
}

/// Opens a connection and exchanges bytes in both directions. Also returns the source address that
/// the application saw.
async fn connect(from: &Pod, app: &Listener, to: SocketAddr) -> (TcpStream, TcpStream, SocketAddr) {
    let (mut client, mut server, peer) = from.meet(app, to).await;
    exchange(&mut client, &mut server).await;
    (client, server, peer)
}

/// Dials, and waits for the reset. A proxy accepts a connection before it refuses it.
async fn is_reset(from: &Pod, to: SocketAddr) {
    let mut stream = from.dial(to).await.expect("captured");
    let read = within("a reset", stream.read_u8()).await;
    assert_eq!(read.expect_err("no byte").kind(), std::io::ErrorKind::ConnectionReset);
}

async fn pods_exchange_bytes(family: Family) {
    let (scene, mut daemon, mut proxy) = Scene::served().await;
    let Scene { a, b, c, pki, .. } = &scene;
    let [app_a, app_b, app_c] = [a, b, c].map(|pod| pod.listen(APP));
    let (from_a, from_b) = (Scene::between(a, family), Scene::between(b, family));
    assert_eq!(connect(a, &app_b, from_b).await.2.ip(), from_a.ip());
    assert_eq!(connect(b, &app_a, from_a).await.2.ip(), from_b.ip());
    for (pod, app) in [(a, &app_a), (b, &app_b)] {
        let identity = pki.id(pod.name()).to_string();
        let (_, _, peer) = connect(pod, &app_c, c.at(family, APP)).await;
        assert_eq!(peer.ip(), pod.ip(family), "the application sees the client's address");
        let source = format!("src.identity=\"{identity}\"");
        proxy.line(&["connection complete", "direction=\"inbound\"", &source]).await;
        connect(c, app, pod.at(family, APP)).await;
        let destination = format!("dst.identity=\"{identity}\"");
        proxy.line(&["connection complete", "direction=\"outbound\"", &destination]).await;
    }
    let metrics = scene.node.metrics().await;
    assert_eq!(metrics.sum("underpass_pods", &[("state", "serving")]), Some(2.0));
    daemon.line(&["pod{name=\"default/a\"}", "rules installed"]).await;
}

async fn removal() {
    let (scene, _daemon, _proxy) = Scene::served().await;
    let Scene { a, b, c, .. } = &scene;
    let app = c.listen(APP);
    let (mut client, mut server, _) = connect(a, &app, c.at(V4, APP)).await;
    let (mut removed, _server, _) = connect(b, &app, c.at(V4, APP)).await;
    fs::remove_file(scene.file("b")).expect("a file");
    until("b is gone", async || scene.status().await == "default/a uid-a serving\n").await;
    assert_eq!(read_to_end(&mut removed).await.1, End::Reset, "its drain has a deadline");
    exchange(&mut client, &mut server).await;
    connect(a, &app, c.at(V4, APP)).await;
    scene.add(b, "b");
    scene.serves(&["a", "b"]).await;
    connect(b, &app, c.at(V4, APP)).await;
}

async fn other_identity() {
    let scene = Scene::new().await;
    let (_daemon, mut proxy) = (scene.daemon().await, scene.proxy().await);
    let Scene { a, b, c, .. } = &scene;
    scene.add(a, "b");
    scene.add(b, "b");
    scene.serves(&["a", "b"]).await;
    let _app = a.listen(APP);
    is_reset(c, a.at(V4, APP)).await;
    proxy.line(&["connection failed", "reason=\"identity\""]).await;
    let app = b.listen(APP);
    connect(c, &app, b.at(V4, APP)).await;
}

async fn awaited_certificate() {
    let scene = Scene::new().await;
    let key = scene.pki.dir().join("ca.key");
    let kept = key.with_extension("kept");
    let proxy = scene.proxy().await;
    fs::rename(&key, &kept).expect("the key");
    let mut daemon = scene.daemon().await;
    let Scene { a, c, .. } = &scene;
    scene.add(a, "a");
    let awaited = "default/a uid-a serving: its first certificate is not issued yet\n";
    until("the certificate is awaited", async || scene.status().await == awaited).await;
    daemon.line(&["cannot get a certificate"]).await;
    let (app_a, app_c) = (a.listen(APP), c.listen(APP));
    let (out, into) = (connect(a, &app_c, c.at(V4, APP)), connect(c, &app_a, a.at(V4, APP)));
    let restore = async { fs::rename(&kept, &key).expect("the key") };
    let ((_, _, peer), _, ()) = tokio::join!(out, into, restore);
    assert_eq!(peer.ip(), a.ip(V4));
    scene.serves(&["a"]).await;
    assert_eq!(proxy.count(&["connection failed"]), 0, "{}", proxy.log());
}

async fn awaited_mesh() {
    let scene = Scene::new().await;
    let Scene { a, b, c, .. } = &scene;
    scene.set_mesh(&[b, c]);
    let mut daemon = scene.node.proxy(&scene.settings().set("timeouts.connect=1s")).await;
    let _proxy = scene.proxy().await;
    scene.add(a, "a");
    scene.serves(&["a"]).await;
    let app = c.listen(APP);
    is_reset(a, c.at(V4, APP)).await;
    daemon.line(&["connection failed", "reason=\"pod_not_in_mesh\""]).await;
    let (connected, ()) = tokio::join!(a.meet(&app, c.at(V4, APP)), async {
        scene.set_mesh(&[a, b, c]);
    });
    let (mut client, mut server, _) = connected;
    exchange(&mut client, &mut server).await;
}

async fn crash() {
    let (scene, mut daemon, _proxy) = Scene::served().await;
    let Scene { a, c, .. } = &scene;
    let app = c.listen(APP);
    connect(a, &app, c.at(V4, APP)).await;
    daemon.signal(Signal::SIGKILL);
    daemon.ended().await;
    a.dial_and_be_refused(c.at(V4, APP)).await;
    let _daemon = scene.daemon().await;
    scene.serves(&["a", "b"]).await;
    connect(a, &app, c.at(V4, APP)).await;
}

async fn stop() {
    let (scene, mut daemon, _proxy) = Scene::served().await;
    let Scene { a, b, c, .. } = &scene;
    let app = c.listen(APP);
    let (mut client, mut server, _) = connect(a, &app, c.at(V4, APP)).await;
    let (mut endless, _server, _) = connect(b, &app, c.at(V4, APP)).await;
    daemon.signal(Signal::SIGTERM);
    daemon.line(&["stopping", "pods=2"]).await;
    exchange(&mut client, &mut server).await;
    drop((client, server));
    assert_eq!(read_to_end(&mut endless).await.1, End::Reset);
    assert!(daemon.ended().await.success());
    a.dial_and_be_refused(c.at(V4, APP)).await;
}

async fn flood_of_one_pod() {
    let (scene, _daemon, _proxy) = Scene::served().await;
    let Scene { a, b, c, .. } = &scene;
    // More handshakes than one source may have in progress, none of which completes. The mark keeps
    // them from the proxy of `c`.
    let (client, mark) = (TlsClient::new(None), Some(0x539));
    let mut begun = Vec::new();
    for _ in 0..300 {
        let dialled = c.dial_as(a.at(V4, HBONE), Dial { mark, source: None }).await;
        // The connections beyond the limit are closed, before or after their ClientHello.
        begun.extend(client.begin(dialled.expect("accepted")).await.ok());
    }
    let app_c = c.listen(APP);
    let mut open = Vec::new();
    for _ in 0..200 {
        open.push(connect(a, &app_c, c.at(V4, APP)).await);
    }
    let app_b = b.listen(APP);
    let (mut client, mut server, _) = connect(c, &app_b, b.at(V4, APP)).await;
    exchange(&mut client, &mut server).await;
    connect(b, &app_c, c.at(V4, APP)).await;
}
