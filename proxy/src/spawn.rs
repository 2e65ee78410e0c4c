//! Starts another underpass process in a network namespace, waits until it is ready, and stops it.
//!
//! The demonstration, the test suites and the benchmarks use it to run the real binary.

use std::ffi::OsStr;
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::net::UnixDatagram;
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::watch;
use underpass_hbone::log_panic;
use underpass_interception::{InterceptionError, Namespace, sandbox_folder};

/// The maximum wait for the end of the log after the process has ended.
const LOG_TIMEOUT: Duration = Duration::from_secs(1);

/// The reason why a process did not become ready.
#[derive(Debug, Error)]
pub enum SpawnError {
    /// The process could not be started.
    #[error("cannot start {}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The namespace could not be entered.
    #[error("cannot enter the namespace")]
    Namespace(#[source] InterceptionError),
    /// The process exited before it was ready.
    #[error("the process exited with {status} before it was ready, with this log:\n{log}")]
    Ended {
        /// The exit status.
        status: ExitStatus,
        /// The log of the process.
        log: String,
    },
    /// The process was not ready in time.
    #[error("the process was not ready within {after:?}, with this log:\n{log}")]
    Late {
        /// The timeout.
        after: Duration,
        /// The log of the process.
        log: String,
    },
}

/// A running `underpass run` or `underpass node`. Dropping it kills the process.
#[derive(Debug)]
pub struct ChildProxy {
    child: Child,
    /// The child's standard input. Closing it stops the child. Kept apart, because waiting for the
    /// child would close it.
    alive: Option<ChildStdin>,
    log: watch::Receiver<String>,
}

impl ChildProxy {
    /// Starts `program COMMAND ARGUMENTS…` in `namespace` and waits until it is ready.
    ///
    /// # Errors
    /// See [`SpawnError`].
    pub async fn start(
        program: &Path,
        namespace: &Namespace,
        command: &str,
        arguments: &[impl AsRef<OsStr>],
        deadline: Duration,
    ) -> Result<Self, SpawnError> {
        let failed = |source| SpawnError::Start { program: program.to_owned(), source };
        let notify = NotifySocket::bind().map_err(failed)?;
        let mut process = Command::new(program);
        process.arg(command).args(arguments).arg("--until-eof").env("NOTIFY_SOCKET", &notify.path);
        process
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let runtime = tokio::runtime::Handle::current();
        let spawn = || {
            let _runtime = runtime.enter();
            process.spawn()
        };
        let mut child = namespace.run(spawn).map_err(SpawnError::Namespace)?.map_err(failed)?;
        let log = collect(child.stdout.take(), child.stderr.take());
        let alive = child.stdin.take();
        let mut proxy = Self { child, alive, log };
        let ended = tokio::select! {
            ready = notify.ready() => return ready.map(|()| proxy).map_err(failed),
            () = tokio::time::sleep(deadline) => None,
            status = proxy.child.wait() => Some(status.map_err(failed)?),
        };
        let log = proxy.rest_of_log().await;
        Err(match ended {
            Some(status) => SpawnError::Ended { status, log },
            None => SpawnError::Late { after: deadline, log },
        })
    }

    /// The process id while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// The log so far.
    pub fn log(&self) -> String {
        self.log.borrow().clone()
    }

    /// Waits until the log satisfies `enough`. Returns `false` if the process ended before.
    pub async fn logged(&mut self, enough: impl FnMut(&String) -> bool) -> bool {
        self.log.wait_for(enough).await.is_ok()
    }

    /// Closes the child's standard input, which stops the process, and waits for its end.
    ///
    /// # Errors
    /// The operating system does not return the exit status.
    pub async fn stop(&mut self) -> io::Result<ExitStatus> {
        drop(self.alive.take());
        self.ended().await
    }

    /// Waits for the end of the process and of its log.
    ///
    /// # Errors
    /// As [`ChildProxy::stop`].
    pub async fn ended(&mut self) -> io::Result<ExitStatus> {
        let status = self.child.wait().await?;
        // Another process that has inherited the output may keep it open.
        let rest = async { while self.log.changed().await.is_ok() {} };
        tokio::time::timeout(LOG_TIMEOUT, rest).await.ok();
        Ok(status)
    }

    /// The complete log, after the process has closed its output.
    async fn rest_of_log(&mut self) -> String {
        self.child.start_kill().ok();
        // The collecting tasks drop the sender when the pipes are closed.
        while self.log.changed().await.is_ok() {}
        self.log()
    }
}

/// Collects the lines of both streams.
fn collect(
    stdout: Option<impl AsyncRead + Unpin + Send + 'static>,
    stderr: Option<impl AsyncRead + Unpin + Send + 'static>,
) -> watch::Receiver<String> {
    let (sender, receiver) = watch::channel(String::new());
    if let Some(stdout) = stdout {
        tokio::spawn(log_panic("output of a child", follow(stdout, sender.clone())));
    }
    if let Some(stderr) = stderr {
        tokio::spawn(log_panic("output of a child", follow(stderr, sender)));
    }
    receiver
}

async fn follow(stream: impl AsyncRead + Unpin, log: watch::Sender<String>) {
    let mut lines = BufReader::new(stream).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        log.send_modify(|log| {
            log.push_str(&line);
            log.push('\n');
        });
    }
}

/// The socket that receives the readiness notification (`sd_notify(3)`).
struct NotifySocket {
    socket: UnixDatagram,
    path: PathBuf,
}

impl NotifySocket {
    fn bind() -> io::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name =
            format!("underpass-{}-{}.notify", std::process::id(), NEXT.fetch_add(1, Relaxed));
        // A minimal image may have no such folder; a sandbox always has one.
        let folder = std::env::temp_dir();
        let folder = if folder.is_dir() { folder } else { sandbox_folder().to_owned() };
        let path = folder.join(name);
        // A file with this name is a leftover of an earlier process with the same id.
        std::fs::remove_file(&path).ok();
        let bound = Self { socket: UnixDatagram::bind(&path)?, path };
        // The proxy has changed its user before it reports that it is ready.
        std::fs::set_permissions(&bound.path, Permissions::from_mode(0o666))?;
        Ok(bound)
    }

    async fn ready(&self) -> io::Result<()> {
        let mut message = [0; 256];
        loop {
            let length = self.socket.recv(&mut message).await?;
            if message.get(..length).is_some_and(|message| message.starts_with(b"READY=1")) {
                return Ok(());
            }
        }
    }
}

impl Drop for NotifySocket {
    fn drop(&mut self) {
        std::fs::remove_file(&self.path).ok();
    }
}
