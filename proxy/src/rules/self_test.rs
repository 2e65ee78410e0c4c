//! Self-test of the rules, before `ready` and after changes (`retest.rs`).
//!
//! Test connections take the path of the workload's traffic and must arrive at our listeners with
//! their original destination. The workload's answers to imitated clients must come back.

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

/// The test failed: traffic is not caught as it should be.
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
    #[error("the sockets of the test could not be made")]
    Prepare(#[source] std::io::Error),
}

impl SelfTestError {
    /// The sockets could not be made in the namespace.
    pub(crate) fn prepare(error: InterceptionError) -> Self {
        Self::Prepare(error.into())
    }

    /// Whether it says nothing about the rules: this process cannot make the test.
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

/// Shared by the test and the accepting workers, who give it its own connections.
#[derive(Debug, Clone, Default)]
pub(crate) struct SelfTest {
    /// Looked at for every connection, so that nothing else is while there is no test.
    running: Arc<AtomicBool>,
    expected: Arc<Mutex<Option<Expected>>>,
}

#[derive(Debug)]
struct Expected {
    destination: SocketAddr,
    arrived: mpsc::UnboundedSender<()>,
}

impl SelfTest {
    /// Whether `accepted` is the test's own, and so nobody else's.
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
            // A reset may come with the connection, and the test would take it for a refusal.
            end_on_close(&accepted.stream);
        }
        // Whoever waits no longer has been told something else.
        claimed && arrived.send(()).is_ok()
    }

    /// Makes each connection and waits for it; says which destinations were tested.
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
                    tracing::debug!(%destination, "there is no route that a test could take");
                }
                Err(error) => outcome = Err(error),
            }
        }
        self.running.store(false, Relaxed);
        self.expect(None);
        outcome.map(|()| tested)
    }

    /// `false` if there is no route by which such a connection could leave.
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

/// Makes each connection and waits for its answer; says between whom.
pub(crate) async fn run_way_back(
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
