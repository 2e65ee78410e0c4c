//! A node daemon as two processes: their privileges, the end of either, and the traffic afterwards.
//! `run` tests `underpass run` as two processes.
#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod run;

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::timeout;
use underpass::spawn::SpawnError;
use underpass_config::ResourceType;
use underpass_interception::TABLE;
use underpass_tests::{
    APP, Mesh, Pki, Pod, Proxy, ScriptedControlPlane, Settings, Suite, World, deny_port, exchange,
    hbone_workload, http_get, response, tool, until,
};

/// istiod's port.
const PORT: u16 = 15012;
/// The default of `privileges.user`.
const USER: u32 = 15008;
/// The bits of NET_ADMIN and SYS_ADMIN (include/uapi/linux/capability.h).
const KEPT: u64 = 1 << 12 | 1 << 21;
/// The bit of KILL.
const KILL: u64 = 1 << 5;

fn main() -> ExitCode {
    let mut suite = Suite::new();
    suite.test("proxy process has its own user and no capability", privileges);
    suite.test("endpoints of the proxy process show the broker's pods and metrics", endpoints);
    suite.test("killed broker ends the proxy process and the pods stay closed", || {
        killed(Process::Broker, Process::Proxy, false)
    });
    suite.test("killed broker ends a stopped proxy process and the pods stay closed", || {
        killed(Process::Broker, Process::Proxy, true)
    });
    suite.test("killed proxy process ends the broker and the pods stay closed", || {
        killed(Process::Proxy, Process::Broker, false)
    });
    suite.test("killed proxy process ends a stopped broker once the broker continues", || {
        killed(Process::Proxy, Process::Broker, true)
    });
    suite.test("broker that ends kills a stopped proxy process", stopped_proxy_process);
    suite.test("proxy process that hangs is killed within 45 s", hung_proxy_process);
    suite.test("proxy process follows a control plane over sockets of the broker", control_plane);
    suite.test("proxy process that cannot start ends the broker", unreadable_mesh);
    suite.test("privileges.broker off makes one process", one_process);
    run::add_tests(&mut suite);
    suite.run()
}

/// A node with the pods `a` and `b`, and a link to `outside`.
struct Scene {
    node: Pod,
    outside: Pod,
    a: Pod,
    b: Pod,
    pki: Pki,
    world: World,
}

impl Scene {
    async fn new() -> Self {
        let mut world = World::new();
        let (mut node, mut outside) = (world.pod("node").await, world.pod("outside").await);
        world.wire(&mut node, &mut outside).await;
        let (mut a, mut b) = (world.pod("a").await, world.pod("b").await);
        world.wire(&mut a, &mut b).await;
        let pki = Pki::new(world.folder());
        let scene = Self { node, outside, a, b, pki, world };
        fs::create_dir_all(scene.folder()).expect("a folder");
        for pod in [&scene.a, &scene.b] {
            pod.write_facts(&scene.folder(), "");
        }
        scene
    }

    fn folder(&self) -> PathBuf {
        self.world.folder().join("pods")
    }

    /// Starts the daemon with a mesh file, and waits until it serves both pods.
    async fn daemon(&self, assignments: &[&str]) -> Proxy {
        let mesh = Mesh::default().hbone(&self.a).hbone(&self.b).write(&self.node, "mesh");
        self.daemon_with(&format!("mesh: {{file: {mesh:?}}}"), assignments).await
    }

    async fn daemon_with(&self, mesh: &str, assignments: &[&str]) -> Proxy {
        let source = format!("directory: {:?}", self.folder());
        let identity = format!("identity: {{local_ca: {:?}}}", self.pki.dir());
        let settings = Settings::node("node", &source).section(&identity).section(mesh);
        let settings = settings.set("proxy.mtls=strict").set("proxy.workers=2");
        let settings = assignments.iter().fold(settings, |all, one| all.set(one));
        let mut daemon = self.node.proxy(&settings).await;
        for pod in ["default/a", "default/b"] {
            daemon.line(&["pod enrolled", pod]).await;
        }
        daemon
    }

    fn to_b(&self) -> SocketAddr {
        SocketAddr::new(self.b.ips()[0], APP)
    }

    /// Exchanges bytes through a tunnel.
    async fn carries_traffic(&self) {
        let app = self.b.listen(APP);
        let (mut client, mut server, peer) = self.a.meet(&app, self.to_b()).await;
        exchange(&mut client, &mut server).await;
        assert_eq!(peer.ip(), self.a.ips()[0]);
    }

    async fn has_rules(&self) -> bool {
        let mut all = true;
        for pod in [&self.a, &self.b] {
            all &= tool(pod, "nft", &["list", "table", "inet", TABLE]).await.status.success();
        }
        all
    }
}

