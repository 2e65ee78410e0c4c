//! Programs in pods: those that are not ours, as judges (nft, ip, curl, openssl, tcpdump), and commands of ours.

use std::io::ErrorKind;
use std::path::Path;
use std::process::{ExitStatus, Output, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};

use crate::OrFail;
use crate::binary::binary;
use crate::peers::{until, within};
use crate::pods::Pod;
use crate::settings::Settings;

/// Programs, and the Debian packages that they come in.
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
];

/// What a program printed and how it ended.
#[derive(Debug)]
pub struct Printed {
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

/// Runs a program in a pod until it ends. One that is not installed fails the trial.
pub async fn tool(pod: &Pod, program: &str, arguments: &[&str]) -> Printed {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let child = pod.spawn(&mut command).unwrap_or_else(|error| match error.kind() {
        ErrorKind::NotFound => {
            panic!("{program} is not installed: apt-get install {}", package_of(program))
        }
        _ => panic!("cannot run {program}: {error}"),
    });
    let output = within(&format!("{program} ends"), child.wait_with_output()).await;
    printed(output.or_fail(format!("run {program}")))
}

impl Pod {
    /// Runs `underpass ARGUMENTS…` inside until it ends.
    pub async fn underpass(&self, arguments: &[&str]) -> Printed {
        tool(self, binary().to_str().expect("a path in UTF-8"), arguments).await
    }

    /// Runs `underpass rules COMMAND` inside, with settings: `pod.rules("verify -o json", &settings)`.
    pub async fn rules(&self, command: &str, settings: &Settings) -> Printed {
        let settings = settings.arguments(self);
        let arguments = ["rules"].into_iter().chain(command.split_whitespace());
        let arguments: Vec<_> = arguments.chain(settings.iter().map(String::as_str)).collect();
        self.underpass(&arguments).await
    }

    /// All that rules consist of: netfilter's, policy routing's, its tables' and loopback's addresses.
    pub async fn traces(&self) -> Vec<String> {
        let mut traces = Vec::new();
        // The kernel reports a new wire's carrier a moment later, and adds IPv6 routes then
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
        // Whose they are changes with the process.
        let rules = rules.lines().filter(|line| !line.contains("comment \"underpass "));
        let mut all: Vec<String> = rules.map(str::to_owned).collect();
        for family in ["-4", "-6"] {
            all.push(tool(self, "ip", &[family, "rule"]).await.ok());
            let routes = tool(self, "ip", &[family, "route", "show", "table", "all"]).await.ok();
            // Link-local addresses come by themselves, when nobody has objected to them.
            all.extend(routes.lines().filter(|route| !route.contains("fe80:")).map(str::to_owned));
            all.push(tool(self, "ip", &[family, "address", "show", "dev", "lo"]).await.ok());
        }
        all
    }

    /// Starts a program inside that is to run beside what follows. Dropping it kills it.
    #[must_use]
    pub fn background(&self, program: &Path, arguments: &[&str]) -> Background {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = self.spawn(&mut command).or_fail(format!("run {}", program.display()));
        Background { child }
    }
}

/// A program that runs in a pod.
#[derive(Debug)]
pub struct Background {
    child: Child,
}

impl Background {
    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = self.child.id().expect("it has not been waited for");
        let pid = i32::try_from(pid).or_fail("use a process id");
        kill(Pid::from_raw(pid), signal).or_fail("send a signal");
    }

    /// Waits for its end, but not longer than `patience`: whether it ended.
    pub async fn ends_within(&mut self, patience: Duration) -> bool {
        match tokio::time::timeout(patience, self.child.wait()).await {
            Ok(ended) => ended.map(|_| true).or_fail("wait for a program"),
            Err(_) => false,
        }
    }

    /// Waits for its end: how it ended, and all that it printed.
    pub async fn ended(self) -> Printed {
        let output = within("a program ends", self.child.wait_with_output()).await;
        printed(output.or_fail("wait for a program"))
    }
}

fn printed(output: Output) -> Printed {
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Printed { status: output.status, out: text(output.stdout), err: text(output.stderr) }
}

impl Printed {
    /// Standard output of a program that must have succeeded.
    pub fn ok(self) -> String {
        assert!(self.status.success(), "{}: {}{}", self.status, self.out, self.err);
        self.out
    }

    /// Standard output and standard error of a program that must have ended with `code`.
    pub fn exited(self, code: i32) -> (String, String) {
        assert_eq!(self.status.code(), Some(code), "{}{}", self.out, self.err);
        (self.out, self.err)
    }
}

fn package_of(program: &str) -> &str {
    PACKAGES.iter().find(|(name, _)| *name == program).map_or(program, |(_, package)| package)
}
