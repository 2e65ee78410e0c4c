//! Ensures one proxy for each network namespace, and answers queries about it.
//!
//! The proxy that owns the rules of a network namespace listens on an abstract Unix socket.
//! Abstract names belong to the network namespace: a second proxy finds the first one also from
//! another container. The kernel frees the name when the process ends, so a killed proxy blocks
//! no start.
//!
//! Every process of the namespace may connect. The proxy answers only root and its own user, and
//! its client accepts answers only from these (SO_PEERCRED). A workload that takes the name
//! first is ignored.
//!
//! ```text
//! underpass/1 pid=4242 started=1764464400 installs=true self_test_failed=false readiness=…
//! then the settings as `underpass config show` prints them
//! ```
//!
//! Hot restart has another socket (`take_over/control_socket.rs`).

use std::borrow::Cow;
use std::fmt;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use thiserror::Error;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::time::timeout;
use underpass_config::{Hint, InterceptionSettings, Profile, Settings};
use underpass_interception::Peer;

use crate::rules::health::RulesHealth;
use crate::rules::owner::started;

const SOCKET_NAME: &str = "\0underpass";
const PROTOCOL: &str = "underpass/1";
/// Timeout for receiving a query or an answer, and for sending one.
const QUERY_TIMEOUT: Duration = Duration::from_secs(5);
const MAX_ANSWER_BYTES: u64 = 16 << 20;
/// The delay after a failed accept, for example without file descriptors.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_secs(1);

/// The listening socket that marks this process as the proxy of its network namespace.
#[derive(Debug, Clone)]
pub(crate) struct Instance {
    listener: Arc<UnixListener>,
}

/// A proxy that runs in this network namespace.
#[derive(Debug)]
pub(crate) struct Running {
    /// The process id in the pid namespace of that proxy.
    pub(crate) pid: u32,
    /// The start of its ownership of the rules, in seconds since 1970.
    pub(crate) started: u64,
    /// Whether it installs the rules itself.
    pub(crate) installs: bool,
    pub(crate) self_test_failed: bool,
    /// `ready`, or the reason why it is not ready.
    pub(crate) readiness: String,
    /// Its current settings, reloads included.
    pub(crate) settings: Settings,
}

/// Why the running proxy could not be queried.
#[derive(Debug, Error)]
pub(crate) enum InstanceError {
    #[error("another underpass runs in this network namespace ({0})")]
    Other(Box<Running>),
    #[error(
        "the proxy of this network namespace did not answer within {} s",
        QUERY_TIMEOUT.as_secs()
    )]
    Silent,
    #[error("the proxy of this network namespace sent an answer that this version cannot parse")]
    Unknown,
    #[error("cannot query the proxy of this network namespace")]
    Socket(#[source] io::Error),
}

impl Hint for InstanceError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        let fixed = match self {
            Self::Other(_) => "stop it, or start with the same profile and ports and `--take-over`",
            Self::Silent => "check whether it is stopped or overloaded",
            Self::Unknown => "use the command of the same version as the proxy",
            Self::Socket(_) => return None,
        };
        Some(fixed.into())
    }
}

impl fmt::Display for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Settings { proxy, interception, .. } = &self.settings;
        write!(
            f,
            "pid {}, profile {}, ports {}, {} and {}",
            self.pid,
            interception.profile,
            proxy.outbound_port,
            proxy.inbound_port,
            proxy.hbone_port
        )
    }
}

/// The sources of the state that an answer reports.
#[derive(Debug, Clone)]
pub(crate) struct Status {
    pub(crate) settings: Arc<Settings>,
    pub(crate) interception: watch::Receiver<InterceptionSettings>,
    pub(crate) rules: RulesHealth,
    pub(crate) readiness: ReadinessReport,
}

/// Returns the text of the readiness, perhaps that of a proxy process.
#[derive(Clone)]
pub(crate) struct ReadinessReport(Arc<dyn Fn() -> BoxFuture<'static, String> + Send + Sync>);

impl ReadinessReport {
    pub(crate) fn new(
        report: impl Fn() -> BoxFuture<'static, String> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(report))
    }
}

impl fmt::Debug for ReadinessReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ReadinessReport")
    }
}

impl Instance {
    /// Makes this process the proxy of its network namespace. `handed` is the socket of a process
    /// that is taken over.
    ///
    /// Returns `None` if this process installs no rules and another proxy runs, or if an untrusted
    /// process holds the name.
    pub(crate) async fn claim(
        settings: &Settings,
        handed: Option<OwnedFd>,
    ) -> Result<Option<Self>, InstanceError> {
        if settings.interception.profile == Profile::None {
            return Ok(None);
        }
        if let Some(socket) = handed {
            let listener = StdUnixListener::from(socket);
            listener.set_nonblocking(true).map_err(InstanceError::Socket)?;
            let listener = UnixListener::from_std(listener).map_err(InstanceError::Socket)?;
            return Ok(Some(Self { listener: Arc::new(listener) }));
        }
        if let Some(free) = Self::bind()? {
            return Ok(Some(free));
        }
        // If two processes start at once, only one can bind the name. The other one gets an answer
        // after the first has started.
        match running().await? {
            Some(running) if settings.interception.install => {
                Err(InstanceError::Other(Box::new(running)))
            }
            Some(running) => {
                tracing::info!("another underpass runs in this network namespace ({running})");
                Ok(None)
            }
            // The other process may have exited since the bind failed.
            None => Self::bind().inspect(|bound| {
                if bound.is_none() {
                    tracing::warn!(
                        "an untrusted process (neither root nor this user) listens on the abstract socket @underpass: a second \
                         proxy and `underpass rules` cannot find this proxy"
                    );
                }
            }),
        }
    }

