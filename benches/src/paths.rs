//! The ways between two pods. Each has two pods of its own, so that all can stand beside each other and take turns:
//!
//! ```text
//! direct   client ─────────────────────────────────────────── server
//! relay    client ── relay in pod ─────────── relay in pod ── server
//! plain    client ── proxy in pod ─────────── proxy in pod ── server
//! hbone    client ── proxy in pod ═ HBONE ═══ proxy in pod ── server
//! ```

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use underpass_interception::Namespace;
use underpass_tests::{CLIENT, Family, Mesh, Pki, Pod, Proxy, SERVER, Settings, World};

use crate::options::{Options, PathName};
use crate::relay::Relay;
use crate::server::{PORTS, Server};

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
}

/// What stands between the pods, the client's side first.
#[derive(Debug)]
enum Between {
    Nothing,
    Relays(Vec<Relay>),
    Proxies(Vec<Proxy>),
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
        }
        let mesh = Mesh::default();
        let between = match name {
            PathName::Direct => Between::Nothing,
            PathName::Relay => relays(&client, &server),
            PathName::Plain => {
                proxies(&world, mesh.tcp(&client).tcp(&server), [&client, &server], options).await
            }
            PathName::Hbone => {
                proxies(&world, mesh.hbone(&client).hbone(&server), [&client, &server], options)
                    .await
            }
        };
        let sockets = Server::start(server.namespace());
        Self { name, client, server_pod: server, server: sockets, between }
    }

    /// Where load comes from.
    pub(crate) fn client(&self) -> &Namespace {
        self.client.namespace()
    }

    /// Where the client has to connect for a port of the server.
    pub(crate) fn target(&self, port: u16) -> SocketAddr {
        let pod = if self.name == PathName::Relay { &self.client } else { &self.server_pod };
        pod.at(Family::V4, port)
    }

    /// The processes between the pods, the client's side first.
    pub(crate) fn processes(&self) -> Vec<u32> {
        match &self.between {
            Between::Nothing => Vec::new(),
            Between::Relays(relays) => relays.iter().map(Relay::pid).collect(),
            Between::Proxies(proxies) => proxies.iter().map(Proxy::pid).collect(),
        }
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
        let Between::Proxies(proxies) = &self.between else {
            return;
        };
        if !std::thread::panicking() {
            return;
        }
        for proxy in proxies {
            let log = proxy.log();
            let telling = log.lines().filter(|line| !line.contains(" INFO "));
            for line in telling.take(LOG_LINES) {
                eprintln!("proxy {} of path {}: {line}", proxy.pid(), self.name);
            }
        }
    }
}

fn relays(client: &Pod, server: &Pod) -> Between {
    let at = |pod: &Pod, port| pod.at(Family::V4, port);
    let out = PORTS.map(|port| (at(client, port), at(server, port + RELAYED)));
    let on = PORTS.map(|port| (at(server, port + RELAYED), at(server, port)));
    Between::Relays(vec![
        Relay::start(client.namespace(), &out),
        Relay::start(server.namespace(), &on),
    ])
}

async fn proxies(world: &World, mesh: Mesh, pods: [&Pod; 2], options: &Options) -> Between {
    let pki = Pki::new(world.folder());
    let filter = if options.access_log { "info" } else { "info,access=warn" };
    let mut proxies = Vec::new();
    for pod in pods {
        let settings = Settings::new(pod.name())
            .identity(&pki.issue(pod.name()))
            .mesh(&mesh.write(pod, "mesh"))
            .set("proxy.workers=auto")
            .set(&format!("logging.filter={filter}"));
        proxies.push(pod.proxy(&settings).await);
    }
    Between::Proxies(proxies)
}
