//! Measures the effect of a mesh change on open connections: `cargo bench -p underpass-benches
//! --bench changes -- [--connections N]`.
//!
//! * **cut**: a policy denies 9,000 plaintext connections. The figures are the time until all of
//!   them have ended, and the latency of requests on another connection through the same proxy
//!   meanwhile.
//! * **update**: 64 connections send requests through both proxies. The mesh has 100,000 workloads
//!   and 10,000 services in 100 files, of which one changes twice a second. The figures are
//!   latencies with and without changes, measured alternately.
//!
//! Each connection needs two descriptors in the proxy and two in this program: 9,000 connections
//! fit a limit of 20,000 descriptors.

#![expect(
    clippy::expect_used,
    reason = "a bench must stop at an error, as its figures would be wrong"
)]
#![expect(clippy::print_stdout, reason = "this is a program for a terminal")]

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, sleep};
use underpass_benches::{RequestMode, Traffic, runtime_with_pods};
use underpass_interception::Namespace;
use underpass_tests::{CLIENT, Family, Mesh, Pki, Pod, Proxy, SERVER, Settings, World};

/// The server's ports for connections that stay open. Several are needed, because ephemeral ports
/// limit how many connections a client can have to one port.
const HELD_PORTS: [u16; 4] = [9101, 9102, 9103, 9104];
/// The port for the requests whose latency is measured.
const ANSWER: u16 = 9003;
const MESSAGE: usize = 100;
const WORKLOADS: usize = 100_000;
const SERVICES: usize = 10_000;
const FILES: usize = 100;
const ROUNDS: usize = 6;

fn main() {
    let Some(arguments) = underpass_benches::bench_arguments() else { return };
    let option = arguments.iter().skip_while(|argument| *argument != "--connections").nth(1);
    let connections = option.and_then(|number| number.parse().ok()).unwrap_or(9_000);
    runtime_with_pods().block_on(async {
        cut(connections).await;
        update().await;
    });
}

/// Two connected pods.
struct Pods {
    world: World,
    pki: Pki,
    client: Pod,
    server: Pod,
}

impl Pods {
    async fn new() -> Self {
        let mut world = World::new();
        let (mut client, mut server) = (world.pod(CLIENT).await, world.pod(SERVER).await);
        world.wire(&mut client, &mut server).await;
        for pod in [&client, &server] {
            pod.sysctl("net/ipv4/ip_local_port_range", "1024 65000");
        }
        serve(&server);
        let pki = Pki::new(world.folder());
        Self { world, pki, client, server }
    }

    async fn proxy(&self, pod: &Pod, mesh: &Path) -> Proxy {
        let settings = Settings::new(pod.name())
            .identity(&self.pki.issue(pod.name()))
            .mesh(mesh)
            .set("logging.filter=info");
        pod.proxy(&settings).await
    }
}

/// Starts an application that answers requests on every port, on a separate thread.
fn serve(pod: &Pod) {
    in_pod(pod.namespace(), async || {
        for port in HELD_PORTS.into_iter().chain([ANSWER]) {
            let listener = TcpListener::bind(("0.0.0.0", port)).await.expect("a free port");
            tokio::spawn(async move {
                loop {
                    let (stream, _) = listener.accept().await.expect("accept");
                    tokio::spawn(answer(stream));
                }
            });
        }
        std::future::pending::<()>().await;
    });
}

async fn answer(mut stream: TcpStream) {
    let mut message = [0; MESSAGE];
    while stream.read_exact(&mut message).await.is_ok() && stream.write_all(&message).await.is_ok()
    {
    }
}

/// Runs `work` on a new thread in the pod, with a separate runtime.
fn in_pod<T: Send + 'static>(
    pod: &Namespace,
    work: impl AsyncFnOnce() -> T + Send + 'static,
) -> thread::JoinHandle<T> {
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime starts").block_on(work())
    };
    pod.run(|| thread::spawn(run)).expect("the pod can be entered")
}

async fn send_request(stream: &mut TcpStream) -> std::io::Result<()> {
    let mut message = [0; MESSAGE];
    stream.write_all(&message).await?;
    stream.read_exact(&mut message).await.map(drop)
}

async fn cut(connections: usize) {
    let pods = Pods::new().await;
    let file = pods.world.folder().join("mesh.yaml");
    let write = |mesh: Mesh| mesh.write(&pods.client, "mesh");
    let usual = || Mesh::default().hbone(&pods.server);
    assert_eq!(write(usual()), file);
    let mut proxy = pods.proxy(&pods.server, &file).await;
    let (opened, ended) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let counts = (opened.clone(), ended.clone());
    let servers = HELD_PORTS.map(|port| pods.server.at(Family::V4, port));
    in_pod(pods.client.namespace(), async move || {
        let mut held = JoinSet::new();
        for server in servers.into_iter().cycle().take(connections) {
            let mut stream = TcpStream::connect(server).await.expect("a connection");
            send_request(&mut stream).await.expect("an answer");
            counts.0.fetch_add(1, SeqCst);
            let ended = counts.1.clone();
            held.spawn(async move {
                // RST or FIN ends the connection.
                stream.read_u8().await.ok();
                ended.fetch_add(1, SeqCst);
            });
        }
        held.join_all().await;
    });
    wait_until_counted(&opened, connections).await;
    let calm = latencies(&pods, 1, Duration::from_secs(2)).await;
    let ports: Vec<_> = HELD_PORTS.iter().map(u16::to_string).collect();
    let rules = format!("[[[{{destinationPorts: [{}]}}]]]", ports.join(", "));
    let traffic = requests(&pods, 1);
    let began = Instant::now();
    assert_eq!(write(usual().policy("closed", "Deny", &rules)), file);
    wait_until_counted(&ended, connections).await;
    let all_ended = began.elapsed();
    let line = proxy.line(&["the change of the mesh is in force", "generation=2"]).await;
    let took = line.split_whitespace().find(|word| word.starts_with("took=")).unwrap_or_default();
    let (mut during, mut calm) = (stop_requests(traffic), calm);
    println!(
        "| connections | from writing the file to the last RST | part of it in the proxy | concurrent request: p50, p99, max | before |"
    );
    println!("|---|---|---|---|---|");
    println!(
        "| {connections} | {:.2} s | {took} | {} | {} |\n",
        all_ended.as_secs_f64(),
        figures(&mut during),
        figures(&mut calm)
    );
}

