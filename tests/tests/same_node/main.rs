//! `proxy.same_node`: connects two pods of one process with and without a tunnel, and compares
//! decisions, records, metrics, and terminations after a change.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

mod cases;
mod changes;
mod scene;
mod streams;

use std::process::ExitCode;

use underpass_tests::Suite;

fn main() -> ExitCode {
    let mut suite = Suite::new();
    cases::add(&mut suite);
    changes::add(&mut suite);
    streams::add(&mut suite);
    suite.run()
}
