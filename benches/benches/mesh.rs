//! `cargo bench -p underpass-benches --bench mesh -- [WORKLOADS [SERVICES [POLICIES]]]`: what a mesh of a file takes to load, to hold,
//! to ask and to free.
//!
//! Memory is resident memory (`/proc/self/status`) beyond what the process had before: the most while loading, and what is left once
//! loaded. Rows: a cold load, then one while the last snapshot is still held, as at each change of the file.

#![expect(
    clippy::expect_used,
    reason = "a bench that meets an error must stop loudly: its figures would be worth nothing"
)]
#![expect(clippy::print_stdout, reason = "this is a program for a terminal")]

use std::fmt::Write as _;
use std::fs;
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};

use tokio::time::Instant;
use underpass_config::Mesh;

/// How many lookups are one figure.
const LOOKUPS: u32 = 1_000_000;

fn main() {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    if !arguments.iter().any(|argument| argument == "--bench") {
        println!("nothing is measured without --bench, which `cargo bench` adds");
        return;
    }
    let mut sizes = arguments.iter().filter_map(|argument| argument.parse().ok());
    let workloads = sizes.next().unwrap_or(100_000);
    let services = sizes.next().unwrap_or(10_000);
    let policies = sizes.next().unwrap_or(0);
    let file =
        std::env::temp_dir().join(format!("underpass-bench-mesh-{}.yaml", std::process::id()));
    let size = {
        let text = mesh(workloads, services, policies);
        fs::write(&file, &text).expect("the temporary folder can be written");
        text.len()
    };
    println!(
        "{workloads} workloads, {services} services, {policies} policies: {:.1} MiB of YAML\n",
        mebibytes(size)
    );
    println!("| load | s | CPU, s | peak, MiB | held, MiB |\n|---|---|---|---|---|");
    let first = load("cold", &file);
    let second = load("again", &file);
    fs::remove_file(&file).expect("it can be removed");
    drop(first);
    look_up(&second, workloads, services);
    let began = Instant::now();
    drop(second);
    println!("to free it: {:.1} ms", began.elapsed().as_secs_f64() * 1e3);
}

fn load(name: &str, file: &std::path::Path) -> Mesh {
    // Makes the kernel forget the peak so far (proc_pid_clear_refs(5)).
    fs::write("/proc/self/clear_refs", "5").expect("our own peak can be reset");
    let before = status("VmRSS");
    let (began, used) = (Instant::now(), processor_seconds());
    let mesh = Mesh::from_file(file).expect("the mesh is right");
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

/// A document as a control plane would write it: each key that is commonly there.
fn mesh(workloads: u32, services: u32, policies: u32) -> String {
    let mut text = String::from("workloads:\n");
    for n in 0..workloads {
        let service = n % services.max(1);
        let namespace = service % 500;
        write!(
            text,
            "- uid: cluster1//Pod/ns-{namespace}/app-{service}-{n}\n  name: app-{service}-{n}\n  \
             namespace: ns-{namespace}\n  serviceAccount: sa-{service}\n  trustDomain: cluster.local\n  \
             workloadIps: [\"{}\"]\n  protocol: HBONE\n  node: node-{}\n  network: \"\"\n  clusterId: cluster1\n  \
             workloadName: app-{service}\n  workloadType: deployment\n  canonicalName: app-{service}\n  \
             canonicalRevision: v1\n  locality: {{region: r{}, zone: z{}, subzone: \"\"}}\n",
            address(10, n),
            n % 2000,
            n % 3,
            n % 9,
        )
        .expect("a string takes everything");
        if services > 0 {
            let host = hostname(service);
            writeln!(
                text,
                "  services:\n    ns-{namespace}/{host}:\n      80: 8080\n      443: 8443"
            )
            .expect("a string takes everything");
        }
    }
    text.push_str("services:\n");
    for n in 0..services {
        writeln!(
            text,
            "- name: svc-{n}\n  namespace: ns-{}\n  hostname: {}\n  vips: [/{}]\n  ports:\n    80: 8080\n    443: 8443\n  \
             subjectAltNames: [spiffe://cluster.local/ns/ns-{}/sa/sa-{n}]\n  canonical: true",
            n % 500,
            hostname(n),
            address(11, n),
            n % 500,
        )
        .expect("a string takes everything");
    }
    text.push_str("policies:\n");
    for n in 0..policies {
        writeln!(
            text,
            "- name: policy-{n}\n  namespace: ns-{}\n  scope: Namespace\n  action: Allow\n  dryRun: false\n  rules:\n  \
             - - - principals: [!Exact cluster.local/ns/ns-{}/sa/sa-{n}]\n",
            n % 500,
            n % 500,
        )
        .expect("a string takes everything");
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
