//! Measures a node daemon with many idle pods: `cargo bench -p underpass-benches --bench node [--
//! --pods 1000]`.
//!
//! Each pod is a network namespace with a link to the node, a separate identity from a local CA,
//! and separate rules. The figures are the time from the first file of a pod to the last served
//! pod, and the resources of the daemon while all pods are idle.

#![expect(
    clippy::expect_used,
    reason = "a bench must stop at an error, as its figures would be wrong"
)]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this is a program for a terminal")]

use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use clap::Parser;
use tokio::time::{Instant, sleep};
use underpass_benches::{Idle, bench_arguments, runtime_with_pods};
use underpass_interception::{Endpoint, IpNet, Namespace, veth};
use underpass_tests::{Pki, Pod, Proxy, Settings, World, http_get};

/// The interval of reading the pods' status.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// Timeout for serving all pods.
const SERVE_TIMEOUT: Duration = Duration::from_secs(300);

/// Measure a node daemon with many idle pods
#[derive(Debug, Parser)]
#[command(name = "cargo bench -p underpass-benches --bench node --")]
struct Options {
    /// Number of pods
    #[arg(long, default_value_t = 250)]
    pods: u16,
    /// Seconds to wait until the node is idle, and then to measure it
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    if bench_arguments().is_none() {
        return;
    }
    let options = Options::parse();
    runtime_with_pods().block_on(measure(&options));
}

async fn measure(options: &Options) {
    let world = World::new();
    let node = world.pod("node").await;
    let mut pods = Vec::new();
    for number in 0..options.pods {
        pods.push(create_pod(&node, number).await);
    }
    let folder = world.folder().join("pods");
    fs::create_dir(&folder).expect("a folder");
    let daemon = start_daemon(&world, &node, &pods, &folder).await;
    let pid = daemon.pid();
    let before = Idle::read(pid);
    eprintln!("{} pods are created; the daemon runs without a pod: {before}", pods.len());

    let began = Instant::now();
    for pod in &pods {
        let file = folder.join(format!("{}.yaml", pod.name));
        fs::write(file.with_extension("new"), pod.file()).expect("a file");
        fs::rename(file.with_extension("new"), file).expect("a file");
    }
    let served = |text: &str| text.lines().filter(|line| line.ends_with(" serving")).count();
    while served(&status(&node).await) < pods.len() {
        assert!(
            began.elapsed() < SERVE_TIMEOUT,
            "not every pod is served in time:\n{}",
            status(&node).await
        );
        sleep(POLL_INTERVAL).await;
    }
    let took = began.elapsed();
    sleep(Duration::from_secs(options.seconds)).await;
    let after = Idle::read(pid);
    sleep(Duration::from_secs(options.seconds)).await;
    let (later, seconds) = (Idle::read(pid), options.seconds as f64);
    let count = f64::from(options.pods);
    println!(
        "{} pods served with certificates in {:.2} s; each idle pod: {:.0} KiB private memory, {:.1} descriptors",
        options.pods,
        took.as_secs_f64(),
        (after.private_kib - before.private_kib) / count,
        (after.descriptors - before.descriptors) / count,
    );
    println!(
        "the idle node: {after}; {:.2} wake-ups/s, {:.1} ms CPU/s",
        (later.wakeups - after.wakeups) / seconds,
        (later.cpu_seconds - after.cpu_seconds) / seconds * 1000.0,
    );
    drop(daemon);
}

/// A pod that is not served yet.
struct UnservedPod {
    name: String,
    namespace: Namespace,
    address: Ipv4Addr,
}

impl UnservedPod {
    /// The content of its file in the folder of pods.
    fn file(&self) -> String {
        let Self { name, namespace, address } = self;
        let path = namespace.path().display();
        format!(
            "uid: {name}\nnetns: {path}\nips: [{address}]\nworkload: {{name: {name}, namespace: default, serviceAccount: {name}}}\n"
        )
    }
}

/// Creates a pod with a default route to the node.
async fn create_pod(node: &Pod, number: u16) -> UnservedPod {
    let name = format!("pod-{number}");
    let namespace = Namespace::create_named(&format!("bench-{name}")).expect("a namespace");
    namespace.set_loopback_up().await.expect("a loopback interface");
    let [high, low] = number.to_be_bytes();
    // Each link has the network 10.(128 + high).low.0/24: host 1 is the pod, host 2 is the node.
    let address = |host| Ipv4Addr::new(10, 128 | high, low, host);
    let networks = [1, 2].map(|host| [IpNet::new_assert(IpAddr::V4(address(host)), 24)]);
    let interface = format!("pod{number}");
    let inside = Endpoint {
        namespace: &namespace,
        interface: "eth0",
        addresses: &networks[0],
        default_route: true,
    };
    let outside = Endpoint {
        namespace: node.namespace(),
        interface: &interface,
        addresses: &networks[1],
        default_route: false,
    };
    veth(&inside, &outside).await.expect("a link");
    UnservedPod { name, address: address(1), namespace }
}

/// Starts the daemon with an empty folder of pods.
async fn start_daemon(world: &World, node: &Pod, pods: &[UnservedPod], folder: &Path) -> Proxy {
    let pki = Pki::new(world.folder());
    let mut mesh = String::from("workloads:\n");
    for UnservedPod { name, address, .. } in pods {
        writeln!(
            mesh,
            "- {{name: {name}, namespace: default, serviceAccount: {name}, workloadIps: [{address}], protocol: HBONE}}"
        )
        .expect("text");
    }
    let file = world.folder().join("mesh.yaml");
    fs::write(&file, mesh).expect("a mesh file");
    let settings = Settings::node("node", &format!("directory: {}", folder.display()))
        .mesh(&file)
        .section(&format!("identity: {{local_ca: {}}}", pki.dir().display()))
        .set("logging.filter=warn");
    node.proxy(&settings).await
}

async fn status(node: &Pod) -> String {
    let server = SocketAddr::from((Ipv4Addr::LOCALHOST, 15021));
    http_get(node, server, "/healthz/pods").await.1
}
