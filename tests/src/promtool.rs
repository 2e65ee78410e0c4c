//! Runs promtool, Prometheus' own checker of metrics and rules.

use std::io::{ErrorKind, Write as _};
use std::process::{Command, Stdio};

use crate::or_fail::OrFail;
use crate::tools::Printed;

/// Runs promtool with this standard input to its end. Reports loudly if it is not installed, and
/// returns `None`.
#[must_use]
pub fn promtool(arguments: &[&str], input: &str) -> Option<Printed> {
    let mut command = Command::new("promtool");
    command.args(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = match command.spawn() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            report_skipped(arguments);
            return None;
        }
        spawned => spawned.or_fail("run promtool"),
    };
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).or_fail("write to promtool");
    }
    let output = child.wait_with_output().or_fail("read promtool's output");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Some(Printed { status: output.status, out: text(&output.stdout), err: text(&output.stderr) })
}

#[expect(clippy::print_stderr, reason = "a silently skipped check would look like a passed one")]
fn report_skipped(arguments: &[&str]) {
    let arguments = arguments.join(" ");
    eprintln!(
        "SKIPPED (promtool is not installed: apt-get install prometheus): promtool {arguments}"
    );
}
