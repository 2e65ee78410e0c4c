//! Tests of several pods in one process: each has its own identity and sockets, and ends by itself.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;
use underpass::testing::{TestNode, TestPod};
use underpass_tests::{
    APP, End, Family, Listener, Mesh, Pki, Pod, Proxy, Settings, Suite, World, exchange,
    read_to_end, tool, until, within,
};

/// The maximum duration of a removed pod's drain.
const DRAIN: Duration = Duration::from_millis(300);
const WORKERS: usize = 2;

fn main() -> ExitCode {
    let mut suite = Suite::new();
    suite.test_both("peers see each of two pods with its own identity", identities);
    suite.test("removing a pod loses no byte of another pod, and frees its namespace", removal);
    suite.run()
}

/// Two pods `a` and `b` of one node, and a pod `c` with a separate proxy, all wired to each other.
struct Scene {
    world: World,
    a: Pod,
    b: Pod,
    c: Pod,
    pki: Pki,
}

impl Scene {
    async fn new() -> Self {
        let mut world = World::new();
        let (mut a, mut b) = (world.pod("a").await, world.pod("b").await);
        let mut c = world.pod("c").await;
        world.wire(&mut a, &mut c).await;
        world.wire(&mut b, &mut c).await;
        world.wire(&mut a, &mut b).await;
        let pki = Pki::new(world.folder());
        let scene = Self { world, a, b, c, pki };
        scene.set_mesh();
        scene
    }

    /// Policies forbid a pod to connect to itself, so a tunnel with the other pod's identity is
    /// refused.
    fn set_mesh(&self) {
        let of = |name| format!("{{exact: cluster.local/ns/default/sa/{name}}}");
        let from = |one, other| format!("[[[{{principals: [{}, {}]}}]]]", of(one), of(other));
        let mesh = Mesh::default()
            .workload_with("a", &self.a.ips(), "HBONE", ", authorizationPolicies: [default/to-a]")
            .workload_with("b", &self.b.ips(), "HBONE", ", authorizationPolicies: [default/to-b]")
            .hbone(&self.c)
            .selector_policy("to-a", "Allow", &from("b", "c"))
            .selector_policy("to-b", "Allow", &from("a", "c"));
        let file = mesh.write(&self.c, "mesh");
        assert_eq!(file, self.mesh());
    }

    fn mesh(&self) -> PathBuf {
        self.world.folder().join("mesh.yaml")
    }

    fn settings(&self, name: &str) -> Settings {
        let settings = Settings::new(name).identity(&self.pki.issue(name)).mesh(&self.mesh());
        settings.set("proxy.mtls=strict").set("interception.on_exit=remove")
    }

    async fn node(&self) -> (TestNode, TestPod, TestPod) {
        let [a, b] = ["a", "b"].map(|name| self.settings(name));
        let node = TestNode::start(&a.load(&self.a), WORKERS).expect("a node");
        let first = node.add_pod(a.load(&self.a), self.a.namespace().clone()).await;
        let second = node.add_pod(b.load(&self.b), self.b.namespace().clone()).await;
        (node, first.expect("a pod"), second.expect("a pod"))
    }

    async fn proxy(&self) -> Proxy {
        self.c.proxy(&self.settings("c")).await
    }

