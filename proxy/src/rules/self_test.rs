//! Tests the rules with real connections: before the proxy is ready, and after changes
//! (`retest.rs`).
//!
//! Test connections take the path of the workload's traffic. They must arrive at the proxy's
//! listeners with their original destination, and answers to imitated clients must return.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::time::timeout;
use underpass_config::Hint;
use underpass_interception::{
    InterceptionError, PolicyRoute, Probe, ReturnPathProbe, end_on_close, is_out_of_files,
};

use crate::traffic::accepted::Accepted;
use crate::traffic::listeners::Kind;

/// The failure of a self-test.
#[derive(Debug, Error)]
pub(crate) enum SelfTestError {
    #[error("the rules did not capture a test connection to {destination}")]
    NotCaught { destination: SocketAddr, source: std::io::Error },
    #[error(
        "a test connection to {destination} did not arrive at the proxy within {} s",
        deadline.as_secs()
    )]
    NotArrived { destination: SocketAddr, deadline: Duration },
    #[error(
        "inbound connections would hang: the answer to a test connection from {client} to {destination} did not return to \
         the proxy within {} s",
        deadline.as_secs()
    )]
    NotReturned { client: IpAddr, destination: SocketAddr, route: PolicyRoute, deadline: Duration },
    #[error(
        "inbound connections would fail: a test connection from the client address {client} to {destination} failed"
    )]
    NotImitated { client: IpAddr, destination: SocketAddr, source: std::io::Error },
    #[error("cannot open the sockets of the self-test")]
    Prepare(#[source] std::io::Error),
}

impl SelfTestError {
    /// The error of sockets that could not be opened in the namespace.
    pub(crate) fn prepare(error: InterceptionError) -> Self {
        Self::Prepare(error.into())
    }

    /// Whether the test could not run, and so says nothing about the rules.
    pub(crate) fn could_not_run(&self) -> bool {
        match self {
            Self::Prepare(_) => true,
            Self::NotCaught { source, .. } | Self::NotImitated { source, .. } => {
                is_out_of_files(source)
            }
            Self::NotArrived { .. } | Self::NotReturned { .. } => false,
        }
    }
}

impl Hint for SelfTestError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        const VERIFY: &str = "check with `underpass rules verify` whether the rules were removed, or whether another program's \
                              netfilter rules act first";
        let hint = match self {
            Self::NotCaught { destination, .. } => {
                format!("{VERIFY} (`underpass rules explain --from app --to {destination}`)")
            }
            Self::NotReturned { client, route, .. } => format!(
                "check with `underpass rules verify` and `ip {} rule` that the rule for mark {:#x} and table {} (local default \
                 dev lo) exists and precedes those of other programs",
                if client.is_ipv6() { "-6" } else { "-4" },
                route.mark.value,
                route.table
            ),
            Self::NotArrived { .. } | Self::NotImitated { .. } => VERIFY.to_owned(),
            Self::Prepare(_) => return None,
        };
        Some(hint.into())
    }
}

/// Detects test connections among those that arrive at the listeners of a pod.
pub(crate) trait Arrivals: fmt::Debug + Send + Sync {
    /// Treats connections to `destination` as those of the test, instead of connections to the
    /// previous destination. The receiver gets a message for each arrival.
    fn expect(&self, destination: SocketAddr) -> BoxFuture<'static, mpsc::UnboundedReceiver<()>>;

    /// Ends the test: all connections are served again.
    fn end(&self);
}

/// The running self-test. Workers pass its connections to it.
#[derive(Debug, Clone, Default)]
pub(crate) struct SelfTest {
    /// Checked for every accepted connection. Cheaper than the lock while no test runs.
    is_running: Arc<AtomicBool>,
    expected: Arc<Mutex<Option<ExpectedConnection>>>,
}

#[derive(Debug)]
struct ExpectedConnection {
    destination: SocketAddr,
    arrived: mpsc::UnboundedSender<()>,
}

impl SelfTest {
    /// Whether `accepted` belongs to the test. The worker must then not serve it.
    pub(crate) fn claims(&self, accepted: &Accepted) -> bool {
        if accepted.kind != Kind::Outbound || !self.is_running.load(Relaxed) {
            return false;
        }
        let expected = self.expected.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(ExpectedConnection { destination, arrived }) = expected.as_ref() else {
            return false;
        };
        let is_claimed = accepted.destination.address() == *destination;
        if is_claimed {
            // Close with FIN: the self-test reports a reset as a refused connection.
            end_on_close(&accepted.stream);
        }
        // Fails if the test has already timed out.
        is_claimed && arrived.send(()).is_ok()
    }

    fn set_expected(&self, expected: Option<ExpectedConnection>) {
        self.is_running.store(expected.is_some(), Relaxed);
        *self.expected.lock().unwrap_or_else(PoisonError::into_inner) = expected;
    }
}

impl Arrivals for SelfTest {
    fn expect(&self, destination: SocketAddr) -> BoxFuture<'static, mpsc::UnboundedReceiver<()>> {
        let (arrived, arrivals) = mpsc::unbounded_channel();
        self.set_expected(Some(ExpectedConnection { destination, arrived }));
        Box::pin(async { arrivals })
    }

    fn end(&self) {
        self.set_expected(None);
    }
}

/// Opens a connection for each probe, and waits for its arrival at a listener. Returns the tested
/// destinations.
pub(crate) async fn run_captured(
    arrivals: &dyn Arrivals,
    probes: Vec<Probe>,
    deadline: Duration,
) -> Result<Vec<SocketAddr>, SelfTestError> {
    let mut tested = Vec::new();
    let mut outcome = Ok(());
    for probe in probes {
        let destination = probe.destination;
        match test_one(arrivals, probe, deadline).await {
            Ok(true) => tested.push(destination),
            Ok(false) => {
                tracing::debug!(%destination, "no route for a test connection");
            }
            Err(error) => outcome = Err(error),
        }
    }
    arrivals.end();
    outcome.map(|()| tested)
}

/// Tests one destination. Returns `false` if there is no route to it.
async fn test_one(
    arrivals: &dyn Arrivals,
    probe: Probe,
    deadline: Duration,
) -> Result<bool, SelfTestError> {
    let destination = probe.destination;
    let test = async {
        let mut arrived = arrivals.expect(destination).await;
        let connected = probe.connect().await;
        if !connected.map_err(|source| SelfTestError::NotCaught { destination, source })? {
            return Ok(false);
        }
        arrived.recv().await;
        Ok(true)
    };
    let late = SelfTestError::NotArrived { destination, deadline };
    timeout(deadline, test).await.unwrap_or(Err(late))
}

/// Opens a connection for each probe, and waits for its answer. Returns the tested pairs of
/// addresses.
pub(crate) async fn run_return_path(
    connections: impl IntoIterator<Item = &ReturnPathProbe>,
    deadline: Duration,
) -> Result<Vec<(IpAddr, SocketAddr)>, SelfTestError> {
    let mut tested = Vec::new();
    for connection in connections {
        let &ReturnPathProbe { client, destination, route, .. } = connection;
        match timeout(deadline, connection.connect()).await {
            Ok(Ok(())) => tested.push((client, destination)),
            Ok(Err(source)) => {
                return Err(SelfTestError::NotImitated { client, destination, source });
            }
            Err(_) => {
                return Err(SelfTestError::NotReturned { client, destination, route, deadline });
            }
        }
    }
    Ok(tested)
}
