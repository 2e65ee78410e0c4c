//! The scene of the soak test: two pods with proxies, one without, all connected with each other.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;

use fastrand::Rng;
use nix::sys::signal::Signal;
use tokio::task::JoinSet;

use crate::mesh::Mesh;
use crate::or_fail::OrFail;
use crate::pki::Pki;
use crate::pods::{Pod, World};
use crate::proxy::Proxy;
use crate::scene::{APP, CLIENT, SERVER};
use crate::settings::Settings;

/// The port that a policy denies temporarily.
const DENIED_PORT: u16 = APP + 1;
/// All ports of applications.
pub(super) const PORTS: [u16; 2] = [APP, DENIED_PORT];

/// One of the pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Client,
    Server,
    /// The pod without a proxy.
    Outside,
}

/// The pods.
#[derive(Debug)]
pub(super) struct Pods {
    client: Pod,
    server: Pod,
    outside: Pod,
}

/// The source and destination of a stream.
#[derive(Debug, Clone, Copy)]
pub(super) struct Route {
    from: Side,
    to: Side,
    v6: bool,
    port: u16,
}

/// The pods, their proxies, and their settings.
#[derive(Debug)]
pub(super) struct SoakScene {
    pub(super) pods: Arc<Pods>,
    pki: Pki,
    mesh: MeshState,
    client: Proxy,
    server: Proxy,
    /// Old processes of hot restarts.
    outgoing: JoinSet<ExitStatus>,
    _world: World,
}

/// The content of the mesh file other than the pods.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct MeshState {
    pub(super) others: u8,
    pub(super) denies: bool,
}

impl Route {
    pub(super) fn new(rng: &mut Rng) -> Self {
        let (from, to) = match rng.u32(0..10) {
            0..4 => (Side::Client, Side::Server),
            4..6 => (Side::Server, Side::Client),
            6..8 => (Side::Client, Side::Outside),
            _ => (Side::Outside, Side::Server),
        };
        let port = if rng.u32(0..4) == 0 { DENIED_PORT } else { APP };
        Self { from, to, v6: rng.bool(), port }
    }

    pub(super) fn ends(self) -> [Side; 2] {
        [self.from, self.to]
    }

    pub(super) fn can_be_denied(self) -> bool {
        self.port == DENIED_PORT && self.to != Side::Outside
    }
}

impl Pods {
    pub(super) fn pod(&self, side: Side) -> &Pod {
        match side {
            Side::Client => &self.client,
            Side::Server => &self.server,
            Side::Outside => &self.outside,
        }
    }

    /// All pods.
    pub(super) fn all(&self) -> [&Pod; 3] {
        [&self.client, &self.server, &self.outside]
    }

    /// The pod that opens a stream, and the destination.
    pub(super) fn dial(&self, route: Route) -> (&Pod, SocketAddr) {
        // Each pod has two of the three links, with an address of each family on both. The links
        // connect client and server, outside and server, client and outside, in this order.
        let ips = self.pod(route.to).ips();
        let wire = usize::from(route.ends().contains(&Side::Outside));
        let ip = ips.into_iter().filter(|ip| ip.is_ipv6() == route.v6).nth(match route.to {
            Side::Client => 0,
            _ => wire,
        });
        (self.pod(route.from), SocketAddr::new(ip.expect("every pod has two wires"), route.port))
    }
}

impl SoakScene {
    pub(super) async fn new() -> Self {
        let mut world = World::new();
        let (mut client, mut server) = (world.pod(CLIENT).await, world.pod(SERVER).await);
        let mut outside = world.pod("outside").await;
        world.wire(&mut client, &mut server).await;
        world.wire(&mut outside, &mut server).await;
        world.wire(&mut client, &mut outside).await;
        for pod in [&client, &server, &outside] {
            pod.sysctl("net/ipv4/ip_local_port_range", "10000 65000");
        }
        let pki = Pki::new(world.folder());
        for name in [CLIENT, SERVER] {
            let _files = pki.issue(name);
        }
        let pods = Arc::new(Pods { client, server, outside });
        let mesh = MeshState::default();
        write_mesh(&pods, mesh);
        let (for_client, for_server) = (settings(&pods.client, &pki), settings(&pods.server, &pki));
        let (client, server) =
            tokio::join!(pods.client.proxy(&for_client), pods.server.proxy(&for_server));
        Self { pods, pki, mesh, client, server, outgoing: JoinSet::new(), _world: world }
    }

