//! Measures loading, following, holding, querying and freeing a mesh: `cargo bench -p
//! underpass-benches --bench mesh -- [WORKLOADS [SERVICES [POLICIES]]]`.
//!
//! Memory is how much resident memory (`/proc/self/status`) grows by the load: the peak while
//! loading, and what remains afterwards. The rows are
//!
//! * a cold load of one file, a load while the previous snapshot is held, and a load of a file with
//!   required keys only;
//! * the same mesh in 100 watched files, and the time from each change of one file to the new
//!   snapshot. The wait for further changes is part of that time, but not of the CPU time;
//! * the same mesh in the first response of a control plane;
//! * 10,000 changes of one workload each, with a snapshot after every 100. At 1,000 changes a
//!   second, that would be ten snapshots a second.
//!
//! The allocator reuses freed memory, so only the first row's memory is exact.

#![expect(
    clippy::expect_used,
    reason = "a bench must stop at an error, as its figures would be wrong"
)]
#![expect(clippy::print_stdout, reason = "this is a program for a terminal")]

use std::fs;
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::Range;
use std::path::Path;

use bytes::Bytes;
use prost::Message as _;
use tokio::time::Instant;
use underpass_config::{
    ControlPlane, DeltaResponse, FileWatcher, LocalWorkloads, Mesh, MeshSource, Node, Resource,
    ResourceType, retire_mesh,
};
use underpass_interception::{Inotify, run_in_background};
use underpass_tests::{field, number, resource, response};

/// The number of files of the watched mesh.
const FILES: u32 = 100;
/// The number of files that change, one after another.
const CHANGES: u32 = 5;
/// The number of lookups per figure.
const LOOKUPS: u32 = 1_000_000;
/// The number of changes by a control plane.
const DELTAS: u32 = 10_000;
/// The number of changes in one snapshot.
const DELTAS_PER_SNAPSHOT: u32 = 100;

fn main() {
    let Some(arguments) = underpass_benches::bench_arguments() else { return };
    let mut sizes = arguments.iter().filter_map(|argument| argument.parse().ok());
    let workloads = sizes.next().unwrap_or(100_000);
    let services = sizes.next().unwrap_or(10_000);
    let policies = sizes.next().unwrap_or(0);
    let folder = std::env::temp_dir().join(format!("underpass-bench-mesh-{}", std::process::id()));
    let (full, lean, many) =
        (folder.join("full.yaml"), folder.join("lean.yaml"), folder.join("many"));
    fs::create_dir_all(&many).expect("the temporary folder can be written");
    println!("{workloads} workloads, {services} services, {policies} policies");
    let size = |file, text: String| {
        fs::write(file, &text).expect("the temporary folder can be written");
        mebibytes(text.len())
    };
    let full_size = size(&full, mesh(0..workloads, 0..services, 0..policies, services, false));
    let lean_size = size(&lean, mesh(0..workloads, 0..services, 0..policies, services, true));
    for n in 0..FILES {
        write_part(&many, n, [workloads, services, policies]);
    }
    println!(
        "{full_size:.1} MiB of YAML, {lean_size:.1} MiB without the keys that may be left out\n"
    );
    println!("| load | s | CPU, s | peak, MiB | held, MiB |\n|---|---|---|---|---|");
    let first = load("cold", || Mesh::from_file(&full).expect("the mesh is right"));
    let second = load("again", || Mesh::from_file(&full).expect("the mesh is right"));
    drop(first);
    drop(load("lean", || Mesh::from_file(&lean).expect("the mesh is right")));
    follow(&many);
    follow_control_plane(workloads, services);
    fs::remove_dir_all(&folder).expect("it can be removed");
    look_up(&second, workloads, services);
    let began = Instant::now();
    drop(second);
    println!("to free the mesh: {:.1} ms", began.elapsed().as_secs_f64() * 1e3);
}

/// Writes one of [`FILES`] files with its share of the mesh.
fn write_part(folder: &Path, n: u32, all: [u32; 3]) {
    let [workloads, services, policies] =
        all.map(|count| count * n / FILES..count * (n + 1) / FILES);
    let text = mesh(workloads, services, policies, all[1], false);
    fs::write(folder.join(format!("{n:03}.yaml")), text).expect("the folder can be written");
}

fn follow(folder: &Path) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("the runtime starts");
    let name = format!("{FILES} files");
    let (mut source, mut mesh) = runtime.block_on(async {
        load(&name, || {
            MeshSource::open(Some(folder), &FileWatcher::new(Inotify::open), run_in_background)
                .expect("the mesh is right")
        })
    });
    for n in 0..CHANGES {
        let changed = folder.join(format!("{n:03}.yaml"));
        let text = fs::read_to_string(&changed).expect("it was written");
        fs::write(&changed, text.replace("canonicalRevision: v1", "canonicalRevision: v2"))
            .expect("the folder can be written");
        let previous = mesh;
        mesh = load("one of them changed", || {
            runtime.block_on(source.changed()).expect("the mesh is right")
        });
        runtime.block_on(retire_mesh(previous, run_in_background));
    }
}

