//! Measures paths between two pods in one session: the library of `cargo bench -p
//! underpass-benches`.
//!
//! In reading order:
//!
//! * `options` defines the command line; `paths` sets up the compared paths, some of them with
//!   `relay` or `ztunnel`;
//! * `workload` runs one load on one path and returns figures: `load` and `clients` are the
//!   clients, `server` is the server, and `process` reads the resources of proxies. `child_process`
//!   starts helper processes, whose roles `roles` runs;
//! * `report` combines the rounds: the table, the ratios, the `goals`, the JSON;
//! * `idle` reads the resources of an idle process;
//! * `scaling` repeats some loads at growing sizes, and `plot` draws the results.
//!
//! Benches check no behaviour; the tests crate does. A bench stops at an error.

#![expect(
    clippy::expect_used,
    reason = "a bench must stop at an error, as its figures would be wrong"
)]

mod child_process;
mod clients;
mod goals;
mod idle;
mod load;
mod options;
mod paths;
mod plot;
mod process;
mod relay;
mod report;
mod roles;
mod scaling;
mod server;
mod workload;
mod zds;
mod ztunnel;

use underpass_interception::{enter_sandbox, raise_open_files};

pub use idle::Idle;
pub use load::{RequestMode, Traffic};
pub use options::{Options, PathName, WorkloadGroup, ZtunnelMode, bench_arguments};
pub use paths::Path;
pub use plot::Plot;
pub use report::Report;
pub use scaling::{Dimension, Scaling};
pub use workload::{Figure, Workload};

/// Builds the binary under test, enters the sandbox, and returns a runtime. The process must have a
/// single thread.
///
/// # Panics
/// The sandbox cannot be entered, or the binary cannot be built.
#[must_use]
pub fn runtime_with_pods() -> tokio::runtime::Runtime {
    // Build before entering the sandbox, which hides cargo's home.
    underpass_tests::binary();
    enter_sandbox().expect("this user may make namespaces");
    raise_open_files().expect("the limit of open files can be raised");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime starts")
}

/// `target/bench`, the folder for results. This program is `target/PROFILE/deps/NAME-…`.
///
/// # Panics
/// The program is elsewhere, or the folder cannot be created.
#[must_use]
pub fn results() -> std::path::PathBuf {
    let program = std::env::current_exe().expect("this program has a path");
    let target = program.ancestors().nth(3).expect("cargo has put it into its target directory");
    let folder = target.join("bench");
    std::fs::create_dir_all(&folder).expect("the target directory can be written");
    folder
}
