//! Measures paths between two pods, in one sitting: what `cargo bench -p underpass-benches` is made of.
//!
//! In reading order:
//!
//! * `options` is what may be asked, `paths` are the ways between two pods that are compared (`relay` and `ztunnel` are on some);
//! * `workload` puts one load on one path and says what it measured: `load` and `crowd` are the clients, `server` is the other end,
//!   `process` what the proxies used; `part` is what runs in a process of its own;
//! * `report` puts the rounds together: the table, the ratios, the `goals`, the JSON;
//! * `scaling` repeats a few loads at sizes that grow, and `plot` draws them.
//!
//! Not here: what is right or wrong (the tests crate). A bench that meets an error stops: its figures would be worth nothing.

#![expect(
    clippy::expect_used,
    reason = "a bench that meets an error must stop loudly: its figures would be worth nothing"
)]

mod crowd;
mod goals;
mod load;
mod options;
mod part;
mod paths;
mod plot;
mod process;
mod relay;
mod report;
mod scaling;
mod server;
mod workload;
mod ztunnel;

use underpass_interception::{enter_sandbox, raise_open_files};

pub use load::{Asking, Traffic};
pub use options::{Options, PathName, What};
pub use paths::Path;
pub use plot::Plot;
pub use report::Report;
pub use scaling::{Growing, Scaling};
pub use workload::{Figure, Workload};

/// The arguments after the program's name, if something is to be measured. `cargo bench` asks for that; `cargo test` runs benches too,
/// and then this says so.
#[expect(clippy::print_stdout, reason = "a bench's output is its result")]
#[must_use]
pub fn asked() -> Option<Vec<String>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let asked = arguments.iter().any(|argument| argument == "--bench");
    if !asked {
        println!("nothing is measured without --bench, which `cargo bench` adds");
    }
    asked.then_some(arguments)
}

/// What a bench with pods runs in, having built what it measures; to be called while there is one thread, which is when namespaces can
/// be entered.
///
/// # Panics
/// This user may not make namespaces, or the program cannot be built.
#[must_use]
pub fn runtime_with_pods() -> tokio::runtime::Runtime {
    // Outside of the sandbox, where cargo has its home; with the profile of this program.
    underpass_tests::binary();
    enter_sandbox().expect("this user may make namespaces");
    raise_open_files().expect("the limit of open files can be raised");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime starts")
}

/// `target/bench`, where results are written to; this program is `target/PROFILE/deps/NAME-…`.
///
/// # Panics
/// It is not, or the folder cannot be made.
#[must_use]
pub fn results() -> std::path::PathBuf {
    let program = std::env::current_exe().expect("this program has a path");
    let target = program.ancestors().nth(3).expect("cargo has put it into its target directory");
    let folder = target.join("bench");
    std::fs::create_dir_all(&folder).expect("the target directory can be written");
    folder
}