    pub(super) fn proxies(&self) -> [(&Pod, &Proxy); 2] {
        [(&self.pods.client, &self.client), (&self.pods.server, &self.server)]
    }

    pub(super) fn proxy(&self, side: Side) -> &Proxy {
        if side == Side::Client { &self.client } else { &self.server }
    }

    /// Changes the mesh file, and waits until both proxies have applied it.
    pub(super) async fn change_mesh(&mut self, change: impl FnOnce(&mut MeshState)) {
        const IN_FORCE: [&str; 1] = ["the change of the mesh is in force"];
        change(&mut self.mesh);
        let before = [&self.client, &self.server].map(|proxy| proxy.count(&IN_FORCE));
        write_mesh(&self.pods, self.mesh);
        let [client, server] = before;
        tokio::join!(
            self.client.more_than(client, &IN_FORCE),
            self.server.more_than(server, &IN_FORCE)
        );
    }

    /// Writes the logs of the proxies to the folder for temporary files.
    pub(super) fn keep_logs(&self) {
        for (pod, proxy) in self.proxies() {
            let file = std::env::temp_dir().join(format!("underpass-soak-{}.log", pod.name()));
            std::fs::write(&file, proxy.log()).or_fail("keep a log");
        }
    }

    /// Issues a new certificate for a proxy.
    pub(super) fn renew(&self, side: Side) {
        let _files = self.pki.issue(self.pods.pod(side).name());
    }

    /// Starts a process that takes over from a proxy, which keeps its open streams.
    pub(super) async fn take_over(&mut self, side: Side) {
        let pod = self.pods.pod(side);
        let proxy = if side == Side::Client { &mut self.client } else { &mut self.server };
        let new = pod.proxy(&settings(pod, &self.pki).take_over()).await;
        let mut old = std::mem::replace(proxy, new);
        self.outgoing.spawn(async move { old.ended_by_itself().await });
    }

    /// Waits for the exit of all old processes, which exit after their last stream.
    pub(super) async fn await_outgoing(&mut self) {
        while let Some(ended) = self.outgoing.join_next().await {
            let status = ended.or_fail("wait for a proxy");
            assert!(status.success(), "a proxy exited with {status} after the takeover");
        }
    }

    /// Stops a proxy with a signal, and starts another one.
    pub(super) async fn restart(&mut self, side: Side, signal: Signal) {
        let pod = self.pods.pod(side);
        let proxy = if side == Side::Client { &mut self.client } else { &mut self.server };
        proxy.signal(signal);
        proxy.ended().await;
        *proxy = pod.proxy(&settings(pod, &self.pki)).await;
    }
}

fn settings(pod: &Pod, pki: &Pki) -> Settings {
    let folder = pod.folder();
    let file = |kind: &str| folder.join(format!("{}.{kind}", pod.name()));
    let files = underpass_config::IdentityFiles {
        certificate: file("pem"),
        key: file("key"),
        roots: pki.roots().to_owned(),
    };
    let settings = Settings::new(pod.name()).identity(&files).mesh(&mesh_file(pod));
    [
        "timeouts.drain=2s",
        // Lets a soak test end soon after its last stream.
        "timeouts.pool_idle=2s",
        "timeouts.keepalive=2s",
        "logging.filter=info,access=warn",
    ]
    .into_iter()
    .fold(settings, Settings::set)
}

fn mesh_file(pod: &Pod) -> PathBuf {
    pod.folder().join("mesh.yaml")
}

fn write_mesh(pods: &Pods, state: MeshState) {
    let mut mesh = Mesh::default().hbone(&pods.client).hbone(&pods.server);
    for other in 0..state.others {
        mesh = mesh.workload(&format!("other-{other}"), &[[10, 99, 0, other].into()], "HBONE");
    }
    if state.denies {
        mesh =
            mesh.policy("denied", "Deny", &format!("[[[{{destinationPorts: [{DENIED_PORT}]}}]]]"));
    }
    let _file = mesh.write(&pods.client, "mesh");
}
