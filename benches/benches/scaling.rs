//! Measures the cost of one more connection, stream or workload when there are many: `cargo bench
//! -p underpass-benches --bench scaling [-- --paths hbone --rounds 1 --plot $PWD/docs]`.
//!
//! * **connections**: 10 to 10,000 open connections (5,000 in plaintext, with two descriptors each
//!   in a proxy). The figures are the memory per connection, and the CPU time of both proxies: per
//!   request with ten requests in flight, per new connection, and for concurrent bulk.
//! * **streams**: 1 to 64 streams with bulk.
//! * **workloads**: 10 to 100,000 additional workloads in the mesh. The figures are the time until
//!   readiness, memory, and CPU time per new connection and request.
//!
//! Each measurement uses a new path. Figures are medians of the rounds. Plots are written as
//! `scaling-….svg` to `target/bench` or to the folder given by `--plot`.

#![expect(
    clippy::expect_used,
    reason = "a bench must stop at an error, as its figures would be wrong"
)]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this is a program for a terminal")]

use std::fs;

use underpass_benches::{Dimension, Options, PathName, Scaling, results, runtime_with_pods};

fn main() {
    let Some(options) = Options::from_arguments() else { return };
    let scaling = runtime_with_pods().block_on(measure(&options));
    println!("\n{}", scaling.tables());
    let folder = options.plot.unwrap_or_else(results);
    for (name, plot) in scaling.plots() {
        let file = folder.join(name);
        fs::write(&file, plot.svg()).expect("the folder can be written");
        println!("{}", file.display());
    }
}

async fn measure(options: &Options) -> Scaling {
    let mut scaling = Scaling::default();
    // Only paths with the proxy under test: the cost of direct connections and relays does not
    // grow.
    let is_meant = |path: &PathName| matches!(path, PathName::Plain | PathName::Hbone);
    let paths: Vec<_> = options.paths.iter().copied().filter(is_meant).collect();
    for round in 1..=options.rounds {
        for what in Dimension::ALL {
            for &path in &paths {
                for &size in what.sizes(path) {
                    eprintln!(
                        "round {round} of {}: {size} {}, {path}",
                        options.rounds,
                        what.name()
                    );
                    scaling.measure(what, path, size, options).await;
                }
            }
        }
    }
    scaling
}
