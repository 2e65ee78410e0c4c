//! Tests the rules with real connections, before `ready` and after changes (`retest.rs`).
//!
//! Test connections take the path of the workload's traffic. They must arrive at the proxy's
//! listeners with their original destination, and answers to imitated clients must return.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use thiserror::Error;
use tokio::sync::mpsc;
use tokio::time::timeout;
use underpass_interception::{
    InterceptionError, PolicyRoute, Probe, ReturnPathProbe, end_on_close, is_out_of_files,
};

use crate::traffic::accepted::Accepted;
use crate::traffic::listeners::Kind;

/// Why the test failed.
#[derive(Debug, Error)]
pub(crate) enum SelfTestError {
    #[error(
        "the rules do not work: a test connection to {destination} could not be made, so it was not caught; does \
         another program's netfilter rule come before ours, or were ours removed? `underpass rules verify` and \
         `underpass rules explain --from app --to {destination}` tell"
    )]
    NotCaught { destination: SocketAddr, source: std::io::Error },
    #[error(
        "the rules do not work: a test connection to {destination} did not come back within {} s; does another \
         program's netfilter rule come before ours, or were ours removed? `underpass rules verify` tells",
        deadline.as_secs()
    )]
    NotArrived { destination: SocketAddr, deadline: Duration },
    #[error(
        "inbound connections would hang: what the workload answers to a client leaves for the network instead of coming \
         back to the proxy, as a test connection from {client} to {destination} did for {} s. `ip {} rule` must lead what \
         is marked {:#x} to table {} (local default dev lo) before any other rule does; is that one missing, or another \
         program's first? `underpass rules verify` tells",
        deadline.as_secs(), if client.is_ipv6() { "-6" } else { "-4" }, route.mark.value, route.table
    )]
    NotReturned { client: IpAddr, destination: SocketAddr, route: PolicyRoute, deadline: Duration },
    #[error(
        "inbound connections would fail: a test connection to the workload from a client's address, {client}, to \
         {destination} could not be made; does another program's netfilter rule refuse or rewrite it? \
         `underpass rules verify` tells"
    )]
    NotImitated { client: IpAddr, destination: SocketAddr, source: std::io::Error },
    #[error("cannot open the sockets of the self-test")]
    Prepare(#[source] std::io::Error),
}

impl SelfTestError {
    /// The sockets could not be opened in the namespace.
    pub(crate) fn prepare(error: InterceptionError) -> Self {
        Self::Prepare(error.into())
    }

    /// Whether the test could not run, so that nothing is known about the rules.
    pub(crate) fn is_ours(&self) -> bool {
        match self {
            Self::Prepare(_) => true,
            Self::NotCaught { source, .. } | Self::NotImitated { source, .. } => {
                is_out_of_files(source)
            }
            Self::NotArrived { .. } | Self::NotReturned { .. } => false,
        }
    }
}

/// Shared by the test and the workers, which pass the test's connections to it.
#[derive(Debug, Clone, Default)]
pub(crate) struct SelfTest {
    /// Checked for every connection: cheaper than the lock while no test runs.
    running: Arc<AtomicBool>,
    expected: Arc<Mutex<Option<Expected>>>,
}

#[derive(Debug)]
struct Expected {
    destination: SocketAddr,
    arrived: mpsc::UnboundedSender<()>,
}

impl SelfTest {
    /// Whether `accepted` is a connection of the test. It must not be served then.
    pub(crate) fn claims(&self, accepted: &Accepted) -> bool {
        if accepted.kind != Kind::Outbound || !self.running.load(Relaxed) {
            return false;
        }
        let expected = self.expected.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Expected { destination, arrived }) = expected.as_ref() else {
            return false;
        };
        let claimed = accepted.destination.address() == *destination;
        if claimed {
            // Closing with a reset would look like a refused connection to the test.
            end_on_close(&accepted.stream);
        }
        // Fails if the test has already timed out.
        claimed && arrived.send(()).is_ok()
    }

    /// Opens each connection and waits for its arrival. Returns the tested destinations.
    pub(crate) async fn run(
        &self,
        probes: Vec<Probe>,
        deadline: Duration,
    ) -> Result<Vec<SocketAddr>, SelfTestError> {
        self.running.store(true, Relaxed);
        let mut tested = Vec::new();
        let mut outcome = Ok(());
        for probe in probes {
            let destination = probe.destination;
            match self.one(probe, deadline).await {
                Ok(true) => tested.push(destination),
                Ok(false) => {
                    tracing::debug!(%destination, "no route for a test connection");
                }
                Err(error) => outcome = Err(error),
            }
        }
        self.running.store(false, Relaxed);
        self.expect(None);
        outcome.map(|()| tested)
    }

    /// Tests one destination; `false` if there is no route to it.
    async fn one(&self, probe: Probe, deadline: Duration) -> Result<bool, SelfTestError> {
        let destination = probe.destination;
        let (arrived, mut arrivals) = mpsc::unbounded_channel();
        self.expect(Some(Expected { destination, arrived }));
        let test = async {
            let connected = probe.connect().await;
            if !connected.map_err(|source| SelfTestError::NotCaught { destination, source })? {
                return Ok(false);
            }
            arrivals.recv().await;
            Ok(true)
        };
        let late = SelfTestError::NotArrived { destination, deadline };
        timeout(deadline, test).await.unwrap_or(Err(late))
    }

    fn expect(&self, expected: Option<Expected>) {
        *self.expected.lock().unwrap_or_else(PoisonError::into_inner) = expected;
    }
}

/// Opens each connection and waits for its answer. Returns the tested pairs of addresses.
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