/// The child of the daemon, if it has one.
fn child(daemon: &Proxy) -> Option<u32> {
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.pid())).expect("threads");
    tasks.flatten().find_map(|task| {
        let children = fs::read_to_string(task.path().join("children")).ok()?;
        children.split_whitespace().next()?.parse().ok()
    })
}

fn is_running(pid: u32) -> bool {
    // A zombie has ended, but its parent has not waited for it.
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    !status.is_empty() && !status.contains("State:\tZ")
}

/// The status of each thread of a process.
fn threads(pid: u32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("threads").flatten();
    tasks.filter_map(|task| fs::read_to_string(task.path().join("status")).ok()).collect()
}

fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_default().trim()
}

fn bits(status: &str, name: &str) -> u64 {
    u64::from_str_radix(field(status, name), 16).expect("a bit mask")
}

async fn privileges() {
    let scene = Scene::new().await;
    let daemon = scene.daemon(&["interception.backend=nftables"]).await;
    scene.carries_traffic().await;
    let proxy = child(&daemon).expect("a proxy process");
    assert_unprivileged(proxy, USER);
    let key = fs::metadata(scene.pki.dir().join("ca.key")).expect("the key of the CA");
    assert_eq!(key.permissions().mode() & 0o077, 0);
    assert_broker(daemon.pid(), KEPT);
    stopped(daemon, proxy).await;
}

/// Asserts that no thread of a proxy process has a capability, and all of them have this user.
fn assert_unprivileged(proxy: u32, user: u32) {
    let all = threads(proxy);
    assert!(all.iter().any(|status| field(status, "Name") == "worker-0"), "{all:?}");
    for status in &all {
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(bits(status, set), 0, "{set}: {status}");
        }
        let user = [user; 4].map(|id| id.to_string()).join("\t");
        assert_eq!((field(status, "Uid"), field(status, "Gid")), (&*user, &*user), "{status}");
        assert_eq!((field(status, "Groups"), field(status, "NoNewPrivs")), ("", "1"), "{status}");
    }
}

/// Asserts that the namespaces thread of a broker has exactly the capabilities `kept`, the control
/// thread KILL, and no other thread any.
fn assert_broker(broker: u32, kept: u64) {
    for status in threads(broker) {
        let is_control = field(&status, "Pid") == broker.to_string();
        let kept = match field(&status, "Name") {
            "namespaces" => kept,
            _ if is_control => KILL,
            _ => 0,
        };
        assert!(!field(&status, "Name").starts_with("worker-"), "{status}");
        for set in ["CapPrm", "CapEff"] {
            assert_eq!(bits(&status, set), kept, "{set}: {status}");
        }
        assert_eq!(field(&status, "NoNewPrivs"), "1", "{status}");
    }
}

async fn endpoints() {
    let scene = Scene::new().await;
    let mut daemon = scene.daemon(&[]).await;
    let proxy = child(&daemon).expect("a proxy process");
    let get = async |port, path| {
        http_get(&scene.node, SocketAddr::from(([127, 0, 0, 1], port)), path).await
    };
    until("the certificates are issued", async || {
        get(15021, "/healthz/pods").await.1 == "default/a a serving\ndefault/b b serving\n"
    })
    .await;
    assert_eq!(get(15021, "/healthz/ready").await.0, 200);
    tool(&scene.a, "nft", &["flush", "ruleset"]).await.ok();
    daemon.line(&["repaired the rules, which another program had changed"]).await;
    until("the metrics of the broker have arrived", async || {
        let metrics = get(15020, "/metrics").await.1;
        metrics.contains("underpass_pods{state=\"serving\"} 2")
            && metrics.contains("underpass_rules_repairs_total ")
            && !metrics.contains("underpass_rules_repairs_total 0")
            && metrics.contains("underpass_rules_intact 1")
    })
    .await;
    fs::remove_file(scene.folder().join("b.yaml")).expect("removed");
    daemon.line(&["pod removed", "uid=b"]).await;
    until("the status has one pod", async || {
        get(15021, "/healthz/pods").await.1 == "default/a a serving\n"
    })
    .await;
    stopped(daemon, proxy).await;
}

