//! End-to-end tests of a node daemon whose pods come from a scripted node agent (ZDS), in place of
//! istio-cni.
#![expect(clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod agent;

use std::fs::File;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use tokio::net::TcpStream;
use underpass_tests::{
    APP, Family, Listener, Mesh, Pki, Pod, Proxy, Settings, Suite, World, exchange, http_get, tool,
    until,
};

use crate::agent::{Agent, Connection};

fn main() -> ExitCode {
    let mut suite = Suite::new();
    suite.test_both("pods of the agent reach each other through tunnels", traffic);
    suite.test("removing a pod keeps the connections of others, and frees its namespace", removal);
    suite.test("pods and their connections survive a restart of the agent", restart);
    suite.test("a rejected request gets a reason and changes no pod", rejections);
    suite.test("a hot restart continues the agent's connection", hot_restart);
    suite.run()
}

/// Three pods of one node, all wired to each other, with the rules that the agent installs.
struct Scene {
    world: World,
    host: Pod,
    a: Pod,
    b: Pod,
    c: Pod,
    pki: Pki,
}

impl Scene {
    async fn new() -> Self {
        let mut world = World::new();
        let host = world.pod("host").await;
        let (mut a, mut b) = (world.pod("a").await, world.pod("b").await);
        let mut c = world.pod("c").await;
        world.wire(&mut a, &mut b).await;
        world.wire(&mut c, &mut a).await;
        world.wire(&mut c, &mut b).await;
        let rules = Settings::new("rules").set("interception.profile=ambient");
        for pod in [&a, &b, &c] {
            pod.rules("install", &rules).await.ok();
        }
        let pki = Pki::new(world.folder());
        Self { world, host, a, b, c, pki }
    }

    fn socket(&self) -> PathBuf {
        self.world.folder().join("agent.sock")
    }

    fn settings(&self) -> Settings {
        let mesh = Mesh::default().hbone(&self.a).hbone(&self.b).hbone(&self.c);
        Settings::node("node", &format!("zds: {:?}", self.socket()))
            .section(&format!("identity: {{local_ca: {:?}}}", self.pki.dir()))
            .mesh(&mesh.write(&self.host, "mesh"))
            .set("proxy.mtls=strict")
    }

    /// Starts the daemon, and passes the pods to it.
    async fn start(&self, pods: &[&Pod]) -> (Proxy, Agent, Connection) {
        let settings = self.settings();
        let agent = Agent::listen(&self.socket());
        let enrol = async {
            let connection = agent.accept().await;
            for pod in pods {
                assert_eq!(connection.add(pod).await, "", "{}", pod.name());
            }
            assert_eq!(connection.snapshot_sent().await, "");
            connection
        };
        let (daemon, connection) = tokio::join!(self.host.proxy(&settings), enrol);
        (daemon, agent, connection)
    }
}

/// Opens a connection and exchanges bytes in both directions. Also returns the source address that
/// the application saw.
async fn connect(from: &Pod, app: &Listener, to: SocketAddr) -> (TcpStream, TcpStream, SocketAddr) {
    let (mut client, mut server, source) = from.meet(app, to).await;
    exchange(&mut client, &mut server).await;
    (client, server, source)
}

async fn traffic(family: Family) {
    let scene = Scene::new().await;
    let (mut daemon, _agent, _connection) = scene.start(&[&scene.a, &scene.b]).await;
    let app = scene.b.listen(APP);
    let (client, server, source) = connect(&scene.a, &app, scene.b.at(family, APP)).await;
    assert_eq!(source.ip(), scene.a.ip(family));
    drop((client, server));
    let seen_by = [
        r#"direction="inbound" src.identity="spiffe://cluster.local/ns/default/sa/a""#,
        r#"direction="outbound" dst.identity="spiffe://cluster.local/ns/default/sa/b""#,
    ];
    for parts in seen_by.map(|parts| parts.split_once(' ').expect("two parts")) {
        daemon.line(&["connection complete", parts.0, parts.1]).await;
    }
}

