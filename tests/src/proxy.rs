//! The real binary, running in a pod.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::OnceLock;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use underpass::spawn::{ChildProxy, SpawnError};

use crate::binary::binary;
use crate::or_fail::OrFail;
use crate::peers::within;
use crate::pods::Pod;
use crate::settings::Settings;

/// The timeout for readiness. Starting takes well under a second, but more on a busy machine.
const READY_TIMEOUT: Duration = Duration::from_secs(20);

/// A running proxy. Dropping it kills the process.
#[derive(Debug)]
pub struct Proxy {
    child: ChildProxy,
}

impl Pod {
    /// Starts a proxy inside the pod and waits for its readiness.
    pub async fn proxy(&self, settings: &Settings) -> Proxy {
        match self.try_proxy(settings).await {
            Ok(proxy) => proxy,
            Err(error) => panic!("the proxy of pod {} does not start: {error}", self.name()),
        }
    }

    /// Like [`Pod::proxy`], for a proxy that may fail to start.
    ///
    /// # Errors
    /// The exit status and the log.
    pub async fn try_proxy(&self, settings: &Settings) -> Result<Proxy, SpawnError> {
        self.try_program(binary(), settings).await
    }

    /// Starts the proxy by a shell script that ends in `exec "$UNDERPASS" "$@"`.
    ///
    /// # Errors
    /// As [`Pod::try_proxy`].
    pub async fn try_proxy_through(
        &self,
        script: &str,
        settings: &Settings,
    ) -> Result<Proxy, SpawnError> {
        let file = self.folder().join(format!("start-{}", self.name()));
        let text = format!("#!/bin/sh\nset -e\nUNDERPASS={:?}\n{script}\n", program_for_all());
        // Another process writes the file. A child that this process starts meanwhile would inherit
        // the open file, and the kernel would refuse to execute it (ETXTBSY).
        write_by_another(&file, &text);
        self.try_program(&file, settings).await
    }

    async fn try_program(&self, program: &Path, settings: &Settings) -> Result<Proxy, SpawnError> {
        let (command, arguments) = (settings.command(), settings.arguments(self));
        let namespace = self.namespace();
        let child = ChildProxy::start(program, namespace, command, &arguments, READY_TIMEOUT);
        let child = child.await?;
        Ok(Proxy { child })
    }
}

impl Proxy {
    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.pid().expect("the proxy has ended")
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid()).or_fail("use a process id");
        kill(Pid::from_raw(pid), signal).or_fail("send a signal");
    }

    /// The log so far.
    #[must_use]
    pub fn log(&self) -> String {
        self.child.log()
    }

    /// Waits for a log line that contains all of `parts`.
    pub async fn line(&mut self, parts: &[&str]) -> String {
        let is_wanted = |line: &&str| parts.iter().all(|part| line.contains(part));
        let find = |log: &str| log.lines().find(is_wanted).map(str::to_owned);
        let logged = self.child.logged(|log| find(log).is_some());
        let in_time = tokio::time::timeout(crate::peers::DEADLINE, logged).await;
        find(&self.child.log()).unwrap_or_else(|| {
            panic!("no log line with {parts:?} ({in_time:?}); the log:\n{}", self.child.log())
        })
    }

    /// The number of log lines so far that contain all of `parts`.
    #[must_use]
    pub fn count(&self, parts: &[&str]) -> usize {
        let is_wanted = |line: &&str| parts.iter().all(|part| line.contains(part));
        self.child.log().lines().filter(is_wanted).count()
    }

    /// Waits until more than `count` log lines contain all of `parts`.
    pub async fn more_than(&mut self, count: usize, parts: &[&str]) {
        let is_wanted = |line: &&str| parts.iter().all(|part| line.contains(part));
        let logged = self.child.logged(|log| log.lines().filter(is_wanted).count() > count);
        let in_time = tokio::time::timeout(crate::peers::DEADLINE, logged).await;
        assert!(
            self.count(parts) > count,
            "no more than {count} lines with {parts:?} ({in_time:?}); the log:\n{}",
            self.child.log()
        );
    }

    /// Waits for at least `count` access-log lines, and returns all of them.
    pub async fn access_lines(&mut self, count: usize) -> Vec<String> {
        let lines = |log: &str| -> Vec<String> {
            log.lines().filter(|line| is_access(line)).map(str::to_owned).collect()
        };
        let enough = self.child.logged(|log| lines(log).len() >= count);
        let in_time = tokio::time::timeout(crate::peers::DEADLINE, enough).await;
        let found = lines(&self.child.log());
        assert!(
            found.len() >= count,
            "fewer than {count} access-log lines ({in_time:?}):\n{}",
            self.child.log()
        );
        found
    }

    /// Closes the proxy's standard input, as the end of its parent would, which stops the proxy.
    /// Waits for its exit.
    pub async fn stop(&mut self) -> ExitStatus {
        within("the proxy stops", self.child.stop()).await.or_fail("wait for the proxy")
    }

    /// Waits for the exit without a timeout.
    pub async fn ended_by_itself(&mut self) -> ExitStatus {
        self.child.ended().await.or_fail("wait for the proxy")
    }

    /// Waits for the exit.
    pub async fn ended(&mut self) -> ExitStatus {
        within("the proxy ends", self.child.ended()).await.or_fail("wait for the proxy")
    }
}

/// The error of a command and its hint, each on a line, without the log.
pub fn error_of(log: &str) -> String {
    let is_error = |line: &&str| line.starts_with("error: ") || line.starts_with("hint: ");
    log.lines().filter(is_error).collect::<Vec<_>>().join("\n")
}

fn is_access(line: &str) -> bool {
    line.contains(" access: ") || line.contains("\"target\":\"access\"")
}

/// A copy of the binary that every user can execute. A home directory may be private.
fn program_for_all() -> &'static Path {
    static COPY: OnceLock<PathBuf> = OnceLock::new();
    COPY.get_or_init(|| {
        let place = PathBuf::from("/run/underpass-tests/underpass");
        fs::write(&place, "").or_fail("write to /run");
        let mount =
            std::process::Command::new("mount").arg("--bind").arg(binary()).arg(&place).status();
        assert!(mount.or_fail("run mount").success(), "mount failed");
        place
    })
}

fn write_by_another(file: &Path, text: &str) {
    let source: PathBuf = file.with_extension("text");
    fs::write(&source, text).or_fail("write a script");
    fs::set_permissions(&source, fs::Permissions::from_mode(0o755))
        .or_fail("make a script executable");
    let copied = std::process::Command::new("cp").arg(&source).arg(file).status();
    assert!(copied.or_fail("run cp").success(), "cp failed");
}
