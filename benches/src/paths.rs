//! The ways between two pods. Each has two pods of its own, so that all can stand beside each other and take turns:
//!
//! ```text
//! direct   client ─────────────────────────────────────────── server
//! relay-…  client ── relay in pod ─────────── relay in pod ── server
//! plain    client ── proxy in pod ─────────── proxy in pod ── server
//! hbone    client ── proxy in pod ═ HBONE ═══ proxy in pod ── server
//! ```
//!
//! `ztunnel-plain` and `ztunnel-hbone` are like the last two, with another proxy.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use tokio::time::Instant;
use underpass_interception::Namespace;
use underpass_tests::{CLIENT, Family, Mesh, Pki, Pod, Proxy, SERVER, Settings, World};

use crate::options::{Options, PathName};
use crate::part::Part;
use crate::relay::{self, How};
use crate::server::{BACKLOG, PORTS, Server};
use crate::ztunnel::{self, Ztunnel};

/// How far above the server's own ports the relay in its pod listens.
const RELAYED: u16 = 1000;

/// Tens of thousands of new connections need more ports than there are by default.
const EPHEMERAL_PORTS: &str = "10000 65000";

/// How much of a log may say why a load failed.
const LOG_LINES: usize = 20;

/// Two pods, what is between them, and a server in the second. Dropping it ends the processes.
#[derive(Debug)]
pub struct Path {
    name: PathName,
    client: Pod,
    server_pod: Pod,
    server: Server,
    between: Between,
    ready_after: Duration,
}

/// What stands between the pods, the client's side first.
#[derive(Debug)]
enum Between {
    Nothing,
    Relays(Vec<Part>),
    Proxies(Vec<Proxy>),
    Ztunnels(Vec<Ztunnel>),
}

impl Path {
    /// Sets it up; what is between the pods is ready and has done nothing yet.
    pub async fn set_up(name: PathName, options: &Options) -> Self {
        let mut world = World::new();
        let (mut client, mut server) = (world.pod(CLIENT).await, world.pod(SERVER).await);
        world.wire(&mut client, &mut server).await;
        for pod in [&client, &server] {
            pod.sysctl("net/ipv4/ip_local_port_range", EPHEMERAL_PORTS);
            pod.sysctl("net/ipv4/tcp_tw_reuse", "1");
            // Or the first to lose connections of a storm is the kernel, and what is measured is its timer for lost SYNs.
            pod.sysctl("net/core/somaxconn", &BACKLOG.to_string());
        }
        let pods = [&client, &server];
        let mesh = others(options.workloads);
        let began = Instant::now();
        let between = match name {
            PathName::Direct => Between::Nothing,
            PathName::RelayCopy => relays(&client, &server, How::Copy),
            PathName::RelaySplice => relays(&client, &server, How::Splice),
            PathName::Plain => proxies(&world, mesh.tcp(&client).tcp(&server), pods, options).await,
            PathName::Hbone => {
                proxies(&world, mesh.hbone(&client).hbone(&server), pods, options).await
            }
            PathName::ZtunnelPlain => {
                Between::Ztunnels(ztunnel::pair(&world, pods, "TCP", options).await)
            }
            PathName::ZtunnelHbone => {
                Between::Ztunnels(ztunnel::pair(&world, pods, "HBONE", options).await)
            }
        };
        let ready_after = began.elapsed();
        let sockets = Server::start(server.namespace());
        Self { name, client, server_pod: server, server: sockets, between, ready_after }
    }

    /// Where load comes from.
    pub(crate) fn client(&self) -> &Namespace {
        self.client.namespace()
    }

    /// Where the client has to connect for a port of the server.
    pub(crate) fn target(&self, port: u16) -> SocketAddr {
        let pod = if self.name.is_relay() { &self.client } else { &self.server_pod };
        pod.at(Family::V4, port)
    }

    /// The processes between the pods, the client's side first.
    pub(crate) fn processes(&self) -> Vec<u32> {
        match &self.between {
            Between::Nothing => Vec::new(),
            Between::Relays(relays) => relays.iter().map(Part::pid).collect(),
            Between::Proxies(proxies) => proxies.iter().map(Proxy::pid).collect(),
            Between::Ztunnels(ztunnels) => ztunnels.iter().map(Ztunnel::pid).collect(),
        }
    }

    /// How many seconds it took to start what is between the pods, one after the other: the mean of one.
    pub(crate) fn ready_after(&self) -> f64 {
        self.ready_after.as_secs_f64() / 2.0
    }

    /// How many bytes the server has read and forgotten.
    pub(crate) fn received(&self) -> Arc<AtomicU64> {
        self.server.received.clone()
    }

    /// Waits until the server has read all that there is.
    pub(crate) async fn sink_is_idle(&self) {
        let mut sinking = self.server.sinking.clone();
        sinking.wait_for(|open| *open == 0).await.expect("the server does not end");
    }
}

#[expect(clippy::print_stderr, reason = "a bench is a program for a terminal")]
impl Drop for Path {
    /// Where the load met an error, the proxies may know why.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let logs: Vec<_> = match &self.between {
            Between::Nothing | Between::Relays(_) => Vec::new(),
            Between::Proxies(proxies) => proxies.iter().map(Proxy::log).collect(),
            Between::Ztunnels(ztunnels) => ztunnels.iter().map(Ztunnel::log).collect(),
        };
        for (process, log) in self.processes().iter().zip(&logs) {
            let telling = log.lines().filter(|line| {
                let line = line.to_lowercase();
                line.contains("warn") || line.contains("error")
            });
            for line in telling.take(LOG_LINES) {
                eprintln!("process {process} of path {}: {line}", self.name);
            }
        }
    }
}

/// A mesh of workloads that nobody talks to.
fn others(workloads: usize) -> Mesh {
    let other = |mesh: Mesh, n: usize| {
        let [.., a, b, c] = n.to_be_bytes();
        mesh.workload(&format!("other-{n}"), &[Ipv4Addr::new(172, 16 + a, b, c).into()], "HBONE")
    };
    (0..workloads).fold(Mesh::default(), other)
}

fn relays(client: &Pod, server: &Pod, how: How) -> Between {
    let at = |pod: &Pod, port| pod.at(Family::V4, port);
    let out = PORTS.map(|port| (at(client, port), at(server, port + RELAYED)));
    let on = PORTS.map(|port| (at(server, port + RELAYED), at(server, port)));
    Between::Relays(vec![
        relay::start(client.namespace(), how, &out),
        relay::start(server.namespace(), how, &on),
    ])
}

async fn proxies(world: &World, mesh: Mesh, pods: [&Pod; 2], options: &Options) -> Between {
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
    Between::Proxies(proxies)
}
