//! Measures policy decisions in a mesh with 10,000 policies of 10 rules: `cargo bench -p
//! underpass-benches --bench policy`.
//!
//! Ten policies apply to each workload: five deny and five allow, one of them mesh-wide. A row is a
//! kind of connection and the rules that decide it. Columns are median, minimum and 90th percentile
//! of the rounds.

#![expect(
    clippy::expect_used,
    reason = "a bench must stop at an error, as its figures would be wrong"
)]
#![expect(clippy::print_stdout, reason = "this is a program for a terminal")]

use std::fmt::Write as _;
use std::hint::black_box;

use tokio::time::Instant;
use underpass_config::{Connection, Mesh, PolicyAction, PolicyLayers, SpiffeId};

const NAMESPACES: usize = 1111;
/// The policies per namespace. One more is mesh-wide.
const POLICIES: usize = 9;
const RULES: usize = 10;
const ROUNDS: usize = 1001;
/// The decisions per figure. They take about a millisecond, so that most rounds are not
/// interrupted.
const DECISIONS: u32 = 200;

fn main() {
    if underpass_benches::bench_arguments().is_none() {
        return;
    }
    let text = document();
    let start = Instant::now();
    let mesh = Mesh::from_text("bench", &text).expect("a mesh file without mistakes");
    println!(
        "{} policies, {} MB of text, read in {} ms\n",
        mesh.size().policies,
        text.len() / 1_000_000,
        start.elapsed().as_millis()
    );
    println!("| connection | µs per decision | least | 90 % |\n|---|---|---|---|");
    let unmatched = identity("spiffe://td/ns/none/sa/none");
    let allowed = identity("spiffe://td/ns/friends/sa/last");
    let denied = identity("spiffe://td/ns/foes/sa/first");
    let near = |_: usize| "ns-500".to_owned();
    let far = |round: usize| format!("ns-{}", round * 7 % NAMESPACES);
    measure("no rule matches: all are evaluated", &mesh, Some(&unmatched), near, decide);
    measure("the last rule allows", &mesh, Some(&allowed), near, decide);
    measure("the first rule denies", &mesh, Some(&denied), near, decide);
    measure("plaintext; no rule matches", &mesh, None, near, decide);
    measure("a different workload each time", &mesh, Some(&unmatched), far, decide);
    measure(
        "dry run without dry-run policies",
        &mesh,
        Some(&unmatched),
        near,
        |policies, connection| {
            let actions = [PolicyAction::Deny, PolicyAction::Allow];
            let dry_run = |action| policies.layers().flat_map(move |layer| layer.dry_run(action));
            let mut all = actions.into_iter().flat_map(dry_run);
            black_box(all.any(|policy| policy.matches(connection)));
        },
    );
    measure("the same set, compared with itself", &mesh, Some(&unmatched), near, |policies, _| {
        black_box(policies == black_box(policies));
    });
}

fn identity(text: &str) -> SpiffeId {
    text.parse().expect("an identity")
}

/// Decides like `authorization::decide`, which is private to the proxy.
fn decide(policies: PolicyLayers<'_>, connection: &Connection<'_>) {
    black_box(policies.layers().all(|layer| {
        let denied = layer.deciding(PolicyAction::Deny).any(|policy| policy.matches(connection));
        let mut allowing = layer.deciding(PolicyAction::Allow).peekable();
        !denied && (allowing.peek().is_none() || allowing.any(|policy| policy.matches(connection)))
    }));
}

fn measure(
    name: &str,
    mesh: &Mesh,
    identity: Option<&SpiffeId>,
    namespace: impl Fn(usize) -> String,
    evaluate: impl Fn(PolicyLayers<'_>, &Connection<'_>),
) {
    let connection = Connection {
        source: [192, 0, 2, 1].into(),
        destination: ([10, 0, 0, 9], 8080).into(),
        identity,
        aliases: &[],
    };
    let namespaces: Vec<_> = (0..NAMESPACES).map(namespace).collect();
    let mut namespaces = namespaces.iter().cycle();
    let mut figures: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            for (namespace, _) in namespaces.by_ref().zip(0..DECISIONS) {
                evaluate(mesh.policies(namespace, None), black_box(&connection));
            }
            start.elapsed().as_secs_f64() * 1e6 / f64::from(DECISIONS)
        })
        .collect();
    figures.sort_by(f64::total_cmp);
    let at = |index: usize| figures.get(index).copied().unwrap_or_default();
    println!("| {name} | {:.3} | {:.3} | {:.3} |", at(ROUNDS / 2), at(0), at(ROUNDS * 9 / 10));
}

/// The mesh file.
fn document() -> String {
    let mut text = "policies:\n".to_owned();
    policy(&mut text, 0, 0, "Global");
    for namespace in 0..NAMESPACES {
        for index in 1..=POLICIES {
            policy(&mut text, namespace, index, "Namespace");
        }
    }
    text
}

fn policy(text: &mut String, namespace: usize, index: usize, scope: &str) {
    let action = if index.is_multiple_of(2) { "Deny" } else { "Allow" };
    writeln!(
        text,
        "- name: p-{index}\n  namespace: ns-{namespace}\n  scope: {scope}\n  action: {action}\n  dryRun: false\n  rules:"
    )
    .expect("memory");
    for number in 0..RULES {
        let seed = (namespace * 10 + index) * 10 + number;
        // Every rule includes the connection's port, so the conditions on the source decide.
        let port = "[{destinationPorts: [80, 443, 8080]}]";
        let from = match number {
            _ if index == 0 && number == 0 => "principals: [!Exact td/ns/foes/sa/first]".to_owned(),
            _ if index == POLICIES && number == RULES - 1 => {
                "principals: [!Exact td/ns/friends/sa/last]".to_owned()
            }
            n if n % 5 == 0 => {
                format!("principals: [!Exact td/ns/a-{seed}/sa/web, !Exact td/ns/b-{seed}/sa/db]")
            }
            n if n % 5 == 1 => {
                format!("namespaces: [!Exact c-{seed}], notPrincipals: [!Suffix /sa/x-{seed}]")
            }
            n if n % 5 == 2 => format!(
                "sourceIps: [10.{}.0.0/16, 172.16.{}.0/24, 'fd00::/8']",
                seed % 256,
                seed % 255
            ),
            n if n % 5 == 3 => format!("principals: [!Prefix td/ns/d-{seed}/]"),
            _ => format!("serviceAccounts: [{{namespace: e-{seed}, serviceAccount: web}}]"),
        };
        writeln!(text, "  - [[{{{from}}}], {port}]").expect("memory");
    }
}
