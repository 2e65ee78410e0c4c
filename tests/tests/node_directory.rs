//! Tests of the source `node.pods.directory`: files add, change and remove pods, foreign namespaces
//! are refused, and the node's probes reach strict pods.
#![expect(clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;

use underpass_interception::{HOST_TABLE, IpNet, KUBELET_PROBE_V4, KUBELET_PROBE_V6, TABLE};
use underpass_tests::{
    APP, Family, Mesh, Pki, Pod, Proxy, Settings, Suite, World, exchange, tool, until,
};

fn main() -> ExitCode {
    let mut suite = Suite::new();
    suite.test("files of a folder add and remove pods while others carry traffic", lifecycle);
    suite.test("a changed file changes the rules of its running pod", changes);
    suite.test_both("pods with addresses of one family exchange data in a tunnel", one_family);
    suite.test("namespaces that cannot be the pod's are refused", foreign_namespaces);
    suite.test_both("the node's own connections reach a strict pod from the probe address", probes);
    suite.run()
}

/// A node with the pods `a` and `b`, and another host `other` that is wired to `a`.
struct Scene {
    node: Pod,
    a: Pod,
    b: Pod,
    other: Pod,
    pki: Pki,
    world: World,
}

impl Scene {
    async fn new() -> Self {
        let mut world = World::new();
        let (mut node, mut other) = (world.pod("node").await, world.pod("other").await);
        let (mut a, mut b) = (world.pod("a").await, world.pod("b").await);
        world.wire(&mut node, &mut a).await;
        world.wire(&mut node, &mut b).await;
        world.wire(&mut a, &mut b).await;
        world.wire(&mut a, &mut other).await;
        let pki = Pki::new(world.folder());
        let scene = Self { node, a, b, other, pki, world };
        fs::create_dir_all(scene.folder()).expect("a folder");
        scene
    }

    fn folder(&self) -> PathBuf {
        self.world.folder().join("pods")
    }

    /// Starts the daemon in the node's namespace.
    async fn daemon(&self, assignments: &[&str]) -> Proxy {
        let mesh = Mesh::default().hbone(&self.a).hbone(&self.b).write(&self.node, "mesh");
        let source = format!("directory: {:?}", self.folder());
        let identity = format!("identity: {{local_ca: {:?}}}", self.pki.dir());
        let settings = Settings::node("node", &source).section(&identity).mesh(&mesh);
        let settings = settings.set("proxy.mtls=strict");
        let set = |all: Settings, one: &&str| all.set(one);
        self.node.proxy(&assignments.iter().fold(settings, set)).await
    }

    /// Writes the file of a pod atomically.
    fn write(&self, name: &str, text: &str) {
        let file = self.folder().join(format!("{name}.yaml"));
        fs::write(file.with_extension("new"), text).expect("a file");
        fs::rename(file.with_extension("new"), file).expect("a file");
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.folder().join(format!("{name}.yaml"))).expect("a file");
    }

    /// The address of `b` on its wire with `a`.
    fn b_from_a(&self) -> SocketAddr {
        SocketAddr::new(self.b.ips()[2], APP)
    }
}

fn file_of(pod: &Pod, more: &str) -> String {
    file_with_ips(pod, &pod.ips(), more)
}

fn file_with_ips(pod: &Pod, ips: &[IpAddr], more: &str) -> String {
    let (name, netns) = (pod.name(), pod.namespace().path());
    let ips: Vec<_> = ips.iter().map(|ip| format!("\"{ip}\"")).collect();
    let ips = ips.join(", ");
    format!(
        "uid: {name}\nnetns: {netns:?}\nips: [{ips}]\n\
         workload: {{name: {name}, namespace: default, serviceAccount: {name}}}\n{more}"
    )
}

async fn has_table(pod: &Pod, table: &str) -> bool {
    tool(pod, "nft", &["list", "table", "inet", table]).await.status.success()
}

async fn stopped(mut daemon: Proxy) {
    let status = daemon.stop().await;
    assert!(status.success(), "{status}; the log:\n{}", daemon.log());
}

