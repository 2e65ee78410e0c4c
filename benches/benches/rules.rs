//! `cargo bench -p underpass-benches --bench rules`: what installing, comparing and repairing the rules takes, and what they cost a
//! connection, each in a namespace with nothing else in it.
//!
//! Rows: the profiles by netlink, then ambient with 10,000 excluded networks of one length, and of sixteen. Columns: the median, the
//! least and the most of the rounds. A connection is refused (nobody listens), so that it is the rules that are measured and no server.

#![expect(
    clippy::expect_used,
    reason = "a bench that meets an error must stop loudly: its figures would be worth nothing"
)]
#![expect(clippy::print_stdout, reason = "this is a program for a terminal")]

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use tokio::time::Instant;
use underpass_config::Sources;
use underpass_interception::{Interception, Namespace, NamespaceAccess, Ports, enter_sandbox};

const ROUNDS: usize = 100;
/// The kernel takes a namespace apart behind our back, which would be measured with the next one's installation.
const DESTRUCTION: Duration = Duration::from_millis(100);
/// Connections in a row that are one figure.
const CONNECTIONS: u32 = 1000;

fn main() {
    if underpass_benches::asked().is_none() {
        return;
    }
    // Namespaces can only be entered while there is one thread.
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

/// A network that no other number has, of a length from 17 to 32.
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
                one(flags, round).await
            })
        });
        for (column, figure) in columns.iter_mut().zip(figures.expect("the namespace is entered")) {
            column.extend(figure);
        }
        namespace.delete().expect("the namespace is deleted");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        runtime.expect("a runtime").block_on(async { tokio::time::sleep(DESTRUCTION).await });
    }
    let cells: Vec<_> = columns.iter_mut().map(|column| cell(column)).collect();
    println!("| {name} | {} |", cells.join(" | "));
}

/// Installation, comparison, replacement, and connections.
async fn one(flags: &[&str], round: usize) -> [Option<f64>; 4] {
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
    // A tenth of the rounds is enough of these.
    if round.is_multiple_of(10) {
        figures[3] = Some(refused_connections().as_secs_f64() * 1e6 / f64::from(CONNECTIONS));
    }
    figures
}

/// To an address of the namespace, so that none leaves it: through the rules up to the one that spares such connections.
fn refused_connections() -> Duration {
    let nobody = SocketAddr::from(([127, 0, 0, 2], 9));
    let began = Instant::now();
    for _ in 0..CONNECTIONS {
        TcpStream::connect(nobody).expect_err("nobody listens");
    }
    began.elapsed()
}

/// The median, the least and the most.
fn cell(figures: &mut [f64]) -> String {
    figures.sort_by(f64::total_cmp);
    match (figures.first(), figures.get(figures.len() / 2), figures.last()) {
        (Some(least), Some(median), Some(most)) => {
            format!("**{median:.2}** ({least:.2}–{most:.2})")
        }
        _ => "–".to_owned(),
    }
}
