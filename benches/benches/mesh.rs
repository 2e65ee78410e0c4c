//! `cargo bench -p underpass-benches --bench mesh -- [WORKLOADS [SERVICES [POLICIES]]]`: what a mesh of files takes to load, to follow, to
//! hold, to ask and to free.
//!
//! Memory is resident memory (`/proc/self/status`) beyond what the process had before: the most while loading, and what is left once
//! loaded. Rows: a cold load of one file, then one while the last snapshot is still held, then one of a file with no more keys than
//! are needed; the same mesh in 100 files that are followed, and each change of one of them until there is a new snapshot. A change is
//! waited for until it has settled, which is part of its time, though not of its CPU. Memory that was freed before is taken again without
//! being seen: of all but the first row it says little.

#![expect(
    clippy::expect_used,
    reason = "a bench that meets an error must stop loudly: its figures would be worth nothing"
)]
#![expect(clippy::print_stdout, reason = "this is a program for a terminal")]

use std::fs;
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::Range;
use std::path::Path;

use tokio::time::Instant;
use underpass_config::{Mesh, MeshSource};

/// How many files the mesh that is followed has.
const FILES: u32 = 100;
/// How many of them change, one after the other.
const CHANGES: u32 = 5;
/// How many lookups are one figure.
const LOOKUPS: u32 = 1_000_000;

fn main() {
    let Some(arguments) = underpass_benches::asked() else { return };
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
        part(&many, n, [workloads, services, policies]);
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
    fs::remove_dir_all(&folder).expect("it can be removed");
    look_up(&second, workloads, services);
    let began = Instant::now();
    drop(second);
    println!("to free it: {:.1} ms", began.elapsed().as_secs_f64() * 1e3);
}

/// Writes one of [`FILES`] files, with its share of what there is.
fn part(folder: &Path, n: u32, all: [u32; 3]) {
    let [workloads, services, policies] =
        all.map(|count| count * n / FILES..count * (n + 1) / FILES);
    let text = mesh(workloads, services, policies, all[1], false);
    fs::write(folder.join(format!("{n:03}.yaml")), text).expect("the folder can be written");
}

fn follow(folder: &Path) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let runtime = runtime.expect("a runtime needs nothing that is not there");
    let name = format!("{FILES} files");
    let (mut source, mut mesh) = runtime.block_on(async {
        load(&name, || MeshSource::open(Some(folder)).expect("the mesh is right"))
    });
    for n in 0..CHANGES {
        let changed = folder.join(format!("{n:03}.yaml"));
        let text = fs::read_to_string(&changed).expect("it was written");
        fs::write(&changed, text.replace("canonicalRevision: v1", "canonicalRevision: v2"))
            .expect("the folder can be written");
        let before = mesh;
        mesh = load("one of them changed", || {
            runtime.block_on(source.changed()).expect("the mesh is right")
        });
        runtime.block_on(before.retire());
    }
}

fn load<T>(name: &str, read: impl FnOnce() -> T) -> T {
    // Makes the kernel forget the peak so far (proc_pid_clear_refs(5)).
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
        black_box(mesh.workload("", address(10, scatter(n) % workloads)));
    }
    println!("\nworkloads by address: {:.1} million/s", per_second(began));
    let began = Instant::now();
    for n in 0..LOOKUPS {
        black_box(mesh.service("", address(11, scatter(n) % services), "ns-1"));
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

/// A number far from the last one, so that the processor's cache does not have it.
fn scatter(n: u32) -> u32 {
    n.wrapping_mul(2_654_435_761)
}

fn address(net: u8, n: u32) -> IpAddr {
    let [_, b, c, d] = n.to_be_bytes();
    Ipv4Addr::new(net, b, c, d).into()
}

fn hostname(service: u32) -> String {
    format!("svc-{service}.ns-{}.svc.cluster.local", service % 500)
}

/// A document as a control plane would write it, of a mesh with `all` services: each key that is commonly there, or `lean`.
fn mesh(
    workloads: Range<u32>,
    services: Range<u32>,
    policies: Range<u32>,
    all: u32,
    lean: bool,
) -> String {
    let mut text = String::from("workloads:\n");
    for n in workloads {
        let service = n % all.max(1);
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
        if all > 0 {
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

/// What all threads have used so far, in user mode and in the kernel (proc_pid_stat(5), fields 14 and 15): on a busy machine it says more than
/// the clock.
fn processor_seconds() -> f64 {
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = fs::read_to_string("/proc/self/stat").expect("/proc is there");
    // The name of the program may have anything in it; the third field follows its last bracket.
    let (_, fields) = stat.rsplit_once(')').expect("the kernel writes it so");
    let ticks = fields.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<f64>());
    ticks.map(|ticks| ticks.expect("it is a number")).sum::<f64>() / TICKS_PER_SECOND
}

/// A line of `/proc/self/status`, in MiB.
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
