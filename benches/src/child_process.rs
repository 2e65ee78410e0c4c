//! Child processes of a bench, which run this program with `--part`.
//!
//! Relays run in child processes so that their CPU time can be measured. Thousands of clients run
//! in child processes, because one process may have too few file descriptors for both ends of their
//! connections. A child reports its readiness on standard output, and ends when its standard input
//! is closed. `roles` runs its role.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use underpass_interception::Namespace;

/// The option that marks a child process. The role follows it.
pub(crate) const CHILD_OPTION: &str = "--part";

/// A running child process. Dropping it ends the process.
#[derive(Debug)]
pub(crate) struct ChildProcess {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl ChildProcess {
    /// Starts a child process in `pod`, and waits until it is ready.
    pub(crate) fn start(pod: &Namespace, arguments: &[String]) -> Self {
        let program = std::env::current_exe().expect("this program has a path");
        let mut command = Command::new(program);
        command.arg(CHILD_OPTION).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let spawned = pod.run(|| command.spawn()).expect("the pod can be entered");
        let mut child = spawned.expect("the child starts");
        let stdin = child.stdin.take().expect("it is piped");
        let mut stdout = BufReader::new(child.stdout.take().expect("it is piped"));
        let mut ready = [0];
        stdout.read_exact(&mut ready).expect("the child gets ready");
        Self { child, stdin, stdout }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Signals the child to continue.
    pub(crate) fn next(&mut self) {
        self.stdin.write_all(b"\n").expect("the child still runs");
    }

    /// Waits for the next line of output.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("the child writes text");
        assert!(line.ends_with('\n'), "the child met an error");
        line
    }
}

impl Drop for ChildProcess {
    fn drop(&mut self) {
        // The process may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Reports that this child process is ready.
pub(crate) fn ready() {
    let mut stdout = io::stdout();
    stdout.write_all(b"!").and_then(|()| stdout.flush()).expect("the parent listens");
}

/// Waits for the parent's signal to continue. Returns `false` if the parent has closed standard
/// input.
pub(crate) fn wait_for_parent() -> bool {
    io::stdin().read_exact(&mut [0]).is_ok()
}
