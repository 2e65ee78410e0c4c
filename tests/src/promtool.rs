//! Runs promtool, Prometheus' own checker of metrics and rules.

use std::io::{ErrorKind, Write as _};
use std::process::{Command, Stdio};

use crate::or_fail::OrFail;
use crate::suite::report_skipped;
use crate::tools::{Printed, not_installed, printed};

/// Runs promtool with this standard input to its end. If it is not installed, prints that the check
/// is skipped, and returns `None`.
#[must_use]
pub fn promtool(arguments: &[&str], input: &str) -> Option<Printed> {
    let mut command = Command::new("promtool");
    command.args(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = match command.spawn() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let check = format!("promtool {}", arguments.join(" "));
            report_skipped(&not_installed("promtool"), &check);
            return None;
        }
        spawned => spawned.or_fail("run promtool"),
    };
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).or_fail("write to promtool");
    }
    Some(printed(child.wait_with_output().or_fail("read promtool's output")))
}
