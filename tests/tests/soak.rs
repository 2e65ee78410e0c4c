//! A few seconds of the soak, which `cargo run -p underpass-tests --example soak` runs for as long
//! as one likes.

use std::process::ExitCode;
use std::time::Duration;

use underpass_tests::{Fault, SoakOptions, Suite, soak};

fn main() -> ExitCode {
    let mut suite = Suite::new();
    suite.test("streams keep their invariants under faults and leave no resources", a_few_seconds);
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
