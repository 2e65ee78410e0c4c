//! Runs the trials of a suite in a sandbox, each in a separate runtime.
//!
//! `UNDERPASS_SKIP_NAMESPACES=1` skips them where user namespaces are not permitted. Without it,
//! missing permission is a failure.

use std::fs;
use std::process::ExitCode;
use std::time::Duration;

use libtest_mimic::{Arguments, Failed, Trial};
use underpass_interception::enter_sandbox;

use crate::binary::binary;
use crate::or_fail::OrFail;
use crate::pods::Family;
use crate::tools::not_installed;

/// Timeout of a trial.
const TRIAL_TIMEOUT: Duration = Duration::from_secs(60);
/// The number of concurrent trials. More would slow each other down until waits time out.
const CONCURRENT_TRIALS: usize = 2;

/// The trials of a test binary. Must be created first in `main`, while there is a single thread.
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
    /// Parses the command line, builds the binary under test, and enters the sandbox.
    #[must_use]
    pub fn new() -> Self {
        let mut arguments = Arguments::from_args();
        arguments.test_threads.get_or_insert(CONCURRENT_TRIALS);
        let skipped = skipped();
        if !skipped && !arguments.list {
            // Build before entering the sandbox, which hides cargo's home.
            binary();
            enter_sandbox().or_fail("make the namespaces that these tests need (UNDERPASS_SKIP_NAMESPACES=1 skips them)");
        }
        Self { arguments, skipped, trials: Vec::new() }
    }

    /// Adds a trial; `name` is a sentence about the behaviour.
    pub fn test(&mut self, name: &str, body: impl AsyncFnOnce() + Send + 'static) {
        self.trials.push(Trial::test(name, move || run(body)));
    }

    /// Reports that a trial is not run, and why.
    pub fn skip(&self, name: &str, reason: &str) {
        report_skipped(reason, name);
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

    /// Adds a trial that needs users other than root. For an unprivileged caller, it is skipped
    /// with a message.
    pub fn test_with_users(&mut self, name: &str, body: impl AsyncFnOnce() + Send + 'static) {
        if self.skipped || self.arguments.list || has_users() {
            self.test(name, body);
        } else {
            report_skipped("it needs users other than root; run the suite as root", name);
        }
    }

    /// Adds a trial that needs `program`. If it is not installed, the trial is skipped with a
    /// message.
    pub fn test_with_program(
        &mut self,
        name: &str,
        program: &str,
        body: impl AsyncFnOnce() + Send + 'static,
    ) {
        if self.skipped || self.arguments.list || is_installed(program) {
            self.test(name, body);
        } else {
            report_skipped(&not_installed(program), name);
        }
    }

    /// Adds a trial that needs users other than root, for each address family.
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

    /// Runs the selected trials.
    #[must_use]
    pub fn run(self) -> ExitCode {
        let trials = if self.skipped { Vec::new() } else { self.trials };
        libtest_mimic::run(&self.arguments, trials).exit_code()
    }
}

/// Whether `UNDERPASS_SKIP_NAMESPACES=1` disables namespaces.
#[expect(clippy::disallowed_methods, reason = "a switch of the tests alone, not a setting")]
#[must_use]
pub fn skipped() -> bool {
    std::env::var_os("UNDERPASS_SKIP_NAMESPACES").is_some_and(|value| value == "1")
}

/// Whether users other than root exist. They do not in the sandbox of an unprivileged caller.
fn has_users() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").or_fail("read /proc/self/uid_map");
    let counts = map.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok());
    counts.sum::<u64>() > 1
}

#[expect(clippy::disallowed_methods, reason = "the search path of programs is no setting")]
fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

#[expect(clippy::print_stderr, reason = "a silently skipped trial would look like a passed one")]
pub(crate) fn report_skipped(reason: &str, name: &str) {
    eprintln!("SKIPPED ({reason}): {name}");
}

fn run(body: impl AsyncFnOnce()) -> Result<(), Failed> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ended = runtime.block_on(async { tokio::time::timeout(TRIAL_TIMEOUT, body()).await });
    ended.map_err(|_| format!("timed out after {TRIAL_TIMEOUT:?}").into())
}
