//! The main function of a suite: into the sandbox first, then one trial after the other, each in a runtime of its own.
//!
//! `UNDERPASS_SKIP_NAMESPACES=1` passes over all of it where user namespaces are forbidden; else that is a failure.

use std::fs;
use std::process::ExitCode;
use std::time::Duration;

use libtest_mimic::{Arguments, Failed, Trial};
use underpass_interception::enter_sandbox;

use crate::pods::Family;
use crate::{OrFail, binary};

/// No trial takes this long.
const TOO_LONG: Duration = Duration::from_secs(60);
/// More would only compete for the machine, and make waits look like failures.
const AT_ONCE: usize = 2;

/// The trials of one test binary. Make it first of all in `main`, while there is one thread.
#[derive(Debug)]
pub struct Suite {
    arguments: Arguments,
    skipped: bool,
    trials: Vec<Trial>,
}

impl Default for Suite {
    fn default() -> Self {
        Self::new()
    }
}

impl Suite {
    /// Reads the command line, builds the binary under test, and enters the sandbox.
    #[must_use]
    pub fn new() -> Self {
        let mut arguments = Arguments::from_args();
        arguments.test_threads.get_or_insert(AT_ONCE);
        let skipped = skipped();
        if !skipped && !arguments.list {
            // Outside of the sandbox, where cargo has its home.
            binary();
            enter_sandbox().or_fail("make the namespaces that these tests need (UNDERPASS_SKIP_NAMESPACES=1 passes over them)");
        }
        Self { arguments, skipped, trials: Vec::new() }
    }

    /// Adds a trial; `name` is a sentence of behaviour.
    pub fn test(&mut self, name: &str, body: impl AsyncFnOnce() + Send + 'static) {
        self.trials.push(Trial::test(name, move || run(body)));
    }

    /// Adds a trial for each address family.
    pub fn test_both(
        &mut self,
        name: &str,
        body: impl AsyncFnOnce(Family) + Clone + Send + 'static,
    ) {
        for family in Family::BOTH {
            let body = body.clone();
            self.test(&format!("{name} ({family})"), async move || body(family).await);
        }
    }

    /// Adds a trial that needs users besides root. Where the sandbox has none, because who runs the suite is not root, it is
    /// passed over, and that is said.
    pub fn test_with_users(&mut self, name: &str, body: impl AsyncFnOnce() + Send + 'static) {
        if self.skipped || self.arguments.list || has_users() {
            self.test(name, body);
        } else {
            pass_over(name);
        }
    }

    /// Adds such a trial for each address family.
    pub fn test_both_with_users(
        &mut self,
        name: &str,
        body: impl AsyncFnOnce(Family) + Clone + Send + 'static,
    ) {
        for family in Family::BOTH {
            let body = body.clone();
            self.test_with_users(&format!("{name} ({family})"), async move || body(family).await);
        }
    }

    /// Runs what the command line asks for.
    #[must_use]
    pub fn run(self) -> ExitCode {
        let trials = if self.skipped { Vec::new() } else { self.trials };
        libtest_mimic::run(&self.arguments, trials).exit_code()
    }
}

/// Whether the caller wants no namespaces: `UNDERPASS_SKIP_NAMESPACES=1`.
#[expect(clippy::disallowed_methods, reason = "a switch of the tests alone, not a setting")]
#[must_use]
pub fn skipped() -> bool {
    std::env::var_os("UNDERPASS_SKIP_NAMESPACES").is_some_and(|value| value == "1")
}

/// Whether this user namespace has more users than the sandbox of somebody who is not root, who is its only one.
fn has_users() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").or_fail("read /proc/self/uid_map");
    let counts = map.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok());
    counts.sum::<u64>() > 1
}

#[expect(
    clippy::print_stderr,
    reason = "a trial that is passed over in silence looks like one that passed"
)]
fn pass_over(name: &str) {
    eprintln!("SKIPPED, for it needs users besides root; run the suite as root: {name}");
}

fn run(body: impl AsyncFnOnce()) -> Result<(), Failed> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ended = runtime.block_on(async { tokio::time::timeout(TOO_LONG, body()).await });
    ended.map_err(|_| format!("it had not ended after {TOO_LONG:?}").into())
}
