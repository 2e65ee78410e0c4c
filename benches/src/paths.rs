//! The paths between two pods. Each path has separate pods, so that all paths can alternate:
//!
//! ```text
//! direct   client ─────────────────────────────────────────── server
//! relay-…  client ── relay in pod ─────────── relay in pod ── server
//! plain    client ── proxy in pod ─────────── proxy in pod ── server
//! hbone    client ── proxy in pod ═ HBONE ═══ proxy in pod ── server
//! node…    client ── daemon ═══════ HBONE ═══ daemon ──────── server
//! ```
//!
//! `ztunnel-plain` and `ztunnel-hbone` correspond to `plain` and `hbone`, with ztunnel.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use tokio::time::Instant;
use underpass_interception::Namespace;
use underpass_tests::{CLIENT, Family, Mesh, Pki, Pod, Proxy, SERVER, Settings, World};

use crate::child_process::ChildProcess;
use crate::options::{Options, PathName};
use crate::process::with_children;
use crate::relay::{self, RelayMode};
use crate::server::{BACKLOG, PORTS, Server};
use crate::ztunnel::{self, Ztunnel};

/// The offset from a server's port to that of the relay in its pod.
const RELAY_PORT_OFFSET: u16 = 1000;

/// A large range of ephemeral ports, for tens of thousands of new connections.
const EPHEMERAL_PORTS: &str = "10000 65000";

/// The number of lines of each log that are printed after a failure.
const LOG_LINES: usize = 20;

/// Two pods, the processes between them, and a server in the second pod. Dropping it ends the
/// processes.
#[derive(Debug)]
pub struct Path {
    name: PathName,
    client: Pod,
    server_pod: Pod,
    server: Server,
    between: Intermediaries,
    ready_after: Duration,
}

/// The processes between the pods, the client's side first.
#[derive(Debug)]
enum Intermediaries {
    Nothing,
    Relays(Vec<ChildProcess>),
    Proxies(Vec<Proxy>),
    /// Each daemon, and the pod that is its node.
    Daemons(Vec<(Proxy, Pod)>),
    Ztunnels(Vec<Ztunnel>),
}

impl Path {
    /// Sets up the path. All processes are ready and idle.
    pub async fn set_up(name: PathName, options: &Options) -> Self {
        let mut world = World::new();
        let (mut client, mut server) = (world.pod(CLIENT).await, world.pod(SERVER).await);
        world.wire(&mut client, &mut server).await;
        for pod in [&client, &server] {
            pod.sysctl("net/ipv4/ip_local_port_range", EPHEMERAL_PORTS);
            pod.sysctl("net/ipv4/tcp_tw_reuse", "1");
            // Otherwise the kernel would drop connections of a storm, and its SYN retransmission
            // timer would be measured.
            pod.sysctl("net/core/somaxconn", &BACKLOG.to_string());
        }
        let pods = [&client, &server];
        let mesh = others(options.workloads);
        let began = Instant::now();
        let between = match name {
            PathName::Direct => Intermediaries::Nothing,
            PathName::RelayCopy => relays(&client, &server, RelayMode::Copy),
            PathName::RelaySplice => relays(&client, &server, RelayMode::Splice),
            PathName::Plain => proxies(&world, mesh.tcp(&client).tcp(&server), pods, options).await,
            PathName::Hbone => {
                proxies(&world, mesh.hbone(&client).hbone(&server), pods, options).await
            }
            PathName::Node | PathName::NodeOneProcess => {
                let broker = if name == PathName::Node { "auto" } else { "off" };
                daemons(&world, mesh.hbone(&client).hbone(&server), pods, broker, options).await
            }
            PathName::ZtunnelPlain => {
                Intermediaries::Ztunnels(ztunnel::pair(&world, pods, "TCP", options).await)
            }
            PathName::ZtunnelHbone => {
                Intermediaries::Ztunnels(ztunnel::pair(&world, pods, "HBONE", options).await)
            }
        };
        let ready_after = began.elapsed();
        let application = Server::start(server.namespace());
        Self { name, client, server_pod: server, server: application, between, ready_after }
    }

    /// The pod of the client.
    pub(crate) fn client(&self) -> &Namespace {
        self.client.namespace()
    }

    /// The address to which the client connects for a port of the server.
    pub(crate) fn target(&self, port: u16) -> SocketAddr {
        let pod = if self.name.is_relay() { &self.client } else { &self.server_pod };
        pod.at(Family::V4, port)
    }

    /// The ids of the processes between the pods, the client's side first.
    pub(crate) fn processes(&self) -> Vec<u32> {
        self.sides().concat()
    }

    /// The ids of the processes of each side, the client's side first. A daemon with a broker has
    /// two.
    pub(crate) fn sides(&self) -> Vec<Vec<u32>> {
        match &self.between {
            Intermediaries::Nothing => Vec::new(),
            Intermediaries::Relays(relays) => {
                relays.iter().map(|relay| vec![relay.pid()]).collect()
            }
            Intermediaries::Proxies(proxies) => {
                proxies.iter().map(|proxy| vec![proxy.pid()]).collect()
            }
            Intermediaries::Daemons(daemons) => {
                daemons.iter().map(|(daemon, _)| with_children(daemon.pid())).collect()
            }
            Intermediaries::Ztunnels(ztunnels) => {
                ztunnels.iter().map(|ztunnel| vec![ztunnel.pid()]).collect()
            }
        }
    }

