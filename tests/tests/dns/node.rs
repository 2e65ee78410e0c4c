//! Tests of the DNS proxies of a node daemon, with the broker and without.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use underpass_tests::{Background, Mesh, Pki, Pod, Settings, Suite, World, tool};

use crate::restart::{ANSWER_TIMEOUT, ANY, ask, bind};
use crate::scene::{SERVICE, VIP, dnsmasq};

pub(crate) fn add_tests(suite: &mut Suite) {
    for broker in ["auto", "off"] {
        let name = format!("every pod of a node has a DNS proxy (privileges.broker: {broker})");
        suite.test(&name, async move || pods_of_node(broker).await);
        let name = format!("hot restart of a node loses no query (privileges.broker: {broker})");
        suite.test(&name, async move || hot_restart(broker).await);
    }
}

/// A node with the pods `a` and `b`, whose DNS server is another pod.
struct NodeScene {
    node: Pod,
    pods: [Pod; 2],
    /// The address of the server on the link with each pod.
    servers: [IpAddr; 2],
    settings: Settings,
    _server: (Pod, Background),
    _world: World,
}

impl NodeScene {
    async fn new(broker: &str) -> Self {
        let mut world = World::new();
        let (node, mut server) = (world.pod("node").await, world.pod("server").await);
        let mut pods = [world.pod("a").await, world.pod("b").await];
        for pod in &mut pods {
            world.wire(pod, &mut server).await;
        }
        let pki = Pki::new(world.folder());
        let folder = world.folder().join("pods");
        fs::create_dir_all(&folder).expect("a folder");
        let record = "--host-record=other.example,192.0.2.7".to_owned();
        let running = dnsmasq(&server, &[record]).await;
        let resolv_conf = world.folder().join("resolv.conf");
        fs::write(&resolv_conf, "nameserver 192.0.2.1\noptions timeout:1 attempts:1\n")
            .expect("a file");
        // Each pod has a route to one address of the server only. The first pod has the server of
        // the cluster, and the other one its own.
        let servers = [server.ips()[0], server.ips()[2]];
        let dns = format!("dns: {{nameservers: [{}]}}", servers[1]);
        for (pod, namespace, dns) in [(&pods[0], "default", ""), (&pods[1], "shop", &*dns)] {
            write(pod, namespace, dns, &folder);
        }
        let service = |hostname: &str, vip: &str| format!("hostname: {hostname}, vips: [/{vip}]");
        let mesh = Mesh::default().hbone(&pods[0]).hbone(&pods[1]);
        let mesh = mesh
            .service(&service(SERVICE, VIP))
            .service(&service("web.shop.svc.cluster.local", "10.99.0.2"))
            .write(&node, "mesh");
        let source = format!("directory: {folder:?}");
        let identity = format!("identity: {{local_ca: {:?}}}", pki.dir());
        let settings = Settings::node("node", &source).section(&identity).mesh(&mesh);
        let settings = settings
            .set("interception.dns=capture")
            .set(&format!("privileges.broker={broker}"))
            .set(&format!("node.cluster_dns={}", servers[0]))
            .set(&format!("dns.resolv_conf={}", resolv_conf.display()));
        let _server = (server, running);
        Self { node, pods, servers, settings, _server, _world: world }
    }
}

async fn pods_of_node(broker: &str) {
    let NodeScene { node, pods, servers, settings, .. } = &NodeScene::new(broker).await;
    let mut daemon = node.proxy(settings).await;
    daemon.line(&["pod enrolled", "default/a"]).await;
    daemon.line(&["pod enrolled", "shop/b"]).await;
    for (pod, (own, server)) in pods.iter().zip([(VIP, servers[0]), ("10.99.0.2", servers[1])]) {
        let server = format!("@{server}");
        for (name, protocol, expected) in
            [("web", "+notcp", own), ("web", "+tcp", own), ("other.example", "+tcp", "192.0.2.7")]
        {
            let found = tool(pod, "dig", &[&server, "+short", protocol, name]).await.ok();
            assert_eq!(found.trim(), expected, "{} {name} {protocol}", pod.name());
        }
        let found = tool(pod, "dig", &[&server, "+short", "other.example"]).await.ok();
        assert_eq!(found.trim(), "192.0.2.7", "{}", pod.name());
    }
    assert!(daemon.stop().await.success(), "{}", daemon.log());
}

async fn hot_restart(broker: &str) {
    let NodeScene { node, pods, servers, settings, .. } = &NodeScene::new(broker).await;
    let mut old = node.proxy(settings).await;
    for pod in ["default/a", "shop/b"] {
        old.line(&["pod enrolled", pod]).await;
    }
    let sockets = [&pods[0], &pods[1]].map(|pod| bind(pod, ANY));
    let servers = servers.map(|ip| SocketAddr::new(ip, 53));
    let ask_both = async |name: &str, id: u16| {
        for (socket, server) in sockets.iter().zip(servers) {
            ask(socket, server, name, id, ANSWER_TIMEOUT).await;
        }
    };
    let mut id = 0;
    for _ in 0..2 {
        let settings = settings.clone().take_over();
        let mut starting = std::pin::pin!(node.proxy(&settings));
        let new = loop {
            tokio::select! {
                new = &mut starting => break new,
                () = ask_both(SERVICE, id) => id += 1,
            }
        };
        old.line(&["another process has taken over"]).await;
        assert!(old.ended_by_itself().await.success(), "{}", old.log());
        old = new;
        for name in [SERVICE, "other.example"] {
            id += 1;
            ask_both(name, id).await;
        }
        id += 1;
    }
    assert!(id > 100, "queries during the restarts: {id}");
    assert!(old.stop().await.success(), "{}", old.log());
}

/// Writes the file of a pod in this namespace of the mesh, with its resolver settings.
fn write(pod: &Pod, namespace: &str, dns: &str, folder: &Path) {
    let (name, netns) = (pod.name(), pod.namespace().path());
    let workload = format!("{{name: {name}, namespace: {namespace}, serviceAccount: {name}}}");
    let ips: Vec<_> = pod.ips().iter().map(|ip| format!("'{ip}'")).collect();
    let text = format!(
        "uid: {name}-uid\nnetns: {netns:?}\nworkload: {workload}\nips: [{}]\n{dns}\n",
        ips.join(", ")
    );
    fs::write(folder.join(format!("{name}.yaml")), text).expect("a file");
}
