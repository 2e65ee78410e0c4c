//! Two pods of one node in the process of the test, and the node's log and counters.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::net::TcpStream;
use tracing_subscriber::fmt::MakeWriter;
use underpass::testing::{TestNode, TestPod};
use underpass_tests::{APP, Family, Mesh, Pki, Pod, Settings, World, until};

/// The maximum duration of a removed pod's drain.
pub(crate) const DRAIN: Duration = Duration::from_millis(300);
/// The values of `proxy.same_node`.
pub(crate) const MODES: [&str; 2] = ["tunnel", "direct"];

/// Two wired pods without proxies.
pub(crate) struct Scene {
    pub(crate) a: Pod,
    pub(crate) b: Pod,
    pub(crate) pki: Pki,
    pub(crate) world: World,
    /// Serializes the trials: the metrics and log lines of the process belong to one trial at a
    /// time.
    _turn: tokio::sync::MutexGuard<'static, ()>,
}

impl Scene {
    pub(crate) async fn new() -> Self {
        static TRIAL_LOCK: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
        let turn = TRIAL_LOCK.lock().await;
        let mut world = World::new();
        let (mut a, mut b) = (world.pod("a").await, world.pod("b").await);
        world.wire(&mut a, &mut b).await;
        let pki = Pki::new(world.folder());
        let scene = Self { a, b, pki, world, _turn: turn };
        scene.set_mesh(&scene.mesh());
        scene
    }

    /// A mesh with both pods and without policies.
    pub(crate) fn mesh(&self) -> Mesh {
        Mesh::default().hbone(&self.a).hbone(&self.b)
    }

    pub(crate) fn mesh_file(&self) -> PathBuf {
        self.world.folder().join("mesh.yaml")
    }

    pub(crate) fn set_mesh(&self, mesh: &Mesh) {
        assert_eq!(mesh.write(&self.a, "mesh"), self.mesh_file());
    }

    /// The settings of the pod `name` without an identity.
    pub(crate) fn settings(&self, name: &str) -> Settings {
        Settings::new(name).mesh(&self.mesh_file()).set("interception.on_exit=remove")
    }

    /// The settings of the pod `name` with a valid certificate.
    pub(crate) fn with_identity(&self, name: &str) -> Settings {
        self.settings(name).identity(&self.pki.issue(name))
    }

    /// A node that connects its two pods in `mode`.
    pub(crate) async fn node(&self, mode: &str, a: Settings, b: Settings) -> Served {
        let own = self.settings("a").set(&format!("proxy.same_node={mode}"));
        let node = TestNode::start(&own.load(&self.a), 2).expect("a node");
        let first = node.add_pod(a.load(&self.a), self.a.namespace().clone()).await;
        let second = node.add_pod(b.load(&self.b), self.b.namespace().clone()).await;
        Served { node, a: first.expect("a pod"), b: second.expect("a pod") }
    }

    /// A node with two valid pods.
    pub(crate) async fn valid_node(&self, mode: &str) -> Served {
        self.node(mode, self.with_identity("a"), self.with_identity("b")).await
    }

    /// A connection from `a` to the application at `b`.
    pub(crate) async fn connect(&self, family: Family) -> io::Result<TcpStream> {
        self.a.dial(self.b.at(family, APP)).await
    }
}

/// A node and its pods.
pub(crate) struct Served {
    pub(crate) node: TestNode,
    pub(crate) a: TestPod,
    pub(crate) b: TestPod,
}

impl Served {
    pub(crate) async fn stop(self) {
        for pod in [self.a, self.b] {
            self.node.remove_pod(pod, DRAIN).await.expect("removed");
        }
        self.node.stop().await;
    }

    /// The number of connections without a tunnel.
    pub(crate) fn direct_connections(&self) -> u64 {
        self.metrics("underpass_direct_connections_total").values().sum()
    }

    /// The values of all series whose names begin with `prefix`.
    pub(crate) fn metrics(&self, prefix: &str) -> BTreeMap<String, u64> {
        let text = self.node.metrics();
        let lines = text.lines().filter(|line| line.starts_with(prefix));
        let series = lines.filter_map(|line| line.rsplit_once(' '));
        series.filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?))).collect()
    }
}

/// The increase of each counter since `before`.
pub(crate) fn since(
    before: &BTreeMap<String, u64>,
    now: &BTreeMap<String, u64>,
) -> BTreeMap<String, u64> {
    let added = |name: &String, value: &u64| value - before.get(name).copied().unwrap_or_default();
    let all = now.iter().map(|(name, value)| (name.clone(), added(name, value)));
    all.filter(|(_, added)| *added > 0).collect()
}

/// The access log of the process.
pub(crate) struct AccessLog;

static LINES: Mutex<Vec<u8>> = Mutex::new(Vec::new());

impl AccessLog {
    /// Starts to record the log, and drops earlier lines.
    pub(crate) fn start() {
        static STARTED: OnceLock<()> = OnceLock::new();
        STARTED.get_or_init(|| {
            let filter = "access=info".parse::<tracing_subscriber::filter::Targets>();
            let layer = tracing_subscriber::fmt::layer().without_time().with_ansi(false);
            use tracing_subscriber::layer::SubscriberExt as _;
            use tracing_subscriber::util::SubscriberInitExt as _;
            let registry = tracing_subscriber::registry().with(filter.expect("a filter"));
            registry.with(layer.with_writer(Self)).init();
        });
        lines().clear();
    }

    /// The next `count` records, without the fields that differ between similar connections: ports,
    /// trace and times.
    pub(crate) async fn records(count: usize) -> Vec<String> {
        until("the records of a connection", async || {
            lines().iter().filter(|byte| **byte == b'\n').count() >= count
        })
        .await;
        let text = String::from_utf8(lines().clone()).expect("text");
        let mut records: Vec<_> = text.lines().map(comparable).collect();
        records.sort();
        records
    }
}

fn lines() -> MutexGuard<'static, Vec<u8>> {
    LINES.lock().unwrap_or_else(PoisonError::into_inner)
}

fn comparable(line: &str) -> String {
    // The side that closes a failed handshake first varies.
    let line = line.split(" error=\"the tunnel failed: TLS failed").next().unwrap_or(line);
    let kept = line.split(' ').filter_map(|word| match word.split_once('=') {
        Some(("duration" | "connect_ms" | "first_byte_ms" | "trace_id", _)) => None,
        Some(("src.addr", address)) => Some(format!("src.addr={}", address.rsplit_once(':')?.0)),
        _ => Some(word.to_owned()),
    });
    kept.collect::<Vec<_>>().join(" ")
}

impl<'a> MakeWriter<'a> for AccessLog {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        Self
    }
}

impl Write for AccessLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lines().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