async fn lifecycle() {
    let scene = Scene::new().await;
    scene.write("a", &file_of(&scene.a, ""));
    let mut daemon = scene.daemon(&[]).await;
    daemon.line(&["pod enrolled", "default/a"]).await;
    scene.write("b", &file_of(&scene.b, ""));
    daemon.line(&["pod enrolled", "default/b"]).await;
    let app = scene.b.listen(APP);
    let (mut client, mut server, peer) = scene.a.meet(&app, scene.b_from_a()).await;
    exchange(&mut client, &mut server).await;
    assert_eq!(peer.ip(), scene.a.ips()[2], "the client's own address on that wire");

    // A wrong file, and its correction.
    scene.write("a", "uid: [");
    daemon.line(&["cannot use the file of a pod", "a.yaml"]).await;
    exchange(&mut client, &mut server).await;
    scene.write("a", &file_of(&scene.a, ""));
    // A pod that is added and removed.
    let c = scene.world.pod("c").await;
    scene.write("c", &file_of(&c, "").replace("ips: []", "ips: [192.0.2.1]"));
    daemon.line(&["cannot enrol the pod", "default/c", "none of the pod's addresses"]).await;
    scene.remove("c");
    exchange(&mut client, &mut server).await;

    // A pod that is removed while its neighbour carries traffic: its rules and its namespace are
    // removed too.
    let (mut other, mut other_server, _) = scene.a.meet(&app, scene.b_from_a()).await;
    exchange(&mut other, &mut other_server).await;
    let app_a = scene.a.listen(APP + 1);
    scene.remove("b");
    daemon.line(&["pod removed", "uid=b"]).await;
    assert!(!has_table(&scene.b, TABLE).await && has_table(&scene.a, TABLE).await);
    assert_eq!(daemon.count(&["pod removed", "uid=a"]), 0);
    drop((client, server, other, other_server, app));
    let Scene { a, b, node, .. } = scene;
    drop(b);
    until("the namespace is gone from the kernel, and its end of the links", async || {
        let links = tool(&node, "ip", &["-o", "link"]).await.ok();
        links.contains("eth0") && !links.contains("eth1")
    })
    .await;
    drop((app_a, a));
    stopped(daemon).await;
}

async fn changes() {
    let scene = Scene::new().await;
    for pod in [&scene.a, &scene.b] {
        scene.write(pod.name(), &file_of(pod, ""));
    }
    let mut daemon = scene.daemon(&[]).await;
    for pod in ["default/a", "default/b"] {
        daemon.line(&["pod enrolled", pod]).await;
    }
    let app = scene.b.listen(APP);
    let (mut client, mut server, _) = scene.a.meet(&app, scene.b_from_a()).await;
    exchange(&mut client, &mut server).await;
    // Strict mTLS: plaintext is refused, until the port is excluded from capture.
    scene.node.dial_and_see_reset(SocketAddr::new(scene.b.ips()[0], APP)).await;
    let excluded = "annotations: {traffic.sidecar.istio.io/excludeInboundPorts: \"8080\"}";
    scene.write("b", &file_of(&scene.b, excluded));
    until("the port is excluded", async || {
        tool(&scene.b, "nft", &["list", "ruleset"]).await.ok().contains("tcp dport 8080")
    })
    .await;
    scene.node.meet(&app, SocketAddr::new(scene.b.ips()[0], APP)).await;
    exchange(&mut client, &mut server).await;
    assert_eq!(daemon.count(&["pod removed"]), 0);
    // A hostile annotation does not change the rules.
    let hostile = "annotations: {istio.io/reroute-virtual-interfaces: \"eth0 -j ACCEPT\"}";
    scene.write("a", &file_of(&scene.a, hostile));
    daemon.line(&["cannot enrol the pod", "default/a", "reroute-virtual-interfaces"]).await;
    assert!(has_table(&scene.a, TABLE).await, "the pod stays closed");
    stopped(daemon).await;
}

