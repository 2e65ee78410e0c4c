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

use crate::OrFail;
use crate::binary::binary;
use crate::peers::within;
use crate::pods::Pod;
use crate::settings::Settings;

/// It is ready in well under a second; a machine that builds something else at the same time needs more.
const READY: Duration = Duration::from_secs(20);

/// A running proxy. Dropping it kills it.
#[derive(Debug)]
pub struct Proxy {
    child: ChildProxy,
}

impl Pod {
    /// Starts a proxy inside and waits until it is ready.
    pub async fn proxy(&self, settings: &Settings) -> Proxy {
        match self.try_proxy(settings).await {
            Ok(proxy) => proxy,
            Err(error) => panic!("the proxy of pod {} does not start: {error}", self.name()),
        }
    }

    /// The same for one that may not get ready.
    ///
    /// # Errors
    /// How it ended, and what it said.
    pub async fn try_proxy(&self, settings: &Settings) -> Result<Proxy, SpawnError> {
        self.try_program(binary(), settings).await
    }

    /// The same through a shell script, which runs it by `exec "$UNDERPASS" "$@"`.
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
        // Not by this process: a sibling that it starts meanwhile would inherit the open file, and the kernel refuses to run it.
        write_by_another(&file, &text);
        self.try_program(&file, settings).await
    }

    async fn try_program(&self, program: &Path, settings: &Settings) -> Result<Proxy, SpawnError> {
        let arguments = settings.arguments(self);
        let child = ChildProxy::start(program, self.namespace(), &arguments, READY).await?;
        Ok(Proxy { child })
    }
}

impl Proxy {
    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.pid().expect("the proxy has ended")
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid()).or_fail("use a process id");
        kill(Pid::from_raw(pid), signal).or_fail("send a signal");
    }

    /// All that it has written so far.
    #[must_use]
    pub fn log(&self) -> String {
        self.child.log()
    }

    /// Waits for a line that has all of `parts` in it.
    pub async fn line(&mut self, parts: &[&str]) -> String {
        let is_wanted = |line: &&str| parts.iter().all(|part| line.contains(part));
        let find = |log: &str| log.lines().find(is_wanted).map(str::to_owned);
        let logged = self.child.logged(|log| find(log).is_some());
        let in_time = tokio::time::timeout(crate::DEADLINE, logged).await;
        find(&self.child.log()).unwrap_or_else(|| {
            panic!("no log line with {parts:?} ({in_time:?}); it said:\n{}", self.child.log())
        })
    }

    /// How many lines so far have all of `parts` in them.
    #[must_use]
    pub fn count(&self, parts: &[&str]) -> usize {
        let is_wanted = |line: &&str| parts.iter().all(|part| line.contains(part));
        self.child.log().lines().filter(is_wanted).count()
    }

    /// Waits until more than `count` lines have all of `parts` in them.
    pub async fn more_than(&mut self, count: usize, parts: &[&str]) {
        let is_wanted = |line: &&str| parts.iter().all(|part| line.contains(part));
        let logged = self.child.logged(|log| log.lines().filter(is_wanted).count() > count);
        let in_time = tokio::time::timeout(crate::DEADLINE, logged).await;
        assert!(
            self.count(parts) > count,
            "no more than {count} lines with {parts:?} ({in_time:?}); it said:\n{}",
            self.child.log()
        );
    }

    /// Waits until it has written at least `count` access-log lines, and returns all that there are.
    pub async fn access_lines(&mut self, count: usize) -> Vec<String> {
        let lines = |log: &str| -> Vec<String> {
            log.lines().filter(|line| is_access(line)).map(str::to_owned).collect()
        };
        let enough = self.child.logged(|log| lines(log).len() >= count);
        let in_time = tokio::time::timeout(crate::DEADLINE, enough).await;
        let found = lines(&self.child.log());
        assert!(
            found.len() >= count,
            "fewer than {count} access-log lines ({in_time:?}):\n{}",
            self.child.log()
        );
        found
    }

    /// Tells it to stop as losing its parent would, and waits for its end.
    pub async fn stop(&mut self) -> ExitStatus {
        within("the proxy stops", self.child.stop()).await.or_fail("wait for the proxy")
    }

    /// Waits for its end, however long that takes.
    pub async fn ended_by_itself(&mut self) -> ExitStatus {
        self.child.ended().await.or_fail("wait for the proxy")
    }

    /// Waits for its end.
    pub async fn ended(&mut self) -> ExitStatus {
        within("the proxy ends", self.child.ended()).await.or_fail("wait for the proxy")
    }
}

fn is_access(line: &str) -> bool {
    line.contains(" access: ") || line.contains("\"target\":\"access\"")
}

/// The binary at a place that every user can reach, as a home need not be.
fn program_for_all() -> &'static Path {
    static PLACE: OnceLock<PathBuf> = OnceLock::new();
    PLACE.get_or_init(|| {
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
