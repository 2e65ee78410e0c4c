//! Measures paths between two pods, in one sitting: what `cargo bench -p underpass-benches` is made of.
//!
//! In reading order:
//!
//! * `options` is what may be asked, `paths` are the ways between two pods that are compared (`relay` is one of them);
//! * `workload` puts one load on one path and says what it measured: `load` is the client, `server` the other end,
//!   `process` what the proxies used;
//! * `report` puts the rounds together: the table, the ratios, the JSON.
//!
//! Not here: what is right or wrong (the tests crate). A bench that meets an error stops: its figures would be worth nothing.

#![expect(
    clippy::expect_used,
    reason = "a bench that meets an error must stop loudly: its figures would be worth nothing"
)]

mod load;
mod options;
mod paths;
mod process;
mod relay;
mod report;
mod server;
mod workload;

pub use options::{Options, PathName, What};
pub use paths::Path;
pub use relay::relay;
pub use report::Report;
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
