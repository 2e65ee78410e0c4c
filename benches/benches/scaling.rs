//! `cargo bench -p underpass-benches --bench scaling [-- --paths hbone --rounds 1 --plot $PWD/docs]`: what one more costs when there are many.
//!
//! * **connections**: 10 to 10,000 that are open (5,000 in plain: two files each in a proxy): CPU of both proxies for each request, ten of
//!   which are under way at a time on any of the connections; for each new connection, and for bulk, beside them; memory for each.
//! * **streams**: 1 to 64 with bulk.
//! * **workloads**: 10 to 100,000 more in the mesh: time until a proxy is ready, its memory, CPU for each new connection and request.
//!
//! Each measurement has a path of its own. Figures are medians of the rounds. It writes a plot of each as `scaling-….svg`, to
//! `target/bench` or where `--plot` says.

#![expect(
    clippy::expect_used,
    reason = "a bench that meets an error must stop loudly: its figures would be worth nothing"
)]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this is a program for a terminal")]

use std::fs;

use underpass_benches::{Growing, Options, PathName, Scaling, results, runtime_with_pods};

fn main() {
    let Some(options) = Options::asked() else { return };
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
    // Those whose cost is asked for; of direct and relays there is nothing to tell.
    let is_meant = |path: &PathName| matches!(path, PathName::Plain | PathName::Hbone);
    let paths: Vec<_> = options.paths.iter().copied().filter(is_meant).collect();
    for round in 1..=options.rounds {
        for what in Growing::ALL {
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
