//! Measures installing, verifying and repairing rules, and their cost per connection: `cargo bench
//! -p underpass-benches --bench rules`.
//!
//! Each round runs in an empty namespace. The rows are the profiles with nftables, then ambient
//! with 10,000 excluded networks of one prefix length, and of sixteen. Columns are median, minimum
//! and maximum of the rounds. Connections are refused, so that only the rules are measured and no
//! server.

#![expect(
    clippy::expect_used,
    reason = "a bench must stop at an error, as its figures would be wrong"
)]
#![expect(clippy::print_stdout, reason = "this is a program for a terminal")]

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use tokio::time::Instant;
use underpass_config::Sources;
use underpass_interception::{Interception, Namespace, NamespaceAccess, Ports, enter_sandbox};

const ROUNDS: usize = 100;
/// The pause after a round: the kernel destroys a namespace asynchronously, which would disturb the
/// next round.
const DESTRUCTION_DELAY: Duration = Duration::from_millis(100);
/// Connections per figure.
const CONNECTIONS: u32 = 1000;

fn main() {
    if underpass_benches::bench_arguments().is_none() {
        return;
    }
    // Only a single-threaded process can enter a user namespace.
    enter_sandbox().expect("this user may make namespaces");
    let networks: Vec<_> =
        (0..10_000).map(|n| format!("10.{}.{}.0/25", n / 250, n % 250)).collect();
    let excluding =
        |networks: &[String]| format!("interception.outbound.exclude_cidrs={}", networks.join(","));
    println!("| rules | install, ms | verify, ms | replace, ms | µs per refused connection |");
    println!("|---|---|---|---|---|");
    let none = "interception.profile=none";
    measure("none", &[none]);
    for profile in ["ambient", "sidecar", "osm"] {
        measure(profile, &[&format!("interception.profile={profile}")]);
    }
    for (name, networks) in [
        ("ambient, 10,000 CIDRs excluded", networks),
        ("ambient, 10,000 CIDRs of 16 lengths", (0..10_000).map(network_of_some_length).collect()),
    ] {
        measure(name, &["interception.profile=ambient", &excluding(&networks)]);
    }
}

/// A unique network with a length from 17 to 32.
fn network_of_some_length(number: u32) -> String {
    let (kind, index) = (number % 16, number / 16);
    let length = 17 + kind;
    let address = ((20 + 2 * kind) << 24) + (index << (32 - length));
    format!("{}/{length}", Ipv4Addr::from_bits(address))
}

fn measure(name: &str, flags: &[&str]) {
    let mut columns: [Vec<f64>; 4] = Default::default();
    for round in 0..ROUNDS {
        let namespace = Namespace::create_named(&format!("bench-{round}")).expect("a namespace");
        let figures = namespace.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async {
                let lo = Namespace::current().expect("the namespace");
                lo.set_loopback_up().await.expect("loopback is set up");
                measure_round(flags, round).await
            })
        });
        for (column, figure) in columns.iter_mut().zip(figures.expect("the namespace is entered")) {
            column.extend(figure);
        }
        namespace.delete().expect("the namespace is deleted");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        runtime.expect("a runtime").block_on(async { tokio::time::sleep(DESTRUCTION_DELAY).await });
    }
    let cells: Vec<_> = columns.iter_mut().map(|column| cell(column)).collect();
    println!("| {name} | {} |", cells.join(" | "));
}

/// Measures installation, verification, replacement and connections.
async fn measure_round(flags: &[&str], round: usize) -> [Option<f64>; 4] {
    let flags = flags.iter().map(|&flag| flag.to_owned()).collect();
    let sources = Sources { file: None, environment: Vec::new(), flags };
    let settings = sources.load().expect("the settings are right");
    let ports = Ports::of(&settings);
    let access = NamespaceAccess::current().expect("a thread");
    let prepared = Interception::prepare(&access, &settings.interception, ports).await;
    let prepared = prepared.expect("prepared");
    let mut figures = [None; 4];
    if let Some(interception) = prepared {
        let began = Instant::now();
        interception.install().await.expect("installed");
        let installed = Instant::now();
        assert_eq!(interception.verify().await.expect("compared"), None);
        let verified = Instant::now();
        interception.install().await.expect("replaced");
        let millis = |duration: Duration| Some(duration.as_secs_f64() * 1e3);
        figures[0] = millis(installed - began);
        figures[1] = millis(verified - installed);
        figures[2] = millis(verified.elapsed());
    }
    // A tenth of the rounds suffices for connections.
    if round.is_multiple_of(10) {
        figures[3] = Some(refused_connections().as_secs_f64() * 1e6 / f64::from(CONNECTIONS));
    }
    figures
}

/// Connects to a local address, through the rules up to the one that exempts such connections.
fn refused_connections() -> Duration {
    let closed_port = SocketAddr::from(([127, 0, 0, 2], 9));
    let began = Instant::now();
    for _ in 0..CONNECTIONS {
        TcpStream::connect(closed_port).expect_err("no program listens");
    }
    began.elapsed()
}

/// Median, minimum and maximum.
fn cell(figures: &mut [f64]) -> String {
    figures.sort_by(f64::total_cmp);
    match (figures.first(), figures.get(figures.len() / 2), figures.last()) {
        (Some(least), Some(median), Some(most)) => {
            format!("**{median:.2}** ({least:.2}–{most:.2})")
        }
        _ => "–".to_owned(),
    }
}
