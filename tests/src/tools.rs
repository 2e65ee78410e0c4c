//! Programs that are not ours, as judges: nft, ip, curl, openssl, tcpdump.

use std::io::ErrorKind;
use std::process::{ExitStatus, Stdio};

use tokio::process::Command;

use crate::OrFail;
use crate::peers::within;
use crate::pods::Pod;

/// Programs, and the Debian packages that they come in.
const PACKAGES: &[(&str, &str)] = &[
    ("nft", "nftables"),
    ("ip", "iproute2"),
    ("ss", "iproute2"),
    ("curl", "curl"),
    ("openssl", "openssl"),
    ("tcpdump", "tcpdump"),
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
    let output = output.or_fail(format!("run {program}"));
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Printed { status: output.status, out: text(output.stdout), err: text(output.stderr) }
}

impl Printed {
    /// Standard output of a program that must have succeeded.
    pub fn ok(self) -> String {
        assert!(self.status.success(), "{}: {}{}", self.status, self.out, self.err);
        self.out
    }
}

fn package_of(program: &str) -> &str {
    PACKAGES.iter().find(|(name, _)| *name == program).map_or(program, |(_, package)| package)
}