async fn stopped(mut daemon: Proxy, proxy: u32) {
    let status = daemon.stop().await;
    assert!(status.success(), "{status}; the log:\n{}", daemon.log());
    assert!(!is_running(proxy), "the proxy process has ended");
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Process {
    Broker,
    Proxy,
}

/// Kills `one`, after it has stopped `other` if `other_is_stopped`, and checks that `other` ends.
async fn killed(one: Process, other: Process, other_is_stopped: bool) {
    let scene = Scene::new().await;
    let mut daemon = scene.daemon(&[]).await;
    let (broker, proxy) = (daemon.pid(), child(&daemon).expect("a proxy process"));
    let pid = |process| if process == Process::Broker { broker } else { proxy };
    scene.carries_traffic().await;
    let app = scene.b.listen(APP);
    if other_is_stopped {
        send(pid(other), Signal::SIGSTOP);
    }
    send(pid(one), Signal::SIGKILL);
    until("the killed process has ended", async || !is_running(pid(one))).await;
    if other == Process::Broker {
        // Only a process that runs can notice the end of the other one.
        send(broker, Signal::SIGCONT);
    }
    let status = daemon.ended().await;
    if other == Process::Broker {
        assert_eq!(status.code(), Some(1), "{status}");
        assert!(daemon.log().contains("the proxy process has ended"), "{}", daemon.log());
    }
    until("the proxy process has ended", async || !is_running(proxy)).await;
    assert!(scene.has_rules().await, "the pods stay closed");
    scene.a.dial_and_be_refused(scene.to_b()).await;
    assert!(!app.is_reached(), "no plaintext");
    drop(app);
    let daemon = scene.daemon(&[]).await;
    scene.carries_traffic().await;
    let proxy = child(&daemon).expect("a proxy process");
    stopped(daemon, proxy).await;
}

/// A stopped proxy process does not end the drain, so a second signal does.
async fn stopped_proxy_process() {
    let scene = Scene::new().await;
    let mut daemon = scene.daemon(&[]).await;
    let proxy = child(&daemon).expect("a proxy process");
    send(proxy, Signal::SIGSTOP);
    daemon.signal(Signal::SIGTERM);
    daemon.line(&["stopping"]).await;
    daemon.signal(Signal::SIGTERM);
    let status = daemon.ended().await;
    assert!(status.success(), "{status}; the log:\n{}", daemon.log());
    assert_eq!(daemon.count(&["the proxy process does not end: killing it"]), 1);
    assert!(!is_running(proxy), "the broker has killed the proxy process");
    assert!(scene.has_rules().await, "the pods stay closed");
}

/// The broker checks every 10 s, waits 10 s for each of three answers, and then 3 s for the end.
async fn hung_proxy_process() {
    let scene = Scene::new().await;
    let mut daemon = scene.daemon(&[]).await;
    let proxy = child(&daemon).expect("a proxy process");
    send(proxy, Signal::SIGSTOP);
    let ended = timeout(Duration::from_secs(45), daemon.ended_by_itself()).await;
    assert_eq!(ended.expect("the daemon ends").code(), Some(1), "{}", daemon.log());
    assert_eq!(daemon.count(&["the proxy process does not answer", "failures="]), 3);
    assert_eq!(daemon.count(&["the proxy process hangs: ending it"]), 1);
    assert!(!is_running(proxy), "the broker has killed the proxy process");
    assert!(scene.has_rules().await, "the pods stay closed");
    scene.a.dial_and_be_refused(scene.to_b()).await;
}

fn send(pid: u32, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(pid).expect("a pid")), signal).expect("a signal is sent");
}

async fn control_plane() {
    let scene = Scene::new().await;
    let plane = ScriptedControlPlane::start(&scene.outside, PORT, &scene.pki);
    let workloads = [&scene.a, &scene.b].map(hbone_workload).into();
    let (address, policy) = (ResourceType::Address, ResourceType::Authorization);
    plane.set_first(&[response(address, workloads, &[]), response(policy, Vec::new(), &[])]);
    let mut daemon = scene.daemon_with(&plane.settings(), &[]).await;
    let proxy = child(&daemon).expect("a proxy process");
    scene.carries_traffic().await;
    plane.send(&response(policy, vec![deny_port("deny", APP)], &[]));
    daemon.line(&["the change of the mesh is in force"]).await;
    scene.a.dial_and_see_reset(scene.to_b()).await;
    stopped(daemon, proxy).await;
}

async fn unreadable_mesh() {
    let scene = Scene::new().await;
    let mesh = Mesh::default().hbone(&scene.a).write(&scene.node, "mesh");
    fs::set_permissions(&mesh, fs::Permissions::from_mode(0o600)).expect("it is ours");
    let settings = Settings::node("node", &format!("directory: {:?}", scene.folder())).mesh(&mesh);
    let error = scene.node.try_proxy(&settings).await.expect_err("the mesh is unreadable");
    let SpawnError::Ended { status, log } = error else { panic!("{error}") };
    assert_eq!(status.code(), Some(2), "the settings are wrong: {log}");
    assert!(log.contains("Permission denied"), "{log}");
    assert!(log.contains("the proxy process has ended: exit status: 2"), "{log}");
    assert!(!log.contains("serving the pods"), "{log}");
}

async fn one_process() {
    let scene = Scene::new().await;
    let mut daemon = scene.daemon(&["privileges.broker=off"]).await;
    assert_eq!(child(&daemon), None);
    scene.carries_traffic().await;
    assert!(daemon.stop().await.success(), "{}", daemon.log());
}