    /// Binds the abstract name; `None` if another process holds it.
    fn bind() -> Result<Option<Self>, InstanceError> {
        match UnixListener::bind(SOCKET_NAME) {
            Ok(listener) => Ok(Some(Self { listener: Arc::new(listener) })),
            Err(error) if error.kind() == ErrorKind::AddrInUse => Ok(None),
            Err(error) => Err(InstanceError::Socket(error)),
        }
    }

    pub(crate) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Answers queries one at a time. Never returns.
    pub(crate) async fn serve(self, status: Status) {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let answer = answer(stream, &status, started());
                    if !matches!(timeout(QUERY_TIMEOUT, answer).await, Ok(Ok(()))) {
                        tracing::debug!("cannot answer a query for this proxy");
                    }
                }
                Err(_) => tokio::time::sleep(ACCEPT_RETRY_DELAY).await,
            }
        }
    }
}

async fn answer(mut stream: UnixStream, status: &Status, started: u64) -> io::Result<()> {
    if !is_trusted(&stream)? {
        return Ok(());
    }
    let mut settings = Settings::clone(&status.settings);
    settings.interception = status.interception.borrow().clone();
    let readiness = (status.readiness.0)().await;
    let text = format!(
        "{PROTOCOL} pid={} started={started} installs={} self_test_failed={} readiness={}\n{settings}",
        std::process::id(),
        settings.interception.install,
        status.rules.has_self_test_failed(),
        readiness.trim_end(),
    );
    stream.write_all(text.as_bytes()).await?;
    stream.shutdown().await
}

/// Queries the proxy of this network namespace; `None` if no trusted one runs.
pub(crate) async fn running() -> Result<Option<Running>, InstanceError> {
    let mut stream = match UnixStream::connect(SOCKET_NAME).await {
        Ok(stream) => stream,
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => return Ok(None),
        Err(error) => return Err(InstanceError::Socket(error)),
    };
    if !is_trusted(&stream).map_err(InstanceError::Socket)? {
        return Ok(None);
    }
    let mut text = String::new();
    let mut answer = (&mut stream).take(MAX_ANSWER_BYTES);
    match timeout(QUERY_TIMEOUT, answer.read_to_string(&mut text)).await {
        Err(_) => Err(InstanceError::Silent),
        Ok(Err(error)) if error.kind() != ErrorKind::InvalidData => {
            Err(InstanceError::Socket(error))
        }
        Ok(Err(_)) => Err(InstanceError::Unknown),
        // The proxy has exited, or does not trust this process's user.
        Ok(Ok(0)) => Ok(None),
        Ok(Ok(_)) => Running::parse(&text).map(Some).ok_or(InstanceError::Unknown),
    }
}

fn is_trusted(stream: &UnixStream) -> io::Result<bool> {
    Ok(Peer::of(stream)?.is_trusted())
}

impl Running {
    fn parse(text: &str) -> Option<Self> {
        let (head, settings) = text.split_once('\n')?;
        let (head, readiness) = head.strip_prefix(PROTOCOL)?.split_once(" readiness=")?;
        let value =
            |key: &str| head.split(' ').find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        Some(Self {
            pid: value("pid")?.parse().ok()?,
            started: value("started")?.parse().ok()?,
            installs: value("installs")?.parse().ok()?,
            self_test_failed: value("self_test_failed")?.parse().ok()?,
            readiness: readiness.to_owned(),
            settings: Settings::of_text("the settings of the running proxy", settings).ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use underpass_config::Sources;

    use super::*;

    fn settings(flags: &[&str]) -> Settings {
        let flags = flags.iter().map(|&flag| flag.to_owned()).collect();
        Sources { flags, ..Sources::default() }.load().unwrap()
    }

    #[tokio::test]
    async fn instance_reports_current_settings() {
        let settings = settings(&["interception.profile=sidecar", "proxy.outbound_port=16001"]);
        let changed = InterceptionSettings { drop_invalid: true, ..settings.interception.clone() };
        let interception = watch::Sender::new(changed.clone()).subscribe();
        let status = Status {
            settings: settings.clone().into(),
            interception,
            rules: RulesHealth::default(),
            readiness: ReadinessReport::new(|| {
                Box::pin(async { "not ready: starting\n".to_owned() })
            }),
        };
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        answer(ours, &status, 7).await.unwrap();
        let mut text = String::new();
        theirs.read_to_string(&mut text).await.unwrap();
        let running = Running::parse(&text).unwrap();
        assert_eq!(running.settings.interception, changed);
        assert_eq!(running.settings.proxy, settings.proxy);
        assert_eq!((running.pid, running.started), (std::process::id(), 7));
        assert_eq!(running.readiness, "not ready: starting");
        let shown = running.to_string();
        assert!(shown.contains("profile sidecar, ports 16001, 15006 and 15008"), "{shown}");
    }

    #[test]
    fn rejects_malformed_answers() {
        for text in [
            "",
            "underpass/1",
            "underpass/1 pid=1\n",
            "underpass/2 pid=1 started=1 installs=true self_test_failed=false readiness=ready\n",
            "underpass/1 pid=x started=1 installs=true self_test_failed=false readiness=ready\n",
            "underpass/1 pid=1 started=1 installs=true self_test_failed=false readiness=ready\nproxy: [",
        ] {
            assert!(Running::parse(text).is_none(), "{text}");
        }
    }
}
