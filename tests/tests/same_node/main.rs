//! Tests of `proxy.same_node`: two pods of one process are connected with and without a tunnel, and
//! decisions, records, metrics and terminations are compared.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

mod cases;
mod changes;
mod scene;
mod streams;

use std::process::ExitCode;

use underpass_tests::Suite;

fn main() -> ExitCode {
    let mut suite = Suite::new();
    cases::add_tests(&mut suite);
    changes::add_tests(&mut suite);
    streams::add_tests(&mut suite);
    suite.run()
}