async fn removal() {
    let scene = Scene::new().await;
    let (_daemon, _agent, agent) = scene.start(&[&scene.a, &scene.b, &scene.c]).await;
    let Scene { a, b, c, .. } = &scene;
    let (app_b, app_c) = (b.listen(APP), c.listen(APP));
    let (mut client, mut server, _) = connect(a, &app_c, c.at(Family::V4, APP)).await;
    connect(a, &app_b, b.at(Family::V4, APP)).await;
    assert_eq!(agent.del(b).await, "");
    until("the removed pod has no listener", async || {
        let refused = b.dial(SocketAddr::new(Family::V4.loopback(), 15008)).await;
        refused.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
    })
    .await;
    exchange(&mut client, &mut server).await;
    assert_eq!(agent.del(b).await, "", "it is removed already");
    connect(a, &app_c, c.at(Family::V4, APP)).await;
    drop(app_b);
    let Scene { a, b, c, world, host, .. } = scene;
    drop(b);
    until("the namespace is gone, and its end of a link", async || {
        let links = tool(&a, "ip", &["-o", "link"]).await.ok();
        !links.contains("eth0")
    })
    .await;
    exchange(&mut client, &mut server).await;
    drop((c, world, host));
}

async fn restart() {
    let scene = Scene::new().await;
    let Scene { a, b, c, host, .. } = &scene;
    let (mut daemon, agent, connection) = scene.start(&[a, b, c]).await;
    let app = b.listen(APP);
    let to = b.at(Family::V4, APP);
    let (mut client, mut server, _) = connect(a, &app, to).await;
    agent.stop(connection);
    daemon.line(&["no connection to the node agent"]).await;
    let ready = async || {
        http_get(host, SocketAddr::new(Family::V4.loopback(), 15021), "/healthz/ready").await.0
    };
    until("the node is unready without its agent", async || ready().await == 503).await;
    exchange(&mut client, &mut server).await;
    connect(a, &app, to).await;

    let agent = Agent::listen(&scene.socket());
    let connection = agent.accept().await;
    assert_eq!(connection.add(a).await, "");
    assert_eq!(connection.keep(b).await, "");
    assert_eq!(connection.snapshot_sent().await, "");
    until("the node is ready", async || ready().await == 200).await;
    exchange(&mut client, &mut server).await;
    connect(a, &app, to).await;
    until("the pod that the snapshot omits has no listener", async || {
        let refused = c.dial(SocketAddr::new(Family::V4.loopback(), 15008)).await;
        refused.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
    })
    .await;
}

async fn rejections() {
    let scene = Scene::new().await;
    let Scene { a, b, host, .. } = &scene;
    let (_daemon, _agent, agent) = scene.start(&[a, b]).await;
    let app = b.listen(APP);
    let (mut client, mut server, _) = connect(a, &app, b.at(Family::V4, APP)).await;
    let no_namespace = File::open("/proc/version").expect("a file");
    let reason = agent.add_with(b, &no_namespace).await;
    assert!(reason.contains("not a namespace"), "{reason}");
    let reason = agent.add(host).await;
    assert!(reason.contains("namespace"), "the daemon's own: {reason:?}");
    let reason = agent.keep(a).await;
    assert!(reason.contains("after SnapshotSent"), "{reason}");
    exchange(&mut client, &mut server).await;
    assert_eq!(agent.add(a).await, "", "the connection is as before");
}

async fn hot_restart() {
    let scene = Scene::new().await;
    let Scene { a, b, c, .. } = &scene;
    let (mut daemon, agent, connection) = scene.start(&[a, b]).await;
    let app = b.listen(APP);
    let to = b.at(Family::V4, APP);
    let (mut client, mut server, _) = connect(a, &app, to).await;
    let stop = AtomicBool::new(false);
    let changes = async {
        let mut changes = 0;
        while !stop.load(Relaxed) {
            assert_eq!(connection.add(c).await, "");
            assert_eq!(connection.del(c).await, "");
            changes += 2;
        }
        changes
    };
    let restarts = async {
        let mut old = Vec::new();
        for _ in 0..3 {
            let new = scene.host.proxy(&scene.settings().take_over()).await;
            daemon.line(&["another process has taken over"]).await;
            old.push(std::mem::replace(&mut daemon, new));
            daemon.line(&["continuing the connection to the node agent"]).await;
            exchange(&mut client, &mut server).await;
            connect(a, &app, to).await;
        }
        stop.store(true, Relaxed);
        old
    };
    let (changes, old) = tokio::join!(changes, restarts);
    assert!(changes >= 2);
    agent.assert_quiet(&connection).await;
    assert_eq!(connection.add(c).await, "");
    let app_c = c.listen(APP);
    connect(a, &app_c, c.at(Family::V4, APP)).await;
    drop((client, server));
    for mut old in old {
        assert!(old.ended().await.success(), "{}", old.log());
        assert_eq!(old.count(&["rules removed"]), 0, "{}", old.log());
    }
}
