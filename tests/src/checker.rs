//! Runs third-party checkers: promtool for metrics and rules, systemd-analyze for units.

use std::io::{ErrorKind, Write as _};
use std::process::{Command, Stdio};

use crate::or_fail::OrFail;
use crate::suite::report_skipped;
use crate::tools::{Printed, not_installed, printed};

/// Runs `program` with this standard input to its end. If it is not installed, prints that the
/// check is skipped, and returns `None`.
#[must_use]
pub fn checker(program: &str, arguments: &[&str], input: &str) -> Option<Printed> {
    let mut command = Command::new(program);
    command.args(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = match command.spawn() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let check = format!("{program} {}", arguments.join(" "));
            report_skipped(&not_installed(program), &check);
            return None;
        }
        spawned => spawned.or_fail(format!("run {program}")),
    };
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).or_fail(format!("write to {program}"));
    }
    let output = child.wait_with_output().or_fail(format!("read the output of {program}"));
    Some(printed(output))
}