fn follow_control_plane(workloads: u32, services: u32) {
    let kind = ResourceType::Address;
    let mut plane = ControlPlane::new(Node::default(), LocalWorkloads::default(), false);
    // As with the channel, the messages share the memory of the encoded response.
    let encoded: Bytes = {
        let addresses = (0..workloads).map(|n| address_of_workload(n, services, "v1"));
        let all = addresses.chain((0..services).map(address_of_service)).collect();
        response(kind, all, &[]).encode_to_vec().into()
    };
    println!("| {:.1} MiB in a response | | | | |", mebibytes(encoded.len()));
    let first = load("first state of a control plane", || {
        let response = DeltaResponse::decode(encoded).expect("it was encoded");
        let applied = plane.receive(response).expect("the protocol is kept");
        assert!(applied.rejected.is_empty(), "{:?}", applied.rejected.first());
        plane.snapshot()
    });
    assert_eq!(first.size().workloads, usize::try_from(workloads).expect("a number"));
    let mut held = first;
    let name = format!("{DELTAS} changes, {} snapshots", DELTAS / DELTAS_PER_SNAPSHOT);
    load(&name, || {
        for n in 0..DELTAS {
            let changed = address_of_workload(scattered(n) % workloads, services, "v2");
            let applied = plane.receive(response(kind, vec![changed], &[]));
            assert!(applied.expect("the protocol is kept").rejected.is_empty());
            if n % DELTAS_PER_SNAPSHOT == 0 {
                held = plane.snapshot();
            }
        }
    });
    look_up(&held, workloads, services);
}

/// The workload of [`mesh`] as a resource.
fn address_of_workload(n: u32, services: u32, revision: &str) -> Resource {
    let service = n % services.max(1);
    let namespace = format!("ns-{}", service % 500);
    let app = format!("app-{service}");
    let uid = format!("cluster1//Pod/{namespace}/app-{service}-{n}");
    let port = |port, target| field(1, [number(1, port), number(2, target)].concat());
    let ports = [port(80, 8080), port(443, 8443)].concat();
    let key = format!("{namespace}/{}", hostname(service));
    let locality = [field(1, format!("r{}", n % 3)), field(2, format!("z{}", n % 9))].concat();
    let workload = [
        field(1, format!("{app}-{n}")),
        field(2, &namespace),
        field(3, octets(10, n)),
        number(5, 1),
        field(7, format!("sa-{service}")),
        field(9, format!("node-{}", n % 2000)),
        field(10, &app),
        field(11, revision),
        field(13, &app),
        field(18, "cluster1"),
        field(20, &uid),
        field(22, [field(1, key), field(2, ports)].concat()),
        field(24, locality),
    ];
    resource(ResourceType::Address, &uid, field(1, workload.concat()))
}

/// The service of [`mesh`] as a resource.
fn address_of_service(n: u32) -> Resource {
    let namespace = format!("ns-{}", n % 500);
    let port = |port, target| field(5, [number(1, port), number(2, target)].concat());
    let service = [
        field(1, format!("svc-{n}")),
        field(2, &namespace),
        field(3, hostname(n)),
        field(4, field(2, octets(11, n))),
        port(80, 8080),
        port(443, 8443),
        field(6, format!("spiffe://cluster.local/ns/{namespace}/sa/sa-{n}")),
        number(11, 1),
    ];
    let name = format!("{namespace}/{}", hostname(n));
    resource(ResourceType::Address, &name, field(2, service.concat()))
}

fn octets(net: u8, n: u32) -> [u8; 4] {
    let [_, b, c, d] = n.to_be_bytes();
    [net, b, c, d]
}

fn load<T>(name: &str, read: impl FnOnce() -> T) -> T {
    // Resets the peak (proc_pid_clear_refs(5)).
    fs::write("/proc/self/clear_refs", "5").expect("our own peak can be reset");
    let before = status("VmRSS");
    let (began, used) = (Instant::now(), processor_seconds());
    let mesh = read();
    let (took, used) = (began.elapsed().as_secs_f64(), processor_seconds() - used);
    let (peak, held) = (status("VmHWM") - before, status("VmRSS") - before);
    println!("| {name} | {took:.2} | {used:.2} | {peak:.0} | {held:.0} |");
    mesh
}

