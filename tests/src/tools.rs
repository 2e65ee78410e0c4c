//! Runs programs in pods: third-party ones (nft, ip, curl, openssl, tcpdump) and `underpass`.

use std::io::ErrorKind;
use std::path::Path;
use std::process::{ExitStatus, Output, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use crate::binary::binary;
use crate::or_fail::OrFail;
use crate::peers::{until, within};
use crate::pods::Pod;
use crate::settings::Settings;

/// The programs and their Debian packages.
const PACKAGES: &[(&str, &str)] = &[
    ("nft", "nftables"),
    ("ip", "iproute2"),
    ("ss", "iproute2"),
    ("curl", "curl"),
    ("openssl", "openssl"),
    ("tcpdump", "tcpdump"),
    ("iptables-legacy-save", "iptables"),
    ("iptables-nft-save", "iptables"),
    ("prlimit", "util-linux"),
    ("setpriv", "util-linux"),
    ("nsenter", "util-linux"),
    ("unshare", "util-linux"),
    ("dig", "dnsutils"),
    ("dnsmasq", "dnsmasq-base"),
    ("promtool", "prometheus"),
    ("systemd-analyze", "systemd"),
];

/// The output and exit status of a program.
#[derive(Debug)]
pub struct Printed {
    /// The exit status.
    pub status: ExitStatus,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

/// Runs a program in a pod to its end. A missing program fails the trial.
pub async fn tool(pod: &Pod, program: &str, arguments: &[&str]) -> Printed {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let child = spawn(pod, &mut command, program);
    let output = within(&format!("{program} ends"), child.wait_with_output()).await;
    printed(output.or_fail(format!("run {program}")))
}

/// Starts a program in a pod. If it is missing, the panic names its package.
fn spawn(pod: &Pod, command: &mut Command, program: &str) -> Child {
    pod.spawn(command).unwrap_or_else(|error| match error.kind() {
        ErrorKind::NotFound => panic!("{}", not_installed(program)),
        _ => panic!("cannot run {program}: {error}"),
    })
}

impl Pod {
    /// Runs `underpass ARGUMENTS…` inside the pod to its end.
    pub async fn underpass(&self, arguments: &[&str]) -> Printed {
        tool(self, binary().to_str().expect("a path in UTF-8"), arguments).await
    }

    /// Runs `underpass rules COMMAND` inside the pod, with settings: `pod.rules("verify -o json",
    /// &settings)`.
    pub async fn rules(&self, command: &str, settings: &Settings) -> Printed {
        let settings = settings.arguments(self);
        let arguments = ["rules"].into_iter().chain(command.split_whitespace());
        let arguments: Vec<_> = arguments.chain(settings.iter().map(String::as_str)).collect();
        self.underpass(&arguments).await
    }

    /// All traces of rules: netfilter rules, ip rules, routes and loopback addresses.
    pub async fn traces(&self) -> Vec<String> {
        let mut traces = Vec::new();
        // The kernel detects the carrier of a new link with a delay, and then adds IPv6 routes
        // (net/core/link_watch.c).
        until("links are up", async || {
            traces = self.traces_now().await;
            !traces.iter().any(|line| line.contains(" linkdown"))
        })
        .await;
        traces
    }

    async fn traces_now(&self) -> Vec<String> {
        let rules = tool(self, "nft", &["--stateless", "list", "ruleset"]).await.ok();
        // The owner changes with the process.
        let rules = rules.lines().filter(|line| !line.contains("comment \"underpass "));
        let mut all: Vec<String> = rules.map(str::to_owned).collect();
        for family in ["-4", "-6"] {
            all.push(tool(self, "ip", &[family, "rule"]).await.ok());
            let routes = tool(self, "ip", &[family, "route", "show", "table", "all"]).await.ok();
            // The kernel adds link-local addresses after duplicate address detection.
            all.extend(routes.lines().filter(|route| !route.contains("fe80:")).map(str::to_owned));
            all.push(tool(self, "ip", &[family, "address", "show", "dev", "lo"]).await.ok());
        }
        all
    }

    /// Starts a program inside the pod in the background. Dropping it kills the program.
    #[must_use]
    pub fn background(&self, program: &Path, arguments: &[&str]) -> Background {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Background { child: spawn(self, &mut command, &program.to_string_lossy()) }
    }
}

/// A program in the background.
#[derive(Debug)]
pub struct Background {
    child: Child,
}

impl Background {
    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = self.child.id().expect("the process was not waited for");
        let pid = i32::try_from(pid).or_fail("use a process id");
        kill(Pid::from_raw(pid), signal).or_fail("send a signal");
    }

    /// Waits at most `limit` for the exit. Returns whether the program exited.
    pub async fn ends_within(&mut self, limit: Duration) -> bool {
        match tokio::time::timeout(limit, self.child.wait()).await {
            Ok(ended) => ended.map(|_| true).or_fail("wait for a program"),
            Err(_) => false,
        }
    }

    /// The lines of standard output.
    #[must_use]
    pub fn lines(mut self) -> OutputLines {
        let output = self.child.stdout.take().expect("standard output is a pipe");
        OutputLines { lines: BufReader::new(output).lines(), _program: self }
    }

    /// Waits for the exit. Returns status and output.
    pub async fn ended(self) -> Printed {
        let output = within("a program ends", self.child.wait_with_output()).await;
        printed(output.or_fail("wait for a program"))
    }
}

/// The lines that a program in the background prints. Dropping it kills the program.
#[derive(Debug)]
pub struct OutputLines {
    lines: Lines<BufReader<ChildStdout>>,
    _program: Background,
}

impl OutputLines {
    /// Waits for the next line. Cancel-safe.
    pub async fn next(&mut self) -> String {
        let line = within("a program prints a line", self.lines.next_line()).await;
        line.or_fail("read the output of a program").expect("the program has not ended")
    }
}

pub(crate) fn printed(output: Output) -> Printed {
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Printed { status: output.status, out: text(output.stdout), err: text(output.stderr) }
}

impl Printed {
    /// Returns the standard output of a program that must have succeeded.
    pub fn ok(self) -> String {
        assert!(self.status.success(), "{}: {}{}", self.status, self.out, self.err);
        self.out
    }

    /// Returns standard output and standard error of a program that must have exited with `code`.
    pub fn exited(self, code: i32) -> (String, String) {
        assert_eq!(self.status.code(), Some(code), "{}{}", self.out, self.err);
        (self.out, self.err)
    }
}

/// The message about a missing program. It names the package, which usually has the same name.
pub(crate) fn not_installed(program: &str) -> String {
    let package = PACKAGES.iter().find(|(name, _)| *name == program);
    let package = package.map_or(program, |(_, package)| package);
    format!("{program} is not installed: apt-get install {package}")
}
