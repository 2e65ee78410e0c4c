//! Runs the soak test for a few seconds. `cargo run -p underpass-tests --example soak` runs it
//! longer.

use std::process::ExitCode;
use std::time::Duration;

use underpass_tests::{Fault, SoakOptions, Suite, soak};

fn main() -> ExitCode {
    let mut suite = Suite::new();
    suite.test("streams lose no data under faults and release all resources", a_few_seconds);
    suite.run()
}

async fn a_few_seconds() {
    let options = SoakOptions {
        length: Duration::from_secs(5),
        seed: 6,
        connections: 30,
        faults: Fault::ALL.to_vec(),
        wait_for_conntrack: false,
    };
    let summary = soak(&options).await;
    assert!(summary.violations.is_empty(), "{summary}");
}
