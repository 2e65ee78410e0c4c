//! Kernel tests of rules, routes and sockets, in private namespaces and without root.
//!
//! Unit tests need no kernel, and the crate `tests` needs the proxy. `UNDERPASS_SKIP_NAMESPACES=1`
//! skips these tests where user namespaces are not permitted.

mod blackhole;
mod flows;
mod host_rules;
mod iptables;
mod local;
mod namespaces;
mod nftables;
mod plans;
mod pod;
mod rules;
mod walk;

use libtest_mimic::{Arguments, Failed, Trial};
use underpass_interception::{InterceptionError, enter_sandbox};

/// The name of a test and its function.
type Case = (&'static str, fn() -> Result<(), Failed>);

fn main() {
    let arguments = Arguments::from_args();
    if skipped() {
        libtest_mimic::run(&arguments, Vec::new()).exit();
    }
    // Prepare before entering the sandbox, in which no namespace is the host's.
    let outside = rules::prepare_here();
    if let Err(error) = enter_sandbox() {
        report_and_exit(&error);
    }
    let mut trials: Vec<_> = rules::CASES
        .iter()
        .chain(blackhole::CASES)
        .chain(flows::CASES)
        .chain(host_rules::CASES)
        .chain(iptables::CASES)
        .chain(nftables::CASES)
        .chain(namespaces::CASES)
        .chain(local::CASES)
        .chain(walk::CASES)
        .map(|&(name, test)| Trial::test(name, test))
        .collect();
    trials.push(Trial::test("only the host's own namespace is rejected", move || {
        rules::host_is_refused(&outside)
    }));
    libtest_mimic::run(&arguments, trials).exit();
}

#[expect(clippy::disallowed_methods, reason = "a switch of this test alone, not a setting")]
fn skipped() -> bool {
    std::env::var("UNDERPASS_SKIP_NAMESPACES").is_ok_and(|value| value == "1")
}

#[expect(clippy::print_stderr, clippy::exit, reason = "there is no test to report it")]
fn report_and_exit(error: &InterceptionError) -> ! {
    let source = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    eprintln!("the kernel tests need namespaces: {error}: {source}");
    eprintln!("UNDERPASS_SKIP_NAMESPACES=1 skips them");
    std::process::exit(1);
}