fn look_up(mesh: &Mesh, workloads: u32, services: u32) {
    let began = Instant::now();
    for n in 0..LOOKUPS {
        black_box(mesh.workload("", address(10, scattered(n) % workloads)));
    }
    println!("\nworkloads by address: {:.1} million/s", per_second(began));
    let began = Instant::now();
    for n in 0..LOOKUPS {
        black_box(mesh.service("", address(11, scattered(n) % services), "ns-1"));
    }
    println!("services by virtual address: {:.1} million/s", per_second(began));
    let names: Vec<_> = (0..services).map(hostname).collect();
    let began = Instant::now();
    for name in names.iter().cycle().take(LOOKUPS as usize) {
        black_box(mesh.service_by_hostname(name, "ns-1"));
    }
    println!("services by hostname: {:.1} million/s", per_second(began));
}

fn per_second(began: Instant) -> f64 {
    f64::from(LOOKUPS) / began.elapsed().as_secs_f64() / 1e6
}

/// Spreads successive numbers, so that lookups do not profit from the CPU cache.
fn scattered(n: u32) -> u32 {
    n.wrapping_mul(2_654_435_761)
}

fn address(net: u8, n: u32) -> IpAddr {
    Ipv4Addr::from(octets(net, n)).into()
}

fn hostname(service: u32) -> String {
    format!("svc-{service}.ns-{}.svc.cluster.local", service % 500)
}

/// A mesh file in the style of a control plane, with these ranges of items. The whole mesh has
/// `all_services`. The file has all common keys, or only required ones if `lean`.
fn mesh(
    workloads: Range<u32>,
    services: Range<u32>,
    policies: Range<u32>,
    all_services: u32,
    lean: bool,
) -> String {
    let mut text = String::from("workloads:\n");
    for n in workloads {
        let service = n % all_services.max(1);
        let namespace = service % 500;
        text += &format!(
            "- name: app-{service}-{n}\n  namespace: ns-{namespace}\n  serviceAccount: sa-{service}\n  \
             workloadIps: [\"{}\"]\n  protocol: HBONE\n  node: node-{}\n  network: \"\"\n",
            address(10, n),
            n % 2000,
        );
        if !lean {
            text += &format!(
                "  uid: cluster1//Pod/ns-{namespace}/app-{service}-{n}\n  trustDomain: cluster.local\n  clusterId: cluster1\n  \
                 workloadName: app-{service}\n  workloadType: deployment\n  canonicalName: app-{service}\n  \
                 canonicalRevision: v1\n  locality: {{region: r{}, zone: z{}, subzone: \"\"}}\n",
                n % 3,
                n % 9,
            );
        }
        if all_services > 0 {
            let host = hostname(service);
            let ports = if lean { "      80: 8080\n" } else { "      80: 8080\n      443: 8443\n" };
            text += &format!("  services:\n    ns-{namespace}/{host}:\n{ports}");
        }
    }
    text.push_str("services:\n");
    for n in services {
        text += &format!(
            "- name: svc-{n}\n  namespace: ns-{}\n  hostname: {}\n  vips: [/{}]\n  ports:\n    80: 8080\n    443: 8443\n  \
             subjectAltNames: [spiffe://cluster.local/ns/ns-{}/sa/sa-{n}]\n  canonical: true\n",
            n % 500,
            hostname(n),
            address(11, n),
            n % 500,
        );
    }
    text.push_str("policies:\n");
    for n in policies {
        text += &format!(
            "- name: policy-{n}\n  namespace: ns-{}\n  scope: Namespace\n  action: Allow\n  dryRun: false\n  rules:\n  \
             - - - principals: [!Exact cluster.local/ns/ns-{}/sa/sa-{n}]\n",
            n % 500,
            n % 500,
        );
    }
    text
}

/// The CPU time of all threads so far, in user and kernel mode (proc_pid_stat(5), fields 14 and
/// 15). On a busy machine it is more meaningful than elapsed time.
fn processor_seconds() -> f64 {
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = fs::read_to_string("/proc/self/stat").expect("/proc is there");
    // The name of the program may contain any character. The third field follows the name's closing
    // bracket.
    let (_, fields) = stat.rsplit_once(')').expect("the format of proc_pid_stat(5)");
    let ticks = fields.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<f64>());
    ticks.map(|ticks| ticks.expect("it is a number")).sum::<f64>() / TICKS_PER_SECOND
}

/// The value of a line of `/proc/self/status` in MiB.
fn status(key: &str) -> f64 {
    let status = fs::read_to_string("/proc/self/status").expect("/proc is there");
    let line = status.lines().find(|line| line.starts_with(key)).expect("the kernel knows it");
    let kibibytes: f64 = line
        .split_whitespace()
        .nth(1)
        .and_then(|number| number.parse().ok())
        .expect("it is a number");
    kibibytes / 1024.0
}

fn mebibytes(bytes: usize) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    let bytes = bytes as f64;
    bytes / 1024.0 / 1024.0
}