    /// The mean time in seconds until a proxy between the pods was ready.
    pub(crate) fn ready_after(&self) -> f64 {
        self.ready_after.as_secs_f64() / 2.0
    }

    /// The number of bytes that the server has received.
    pub(crate) fn received(&self) -> Arc<AtomicU64> {
        self.server.received.clone()
    }

    /// Waits until the server has received all data.
    pub(crate) async fn sink_is_idle(&self) {
        let mut sinking = self.server.sinking.clone();
        sinking.wait_for(|open| *open == 0).await.expect("the server does not end");
    }
}

#[expect(clippy::print_stderr, reason = "a bench is a program for a terminal")]
impl Drop for Path {
    /// Prints the first warnings and errors in the proxies' logs after a failure.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let logs: Vec<(u32, String)> = match &self.between {
            Intermediaries::Nothing | Intermediaries::Relays(_) => Vec::new(),
            Intermediaries::Proxies(proxies) => {
                proxies.iter().map(|proxy| (proxy.pid(), proxy.log())).collect()
            }
            // The proxy process of a daemon writes to the same log.
            Intermediaries::Daemons(daemons) => {
                daemons.iter().map(|(daemon, _)| (daemon.pid(), daemon.log())).collect()
            }
            Intermediaries::Ztunnels(ztunnels) => {
                ztunnels.iter().map(|ztunnel| (ztunnel.pid(), ztunnel.log())).collect()
            }
        };
        for (process, log) in &logs {
            let problems = log.lines().filter(|line| {
                let line = line.to_lowercase();
                line.contains("warn") || line.contains("error")
            });
            for line in problems.take(LOG_LINES) {
                eprintln!("process {process} of path {}: {line}", self.name);
            }
        }
    }
}

/// A mesh with additional workloads, which have no traffic.
fn others(workloads: usize) -> Mesh {
    let other = |mesh: Mesh, n: usize| {
        let [.., a, b, c] = n.to_be_bytes();
        mesh.workload(&format!("other-{n}"), &[Ipv4Addr::new(172, 16 + a, b, c).into()], "HBONE")
    };
    (0..workloads).fold(Mesh::default(), other)
}

fn relays(client: &Pod, server: &Pod, mode: RelayMode) -> Intermediaries {
    let at = |pod: &Pod, port| pod.at(Family::V4, port);
    let out = PORTS.map(|port| (at(client, port), at(server, port + RELAY_PORT_OFFSET)));
    let on = PORTS.map(|port| (at(server, port + RELAY_PORT_OFFSET), at(server, port)));
    Intermediaries::Relays(vec![
        relay::start(client.namespace(), mode, &out),
        relay::start(server.namespace(), mode, &on),
    ])
}

async fn proxies(world: &World, mesh: Mesh, pods: [&Pod; 2], options: &Options) -> Intermediaries {
    let pki = Pki::new(world.folder());
    let mut proxies = Vec::new();
    for pod in pods {
        let settings = Settings::new(pod.name())
            .identity(&pki.issue(pod.name()))
            .mesh(&mesh.write(pod, "mesh"))
            .set("proxy.workers=auto")
            .set(&format!("logging.filter={}", options.log_filter()));
        proxies.push(pod.proxy(&settings).await);
    }
    Intermediaries::Proxies(proxies)
}

async fn daemons(
    world: &World,
    mesh: Mesh,
    pods: [&Pod; 2],
    broker: &str,
    options: &Options,
) -> Intermediaries {
    let pki = Pki::new(world.folder());
    let mut daemons = Vec::new();
    for pod in pods {
        let name = pod.name();
        let node = world.pod(&format!("node-of-{name}")).await;
        let folder = world.folder().join(format!("pods-of-{name}"));
        fs::create_dir_all(&folder).expect("a folder");
        let (namespace, ip) = (pod.namespace().path(), pod.ip(Family::V4));
        let workload = format!("{{name: {name}, namespace: default, serviceAccount: {name}}}");
        let facts =
            format!("uid: {name}\nnetns: {namespace:?}\nips: [{ip}]\nworkload: {workload}\n");
        fs::write(folder.join("pod.yaml"), facts).expect("a file");
        let settings = Settings::node(node.name(), &format!("directory: {folder:?}"))
            .section(&format!("identity: {{local_ca: {:?}}}", pki.dir()))
            .mesh(&mesh.write(&node, "mesh"))
            .set("proxy.workers=auto")
            .set(&format!("privileges.broker={broker}"))
            .set(&format!("logging.filter={}", options.log_filter()));
        let mut daemon = node.proxy(&settings).await;
        daemon.line(&["pod enrolled"]).await;
        daemons.push((daemon, node));
    }
    Intermediaries::Daemons(daemons)
}