    /// The address of `a` or `b` on the wire between them.
    fn between(pod: &Pod, family: Family) -> SocketAddr {
        let is_of_family = |ip: &IpAddr| ip.is_ipv4() == (family == Family::V4);
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

async fn identities(family: Family) {
    let scene = Scene::new().await;
    let Scene { a, b, c, pki, .. } = &scene;
    let (node, first, second) = scene.node().await;
    let mut proxy = scene.proxy().await;
    let [app_a, app_b, app_c] = [a, b, c].map(|pod| pod.listen(APP));
    for pod in [&first, &second] {
        pod.verify().await.expect("the rules of its settings");
    }

    // Between both pods, in both directions.
    let (from_a, from_b) = (Scene::between(a, family), Scene::between(b, family));
    assert_eq!(connect(a, &app_b, from_b).await.2.ip(), from_a.ip());
    assert_eq!(connect(b, &app_a, from_a).await.2.ip(), from_b.ip());
    // From both pods to others, and from others to both.
    for (pod, app) in [(a, &app_a), (b, &app_b)] {
        let identity = pki.id(pod.name()).to_string();
        let (_, _, peer) = connect(pod, &app_c, c.at(family, APP)).await;
        assert_eq!(peer.ip(), pod.ip(family));
        let source = format!("src.identity=\"{identity}\"");
        proxy.line(&["connection complete", "direction=\"inbound\"", &source]).await;
        connect(c, app, pod.at(family, APP)).await;
        let destination = format!("dst.identity=\"{identity}\"");
        proxy.line(&["connection complete", "direction=\"outbound\"", &destination]).await;
    }
    for pod in [first, second] {
        node.remove_pod(pod, DRAIN).await.expect("removed");
    }
    node.stop().await;
}

/// Sends ascending numbers as fast as possible until `enough`. Returns their count.
async fn send(mut to: TcpStream, enough: watch::Receiver<bool>) -> u64 {
    let mut sent = 0_u64;
    while !*enough.borrow() {
        let block: Vec<u8> = (sent..sent + 1024).flat_map(u64::to_be_bytes).collect();
        within("bytes are sent", to.write_all(&block)).await.expect("not reset");
        sent += 1024;
    }
    to.shutdown().await.expect("an end");
    sent
}

/// Receives numbers, and checks that each follows the one before. Returns their count.
async fn receive(mut from: TcpStream, progress: watch::Sender<u64>) -> u64 {
    let (mut received, mut block) = (0_u64, vec![0; 8 * 1024]);
    loop {
        match within("bytes arrive", from.read_exact(&mut block)).await {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return received,
            read => read.expect("not reset"),
        };
        for number in block.chunks_exact(8) {
            assert_eq!(number, received.to_be_bytes());
            received += 1;
        }
        progress.send_replace(received);
    }
}

async fn removal() {
    let scene = Scene::new().await;
    let (node, first, second) = scene.node().await;
    let _proxy = scene.proxy().await;
    let Scene { a, b, c, .. } = scene;
    let app = c.listen(APP);
    let to = c.at(Family::V4, APP);
    let (client, server, _) = connect(&a, &app, to).await;
    let (enough, until_enough) = watch::channel(false);
    let (progress, mut received) = watch::channel(0);
    let sending = tokio::spawn(send(client, until_enough));
    let receiving = tokio::spawn(receive(server, progress));
    // Open connections of the removed pod: an outbound and an inbound one.
    let (mut own, _server, _) = connect(&b, &app, to).await;
    let app_b = b.listen(APP);
    let (mut other, server, _) = connect(&a, &app_b, Scene::between(&b, Family::V4)).await;

    let before = *received.borrow_and_update();
    let aborted = node.remove_pod(second, DRAIN).await.expect("removed");
    assert!(aborted >= 2, "{aborted}");
    assert_eq!(read_to_end(&mut own).await.1, End::Reset);
    assert_eq!(read_to_end(&mut other).await.1, End::Reset);
    received.wait_for(|now| *now > before).await.expect("it goes on");
    connect(&a, &app, to).await;

    drop((own, server, app_b, b));
    until("the namespace is gone, and its end of the link", async || {
        let links = tool(&c, "ip", &["-o", "link"]).await.ok();
        links.contains("eth0") && !links.contains("eth1")
    })
    .await;
    connect(&a, &app, to).await;
    enough.send_replace(true);
    let (sent, received) = (sending.await.expect("sent"), receiving.await.expect("received"));
    assert_eq!((sent, received > before), (received, true));
    assert_eq!(node.remove_pod(first, DRAIN).await.expect("removed"), 0);
    node.stop().await;
}
