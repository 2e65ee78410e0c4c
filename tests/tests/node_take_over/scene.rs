//! A node with two pods, which a daemon serves as one or two processes.

use std::fs;
use std::path::PathBuf;

use tokio::io::AsyncWriteExt as _;
use underpass_interception::TABLE;
use underpass_tests::{
    APP, End, Family, Mesh, Pki, Pod, Proxy, Settings, World, http_get, read_to_end, tool, until,
};

/// How a daemon runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Broker,
    OneProcess,
}

impl Mode {
    fn setting(self) -> &'static str {
        match self {
            Self::Broker => "privileges.broker=auto",
            Self::OneProcess => "privileges.broker=off",
        }
    }
}

/// The pods `a` and `b` of a node, which are wired to each other and to the node.
pub(crate) struct Scene {
    pub(crate) node: Pod,
    pub(crate) a: Pod,
    pub(crate) b: Pod,
    pub(crate) pki: Pki,
    pub(crate) world: World,
}

impl Scene {
    pub(crate) async fn new() -> Self {
        let mut world = World::new();
        let mut node = world.pod("node").await;
        let (mut a, mut b) = (world.pod("a").await, world.pod("b").await);
        world.wire(&mut a, &mut b).await;
        world.wire(&mut node, &mut a).await;
        let pki = Pki::new(world.folder());
        let scene = Self { node, a, b, pki, world };
        fs::create_dir(scene.folder()).expect("a folder");
        for pod in [&scene.a, &scene.b] {
            scene.add(pod, "");
        }
        scene
    }

    pub(crate) fn folder(&self) -> PathBuf {
        self.world.folder().join("pods")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.world.folder().join("take-over.sock")
    }

    /// Writes the file of a pod, with more lines.
    pub(crate) fn add(&self, pod: &Pod, more: &str) {
        let (name, netns) = (pod.name(), pod.namespace().path());
        let ips: Vec<_> = pod.ips().iter().map(|ip| format!("\"{ip}\"")).collect();
        let ips = ips.join(", ");
        let text = format!(
            "uid: uid-{name}\nnetns: {netns:?}\nips: [{ips}]\n\
             workload: {{name: {name}, namespace: default, serviceAccount: {name}}}\n{more}"
        );
        let file = self.folder().join(format!("{name}.yaml"));
        fs::write(file.with_extension("new"), text).expect("a file");
        fs::rename(file.with_extension("new"), file).expect("a file");
    }

    pub(crate) fn settings(&self, mode: Mode) -> Settings {
        self.settings_with(mode, &self.mesh_section(), &self.identity_section())
    }

    /// The settings with these sections for the mesh and the identity.
    pub(crate) fn settings_with(&self, mode: Mode, mesh: &str, identity: &str) -> Settings {
        let settings = Settings::node("node", &format!("directory: {:?}", self.folder()));
        let settings = settings.section(identity).section(mesh).set("proxy.mtls=strict");
        let settings = settings.set("proxy.workers=2").set(mode.setting());
        settings.set(&format!("take_over.socket={}", self.socket().display()))
    }

    /// A mesh in a file.
    pub(crate) fn mesh_section(&self) -> String {
        let mesh = Mesh::default().hbone(&self.a).hbone(&self.b).write(&self.node, "mesh");
        format!("mesh: {{file: {mesh:?}}}")
    }

    /// The identities of a local CA.
    pub(crate) fn identity_section(&self) -> String {
        format!("identity: {{local_ca: {:?}}}", self.pki.dir())
    }

    pub(crate) async fn daemon(&self, mode: Mode) -> Proxy {
        let daemon = self.daemon_with(&self.settings(mode)).await;
        assert_eq!(child(daemon.pid()).is_some(), mode == Mode::Broker, "{}", daemon.log());
        daemon
    }

    pub(crate) async fn daemon_with(&self, settings: &Settings) -> Proxy {
        let daemon = self.node.proxy(settings).await;
        self.serves(&["a", "b"]).await;
        daemon
    }

    /// Starts a daemon that takes over from `old`, and waits until `old` logs that.
    pub(crate) async fn start_successor(&self, old: &mut Proxy, mode: Mode) -> Proxy {
        self.start_successor_with(old, self.settings(mode)).await
    }

    pub(crate) async fn start_successor_with(&self, old: &mut Proxy, settings: Settings) -> Proxy {
        let new = self.node.proxy(&settings.take_over()).await;
        old.line(&["another process has taken over", &format!("pid={}", new.pid())]).await;
        new
    }

    pub(crate) async fn get(&self, path: &str) -> (u16, String) {
        http_get(&self.node, ([127, 0, 0, 1], 15021).into(), path).await
    }

    /// Waits until exactly these pods are served.
    pub(crate) async fn serves(&self, names: &[&str]) {
        let expected: String =
            names.iter().map(|name| format!("default/{name} uid-{name} serving\n")).collect();
        until(&format!("served:\n{expected}"), async || {
            self.get("/healthz/pods").await.1 == expected
        })
        .await;
    }

    /// Sends bytes from `a` to the echo in `b`, and back.
    pub(crate) async fn echoed(&self) {
        let mut stream = self.a.dial(self.b.at(Family::V4, APP)).await.expect("connected");
        stream.write_all(b"hello").await.expect("sent");
        stream.shutdown().await.expect("ended");
        assert_eq!(read_to_end(&mut stream).await, (b"hello".to_vec(), End::Fin));
    }

    /// Asserts that the rules of both pods are installed.
    pub(crate) async fn assert_rules(&self) {
        for pod in [&self.a, &self.b] {
            let listed = tool(pod, "nft", &["list", "table", "inet", TABLE]).await;
            assert!(listed.status.success(), "{}: {}", pod.name(), listed.err);
        }
    }
}

/// The child of a process, if it has one.
pub(crate) fn child(pid: u32) -> Option<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    tasks.flatten().find_map(|task| {
        let children = fs::read_to_string(task.path().join("children")).ok()?;
        children.split_whitespace().next()?.parse().ok()
    })
}

pub(crate) fn is_running(pid: u32) -> bool {
    // A zombie has ended, but its parent has not waited for it.
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    !status.is_empty() && !status.contains("State:\tZ")
}
