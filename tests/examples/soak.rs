//! Runs the soak test: `cargo run --release -p underpass-tests --example soak -- [OPTIONS]`.
//!
//! Options: `--minutes 15`, `--seed N`, `--connections 200`, `--without kill,stop`. It prints a
//! table and one line of JSON, and exits with 1 after a violation. The same seed gives the same
//! streams and faults, but not the same timing.
#![expect(
    clippy::print_stdout,
    clippy::expect_used,
    clippy::panic,
    reason = "a program for a terminal that fails by panicking"
)]

use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use underpass_interception::{enter_sandbox, raise_open_files};
use underpass_tests::{Fault, SoakOptions, binary, soak};

fn main() -> ExitCode {
    let options = options();
    println!("seed {}", options.seed);
    // Builds the binary before entering the sandbox, which hides cargo's home.
    binary();
    enter_sandbox().expect("this user may make namespaces");
    raise_open_files().expect("the limit of open files can be raised");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let summary = runtime.expect("a runtime starts").block_on(soak(&options));
    println!("{summary}\n{}", summary.json());
    ExitCode::from(u8::from(!summary.violations.is_empty()))
}

fn options() -> SoakOptions {
    let mut arguments = std::env::args().skip(1);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let mut options = SoakOptions {
        length: Duration::from_secs(15 * 60),
        seed: now.expect("it is later than 1970").as_secs(),
        connections: 200,
        faults: Fault::ALL.to_vec(),
        wait_for_conntrack: true,
    };
    while let Some(option) = arguments.next() {
        let value = arguments.next().expect("every option has a value");
        let number = || value.parse::<u64>().expect("it is a number");
        match option.as_str() {
            "--minutes" => {
                let minutes: f64 = value.parse().expect("it is a number");
                options.length = Duration::from_secs_f64(minutes * 60.0);
            }
            "--seed" => options.seed = number(),
            "--connections" => {
                options.connections = usize::try_from(number()).expect("the number fits")
            }
            "--without" => {
                options.faults.retain(|fault| !value.split(',').any(|name| name == fault.name()))
            }
            _ => panic!("unknown option {option}"),
        }
    }
    options
}
