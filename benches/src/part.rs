//! Parts of a bench in processes of their own: relays, so that their CPU can be told apart, and crowds of clients, for a process may
//! have too few open files for both ends of ten thousand connections. They are this very program, started with `--part`.
//!
//! A part says that it is ready, and ends with its standard input. What it does is in `relay` and `crowd`.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use underpass_interception::Namespace;

use crate::{crowd, relay};

const PART: &str = "--part";

/// A running part. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Part {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Part {
    /// Starts one in `pod`, and waits until it is ready.
    pub(crate) fn start(pod: &Namespace, arguments: &[String]) -> Self {
        let program = std::env::current_exe().expect("this program has a path");
        let mut command = Command::new(program);
        command.arg(PART).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let spawned = pod.run(|| command.spawn()).expect("the pod can be entered");
        let mut child = spawned.expect("the part starts");
        let stdin = child.stdin.take().expect("it is piped");
        let mut stdout = BufReader::new(child.stdout.take().expect("it is piped"));
        let mut ready = [0];
        stdout.read_exact(&mut ready).expect("the part gets ready");
        Self { child, stdin, stdout }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Tells it to go on to what comes next.
    pub(crate) fn next(&mut self) {
        self.stdin.write_all(b"\n").expect("the part still runs");
    }

    /// Waits for the line that it says next.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("the part writes text");
        assert!(line.ends_with('\n'), "the part met an error");
        line
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // One that has ended already needs no end.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Whether this process is a part of another bench; then it has done what it was for.
///
/// # Panics
/// It met an error, or was told what is no part.
#[must_use]
pub(crate) fn was_part() -> bool {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() != Some(PART) {
        return false;
    }
    let arguments: Vec<_> = arguments.collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    match *arguments {
        ["relay", how, hops] => relay::run(how, hops),
        ["storm", server, connections] => crowd::run_storm(server, connections),
        ["crowd", server, connections] => crowd::run_crowd(server, connections),
        _ => unreachable!("no part is started with {arguments:?}"),
    }
    true
}

/// What a part says when it is ready.
pub(crate) fn ready() {
    let mut stdout = io::stdout();
    stdout.write_all(b"!").and_then(|()| stdout.flush()).expect("the parent listens");
}

/// Waits to be told to go on: whether it is not the end.
pub(crate) fn told() -> bool {
    io::stdin().read_exact(&mut [0]).is_ok()
}
