//! Measures every load on every path in turn, and prints ratios: `cargo bench -p underpass-benches
//! --bench path`.

#![expect(
    clippy::expect_used,
    reason = "a bench must stop at an error, as its figures would be wrong"
)]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this is a program for a terminal")]

use std::fs;

use underpass_benches::{Options, Path, Report, Workload, results, runtime_with_pods};

fn main() {
    let Some(options) = Options::from_arguments() else { return };
    let report = runtime_with_pods().block_on(measure(&options));
    println!("\n{}\n\n{}\n{}", report.machine(), report.table(), report.goals());
    save(&report);
}

/// Paths alternate within a round, so that other load of the machine affects all of them.
async fn measure(options: &Options) -> Report {
    let mut report = Report::new(options);
    let mut paths = Vec::new();
    for &name in &options.paths {
        paths.push((name, Path::set_up(name, options).await));
    }
    for workload in options.only.iter().flat_map(|what| Workload::of(*what)) {
        for round in 1..=options.rounds {
            for (name, path) in paths.iter().filter(|(name, _)| workload.measures(*name)) {
                eprintln!("{workload}, round {round} of {}, {name}", options.rounds);
                let figures = if workload.needs_fresh_proxies() {
                    workload.run(&Path::set_up(*name, options).await, options).await
                } else {
                    workload.run(path, options).await
                };
                report.add(workload, *name, &figures);
            }
        }
    }
    report
}

/// Writes `target/bench/path.json`.
fn save(report: &Report) {
    let file = results().join("path.json");
    fs::write(&file, format!("{:#}\n", report.json()))
        .expect("the target directory can be written");
    println!("every round: {}", file.display());
}