async fn wait_until_counted(counter: &AtomicUsize, all: usize) {
    while counter.load(SeqCst) < all {
        sleep(Duration::from_millis(2)).await;
    }
}

/// Starts requests whose latencies are recorded until [`stop_requests`].
fn requests(pods: &Pods, connections: usize) -> Traffic {
    let server = pods.server.at(Family::V4, ANSWER);
    let traffic =
        Traffic::requests(pods.client.namespace(), server, RequestMode::KeepAlive, connections);
    traffic.measure();
    traffic
}

fn stop_requests(traffic: Traffic) -> Vec<u32> {
    traffic.stop();
    traffic.latencies()
}

async fn latencies(pods: &Pods, connections: usize, window: Duration) -> Vec<u32> {
    let traffic = requests(pods, connections);
    sleep(window).await;
    stop_requests(traffic)
}

/// p50, p99 and maximum in µs.
fn figures(latencies: &mut [u32]) -> String {
    latencies.sort_unstable();
    let at = |share: usize| latencies.get((latencies.len() * share / 100).min(latencies.len() - 1));
    let [p50, p99, most] = [50, 99, 100].map(|share| at(share).copied().unwrap_or_default());
    format!("{p50}, {p99}, {most} µs ({} requests)", latencies.len())
}

async fn update() {
    let pods = Pods::new().await;
    let folder = pods.world.folder().join("meshes");
    fs::create_dir_all(&folder).expect("a folder");
    let pods_mesh = Mesh::default().hbone(&pods.client).hbone(&pods.server);
    fs::write(folder.join("pods.yaml"), pods_mesh.text()).expect("a mesh file");
    (0..FILES).for_each(|number| write_part(&folder, number, 0));
    let client = pods.proxy(&pods.client, &folder).await;
    let server = pods.proxy(&pods.server, &folder).await;
    let (mut without, mut with) = (Vec::new(), Vec::new());
    println!(
        "| round | 64 connections: p50, p99, max without changes | with two changes of 1 % a second | p99 ratio |"
    );
    println!("|---|---|---|---|");
    for round in 0..ROUNDS {
        let mut calm = latencies(&pods, 64, Duration::from_secs(5)).await;
        let traffic = requests(&pods, 64);
        let mut ticks = interval(Duration::from_millis(500));
        for change in 0..10 {
            ticks.tick().await;
            write_part(&folder, change % FILES, round * 10 + change + 1);
        }
        ticks.tick().await;
        let mut changing = stop_requests(traffic);
        let (calm_text, changing_text) = (figures(&mut calm), figures(&mut changing));
        let p99 =
            |sorted: &[u32]| f64::from(sorted.get(sorted.len() * 99 / 100).copied().unwrap_or(1));
        println!(
            "| {} | {calm_text} | {changing_text} | {:.2} |",
            round + 1,
            p99(&changing) / p99(&calm)
        );
        without.append(&mut calm);
        with.append(&mut changing);
    }
    println!("| all | {} | {} | |", figures(&mut without), figures(&mut with));
    let changes =
        [&client, &server].map(|proxy| proxy.count(&["the change of the mesh is in force"]));
    println!("\nchanges in force: {changes:?} (client's proxy, server's proxy)");
}

/// Writes file `number` with its share of the mesh. Each `version` has different workloads.
fn write_part(folder: &Path, number: usize, version: usize) {
    let mut text = format!("# version {version}\nworkloads:\n");
    for index in (number * WORKLOADS / FILES)..((number + 1) * WORKLOADS / FILES) {
        let service = index % (SERVICES / FILES) + number * SERVICES / FILES;
        let (a, b, c) = (100 + index / 65536, index / 256 % 256, index % 256);
        writeln!(
            text,
            "- {{uid: c//Pod/ns-{0}/pod-{index}-{version}, name: pod-{index}, namespace: ns-{0}, serviceAccount: sa-{0}, trustDomain: cluster.local, \
             workloadIps: [\"{a}.{b}.{c}.1\"], protocol: HBONE, node: node-{1}, workloadName: app-{service}, workloadType: deployment, \
             canonicalName: app-{service}, canonicalRevision: v1, clusterId: Kubernetes, services: {{ns-{0}/app-{service}.example: {{80: 8080}}}}}}",
            service % 100, index % 500
        )
        .expect("text");
    }
    text.push_str("services:\n");
    for service in (number * SERVICES / FILES)..((number + 1) * SERVICES / FILES) {
        writeln!(
            text,
            "- {{name: app-{service}, namespace: ns-{}, hostname: app-{service}.example, vips: [\"/10.200.{}.{}\"], ports: {{80: 8080}}}}",
            service % 100, service / 256, service % 256
        )
        .expect("text");
    }
    let file: PathBuf = folder.join(format!("part-{number:03}.yaml"));
    let new = file.with_extension("new");
    fs::write(&new, text).expect("a mesh file");
    fs::rename(&new, &file).expect("a mesh file");
}