/// `proxy.mtls: strict` refuses data outside of a tunnel.
async fn one_family(family: Family) {
    let scene = Scene::new().await;
    let is_of_family = |ip: &IpAddr| ip.is_ipv4() == (family == Family::V4);
    for pod in [&scene.a, &scene.b] {
        match family {
            Family::V4 => pod.sysctl("net/ipv6/conf/all/disable_ipv6", "1"),
            Family::V6 => {
                let flush = ["-4", "address", "flush", "scope", "global"];
                tool(pod, "ip", &flush).await.ok();
            }
        }
        let ips: Vec<_> = pod.ips().into_iter().filter(is_of_family).collect();
        scene.write(pod.name(), &file_with_ips(pod, &ips, ""));
    }
    let mut daemon = scene.daemon(&[]).await;
    for pod in ["default/a", "default/b"] {
        daemon.line(&["pod enrolled", pod]).await;
    }
    let app = scene.b.listen(APP);
    let b_from_a = scene.b.ips().into_iter().rev().find(is_of_family).expect("an address");
    let (mut client, mut server, _) = scene.a.meet(&app, SocketAddr::new(b_from_a, APP)).await;
    exchange(&mut client, &mut server).await;
    stopped(daemon).await;
}

async fn foreign_namespaces() {
    let scene = Scene::new().await;
    let mut daemon = scene.daemon(&[]).await;
    let of_a = |netns: &str| {
        file_of(&scene.a, "").replace(&format!("{:?}", scene.a.namespace().path()), netns)
    };
    let node = scene.node.namespace().path().display().to_string();
    for (netns, reason) in [
        ("/proc/self/ns/net", "symbolic link"),
        ("/proc/version", "not a namespace"),
        ("/nowhere/netns", "No such file"),
        (node.as_str(), "that of underpass itself"),
    ] {
        scene.write("a", &of_a(netns));
        daemon.line(&["cannot", "default/a", reason]).await;
        assert!(!has_table(&scene.a, TABLE).await && !has_table(&scene.node, TABLE).await);
    }
    scene.write("a", &file_of(&scene.b, "").replace("uid: b", "uid: a"));
    daemon.line(&["pod enrolled", "uid=a"]).await;
    scene.write("b", &file_of(&scene.b, ""));
    daemon.line(&["cannot add the pod", "the pod's network namespace belongs to the pod a"]).await;
    stopped(daemon).await;
}

async fn probes(family: Family) {
    let scene = Scene::new().await;
    scene.write("a", &file_of(&scene.a, ""));
    let mut daemon = scene.daemon(&["node.probes=translate", "interception.on_exit=remove"]).await;
    daemon.line(&["pod enrolled", "default/a"]).await;
    let probe: IpAddr = match family {
        Family::V4 => KUBELET_PROBE_V4.into(),
        Family::V6 => KUBELET_PROBE_V6.into(),
    };
    let gateway = scene.node.ip(family);
    let route = scene.a.namespace().add_route(IpNet::from(probe), gateway).await;
    route.expect("a route to the probe address");
    let app = scene.a.listen(APP);
    until("the pod is in the set", async || {
        let table = tool(&scene.node, "nft", &["list", "table", "inet", HOST_TABLE]).await.out;
        table.contains(&scene.a.ip(family).to_string())
    })
    .await;
    let (mut client, mut server, peer) = scene.node.meet(&app, scene.a.at(family, APP)).await;
    exchange(&mut client, &mut server).await;
    assert_eq!(peer.ip(), probe);

    // Connections of another host are not probes.
    let is_of_family = |ip: &IpAddr| ip.is_ipv4() == (family == Family::V4);
    let to_a = scene.a.ips().into_iter().rev().find(is_of_family).expect("an address");
    scene.other.dial_and_see_reset(SocketAddr::new(to_a, APP)).await;

    // Another program removes the rules.
    let deleted = tool(&scene.node, "nft", &["delete", "table", "inet", HOST_TABLE]).await;
    assert!(deleted.status.success(), "{}", deleted.err);
    daemon.line(&["another program changed the rules for kubelet probes"]).await;
    let (_client, _server, peer) = scene.node.meet(&app, scene.a.at(family, APP)).await;
    assert_eq!(peer.ip(), probe);

    // A removed pod leaves the set of translated addresses.
    scene.remove("a");
    daemon.line(&["pod removed", "uid=a"]).await;
    until("the pod is not in the set", async || {
        let table = tool(&scene.node, "nft", &["list", "table", "inet", HOST_TABLE]).await.out;
        !table.contains(&scene.a.ip(family).to_string())
    })
    .await;
    let (_client, _server, peer) = scene.node.meet(&app, scene.a.at(family, APP)).await;
    assert_eq!(peer.ip(), scene.node.ip(family), "no longer translated");
    stopped(daemon).await;
    assert!(!has_table(&scene.node, HOST_TABLE).await);
}
