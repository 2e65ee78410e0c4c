//! The rules, routes and sockets against a real kernel, in namespaces of their own and without
//! root.
//!
//! Not here: what needs no kernel (unit tests beside the code) and what needs the proxy (the tests
//! crate).
//!
//! `UNDERPASS_SKIP_NAMESPACES=1` passes over all of it where user namespaces are forbidden.

mod blackhole;
mod flows;
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

/// A test, and what it is called.
type Case = (&'static str, fn() -> Result<(), Failed>);

fn main() {
    let arguments = Arguments::from_args();
    if skipped() {
        libtest_mimic::run(&arguments, Vec::new()).exit();
    }
    // Before the sandbox: in it, no namespace is the host's.
    let outside = rules::prepare_here();
    if let Err(error) = enter_sandbox() {
        fail_loudly(&error);
    }
    let mut trials: Vec<_> = rules::CASES
        .iter()
        .chain(blackhole::CASES)
        .chain(flows::CASES)
        .chain(iptables::CASES)
        .chain(nftables::CASES)
        .chain(namespaces::CASES)
        .chain(local::CASES)
        .chain(walk::CASES)
        .map(|&(name, test)| Trial::test(name, test))
        .collect();
    trials.push(Trial::test("the host's own namespace, and no other, is refused", move || {
        rules::host_is_refused(&outside)
    }));
    libtest_mimic::run(&arguments, trials).exit();
}

#[expect(clippy::disallowed_methods, reason = "a switch of this test alone, not a setting")]
fn skipped() -> bool {
    std::env::var("UNDERPASS_SKIP_NAMESPACES").is_ok_and(|value| value == "1")
}

#[expect(clippy::print_stderr, clippy::exit, reason = "there is no test to report it")]
fn fail_loudly(error: &InterceptionError) -> ! {
    let source = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    eprintln!("the kernel tests need namespaces: {error}: {source}");
    eprintln!("UNDERPASS_SKIP_NAMESPACES=1 passes over them");
    std::process::exit(1);
}
