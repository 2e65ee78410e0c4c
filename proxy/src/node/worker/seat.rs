//! A pod on one worker: its connection registry, its pool of tunnels, and their client and server.

mod dialer;
mod neighbours;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::task::task_tracker::TaskTrackerToken;
use underpass_config::{Lookup, Timeouts, Workload};
use underpass_hbone::{
    Acceptor, ClientSettings, Connector, Credentials, Pool, PoolSettings, ServerSettings, log_panic,
};

use self::dialer::TunnelDialer;
use self::neighbours::Neighbours;
use crate::decide::connection_registry::{ConnectionRegistry, Registration};
use crate::decide::lookups;
use crate::decide::policy;
use crate::decide::policy::{Permit, PolicyContext};
use crate::decide::route::Target;
use crate::decide::snapshot::Snapshot;
use crate::decide::subject::{Decision, Subject};
use crate::error::ProxyError;
use crate::mesh::on_demand::{LookupLease, Wait};
use crate::node::Node;
use crate::node::pod::Pod;
use crate::node::worker::Worker;
use crate::observe::party::{Claim, Party};
use crate::observe::record::PodRecords;
use crate::traffic::accepted::Source;

/// The maximum time that a pool remembers a failed dial, rounded up: its longest back-off with
/// jitter, and the time in which another failure lengthens the next back-off
/// (hbone/src/pool/state.rs).
const FAILURE_REMEMBERED: Duration = Duration::from_secs(13);
/// The lifetime of a cached answer of the kernel that an address is the pod's own.
const CACHE_TTL: Duration = Duration::from_secs(1);
/// The maximum number of cached addresses; a pod has a few.
const MAX_CACHED_ADDRESSES: usize = 16;

/// A pod on a worker. Only the pod's connections and tunnels on the worker own it, so it ends with
/// the last of them.
#[derive(Debug)]
pub(crate) struct Seat {
    pub(crate) worker: Arc<Worker>,
    pub(crate) pod: Arc<Pod>,
    pub(crate) registry: Arc<ConnectionRegistry<Decision>>,
    /// The tunnels from this seat.
    pub(crate) pool: Pool<TunnelDialer>,
    /// The pods of this process to which the seat has connected without a tunnel.
    pub(crate) neighbours: Neighbours,
    /// The client and the server of tunnels; unset until the first certificate.
    endpoints: OnceLock<TunnelEndpoints>,
    /// Whether a task keeps the seat because its pool remembers failed dials.
    is_kept: AtomicBool,
    /// Whether a dial has failed since that task last checked.
    has_failed: AtomicBool,
    _counted: TaskTrackerToken,
    /// The pod's own addresses, each with the time of the kernel's answer. Only the worker's thread
    /// locks it, so that workers do not contend for the lock of [`Pod::local`].
    local: Mutex<Vec<(IpAddr, Instant)>>,
}

/// The client and the server of a pod's tunnels.
#[derive(Debug)]
pub(crate) struct TunnelEndpoints {
    pub(crate) connector: Connector,
    pub(crate) acceptor: Acceptor,
}

impl TunnelEndpoints {
    fn new(own: watch::Receiver<Credentials>, frame_timeout: Duration) -> Self {
        let client = ClientSettings { frame_timeout, ..ClientSettings::default() };
        let server = ServerSettings { frame_timeout, ..ServerSettings::default() };
        Self {
            connector: Connector::new(own.clone(), client),
            acceptor: Acceptor::new(own, server),
        }
    }
}

impl Seat {
    pub(super) fn new(worker: &Arc<Worker>, pod: &Arc<Pod>) -> Arc<Self> {
        let node = &worker.node;
        let Timeouts { connect, handshake, reply, pool_idle, .. } = node.timeouts;
        let settings = PoolSettings {
            dial: connect,
            handshake,
            reply,
            idle: pool_idle,
            max_age: node.tunnels.max_age,
            streams_per_tunnel: node.tunnels.streams,
            tunnels_per_peer: node.tunnels.per_peer,
        };
        let timings = worker.records.timings().clone();
        Arc::new_cyclic(|seat| Self {
            worker: worker.clone(),
            pod: pod.clone(),
            registry: pod.connections.for_worker(worker.index).clone(),
            pool: Pool::new(TunnelDialer::new(seat.clone(), timings), settings),
            neighbours: Neighbours::default(),
            endpoints: OnceLock::new(),
            is_kept: AtomicBool::new(false),
            has_failed: AtomicBool::new(false),
            _counted: pod.seats.token(),
            local: Mutex::default(),
        })
    }

    pub(crate) fn node(&self) -> &Node {
        &self.worker.node
    }

    pub(crate) fn context(&self) -> &PolicyContext {
        &self.pod.context
    }

    /// The client and the server of the pod's tunnels. Waits for the first certificate, at most for
    /// `timeouts.handshake`. `peer` is for the error.
    ///
    /// # Errors
    ///
    /// No certificate was issued in time.
    pub(crate) async fn tunnel_endpoints(
        &self,
        peer: SocketAddr,
    ) -> Result<&TunnelEndpoints, ProxyError> {
        if let Some(endpoints) = self.endpoints.get() {
            return Ok(endpoints);
        }
        let lease = self.pod.credentials.as_ref().ok_or(ProxyError::NoIdentity(peer))?;
        let Timeouts { handshake: after, frame, .. } = self.node().timeouts;
        match timeout(after, lease.first()).await {
            Ok(Ok(own)) => Ok(self.endpoints.get_or_init(|| TunnelEndpoints::new(own, frame))),
            // The rotation's error was logged when it happened.
            Ok(Err(_)) => Err(ProxyError::NoIdentity(peer)),
            Err(_) => Err(ProxyError::CertificateAwaited { id: lease.identity(), after }),
        }
    }

    /// Whether [`tunnel_endpoints`](Self::tunnel_endpoints) returns without waiting.
    pub(crate) fn has_tunnel_endpoints(&self) -> bool {
        self.endpoints.get().is_some()
    }

    /// The mesh for an outbound connection from `client` to `destination`. If permits require the
    /// pod's own workload, waits until the mesh has it, and then for the lookups of the connection;
    /// together at most for `timeouts.connect`.
    pub(crate) async fn outbound_mesh(
        &self,
        client: SocketAddr,
        destination: SocketAddr,
    ) -> Result<(Arc<Snapshot>, LookupLease), ProxyError> {
        let wait = self.connect_wait();
        let current = self.mesh_with(|snapshot| self.context().check_own(snapshot), wait).await?;
        let own = &self.context().own;
        let (client, destination) = (client.ip(), destination.ip());
        self.look_up(current, |mesh| lookups::outbound(mesh, own, client, destination), wait).await
    }

    /// The mesh for an inbound connection to the address `here` of the pod. Waits for the pod's
    /// policies too.
    pub(crate) async fn inbound_mesh(
        &self,
        here: SocketAddr,
        requested: Option<&Target>,
    ) -> Result<(Arc<Snapshot>, LookupLease), ProxyError> {
        let check = |snapshot: &Snapshot| self.context().check_inbound(snapshot, here.ip());
        let wait = self.connect_wait();
        if !self.pod.lookups.are_on_demand() {
            return Ok((self.mesh_with(check, wait).await?, LookupLease::default()));
        }
        let own = &self.context().own;
        let mut mesh = self.node().mesh.clone();
        loop {
            let current = mesh.borrow_and_update().clone();
            let needed = |mesh: &Snapshot| lookups::inbound(mesh, own, here, requested);
            let (snapshot, lease) = self.look_up(current, needed, wait).await?;
            let Err(error) = check(&snapshot) else { return Ok((snapshot, lease)) };
            // An absent workload is looked up again when its answer has expired.
            if !matches!(timeout_at(wait.end(), mesh.changed()).await, Ok(Ok(()))) {
                return Err(error);
            }
        }
    }

    /// The wait of a connection that begins now, at most for `timeouts.connect`.
    pub(crate) fn connect_wait(&self) -> Wait {
        Wait { since: Instant::now(), within: self.node().timeouts.connect }
    }

    /// Looks up what a connection needs besides the `current` mesh, and the pod's own workload.
    pub(crate) async fn look_up(
        &self,
        current: Arc<Snapshot>,
        needed: impl Fn(&Snapshot) -> Vec<Lookup>,
        wait: Wait,
    ) -> Result<(Arc<Snapshot>, LookupLease), ProxyError> {
        let node = self.node();
        let needed = |mesh: &Snapshot| {
            let own = self.context().lookup_of_own(mesh);
            needed(mesh).into_iter().chain(own).collect()
        };
        self.pod
            .lookups
            .resolve(current, &node.mesh, needed, wait)
            .await
            .map_err(ProxyError::Lookup)
    }

    async fn mesh_with(
        &self,
        check: impl Fn(&Snapshot) -> Result<(), ProxyError>,
        wait: Wait,
    ) -> Result<Arc<Snapshot>, ProxyError> {
        let current = self.node().mesh.borrow().clone();
        let Err(error) = check(&current) else { return Ok(current) };
        let mut mesh = self.node().mesh.clone();
        let known = mesh.wait_for(|snapshot| check(snapshot).is_ok());
        match timeout_at(wait.end(), known).await {
            Ok(Ok(snapshot)) => Ok(snapshot.clone()),
            Ok(Err(_)) | Err(_) => Err(error),
        }
    }

    /// Counts and lists the connections of the pod on the worker.
    pub(crate) fn records(&self) -> PodRecords<'_> {
        self.worker.records.of_pod(&self.pod.name)
    }

    /// Registers a stream of a tunnel of the pod.
    pub(crate) fn register_stream(&self) -> Registration<Decision> {
        self.registry.register(Decision::undecided(true))
    }

    /// Decides whether a registered connection of the pod is permitted.
    pub(crate) fn permit<'a>(
        &'a self,
        subject: Subject,
        registration: &'a Registration<Decision>,
    ) -> Result<Permit<'a>, ProxyError> {
        policy::permit(subject, &self.pod, &self.worker.node.mesh, registration)
    }

    /// The workload of an outbound connection: the pod's own. If the mesh has no workload with the
    /// pod's name, it is the workload at the source address, provided that it has the pod's
    /// identity.
    pub(crate) fn caller<'a>(
        &self,
        snapshot: &'a Snapshot,
        source: Source,
    ) -> Option<&'a Arc<Workload>> {
        snapshot.named(&self.context().own).or_else(|| match source {
            Source::Own(address) => snapshot
                .workload(address)
                .filter(|workload| self.pod.may_have_identity_of(workload)),
            Source::Other => None,
        })
    }

    /// The pod as one party of a connection, at one of its own addresses. It is the workload with
    /// the pod's name, or the one at that address with the pod's identity.
    pub(crate) fn own_party(&self, snapshot: &Snapshot, address: SocketAddr) -> Party {
        let named = snapshot.named(&self.context().own);
        let at_address = || snapshot.workload(address.ip());
        let proven = named.or_else(|| at_address().filter(|workload| self.pod.proves(workload)));
        let claim = match proven {
            Some(_) => None,
            None => {
                at_address().filter(|workload| self.pod.may_have_identity_of(workload)).cloned()
            }
        };
        let (workload, claim) = (proven.cloned(), claim.map(Claim::Address));
        Party { workload, claim, ..Party::at_address(address) }
    }

    /// The pod as the source of a connection from another address: of a virtual machine in it, or
    /// of a client of an ingress gateway.
    pub(crate) fn party_behind(&self, snapshot: &Snapshot, address: SocketAddr) -> Party {
        Party {
            workload: snapshot.named(&self.context().own).cloned(),
            ..Party::at_address(address)
        }
    }

    /// Whether `address` is one of the pod's own.
    ///
    /// # Errors
    ///
    /// The kernel did not answer.
    pub(crate) fn is_local(&self, address: IpAddr) -> io::Result<bool> {
        let address = address.to_canonical();
        let now = Instant::now();
        {
            let mut local = self.local();
            local.retain(|(_, since)| now.duration_since(*since) < CACHE_TTL);
            if local.iter().any(|(own, _)| *own == address) {
                return Ok(true);
            }
        }
        let is_local = self.pod.local.contain(address)?;
        if is_local {
            let mut local = self.local();
            if local.len() < MAX_CACHED_ADDRESSES {
                local.push((address, now));
            }
        }
        Ok(is_local)
    }

    fn local(&self) -> MutexGuard<'_, Vec<(IpAddr, Instant)>> {
        // No code panics while it holds the lock.
        self.local.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the seat while its pool remembers the dial that failed. Otherwise the next connection
    /// would create a new pool and dial at once.
    pub(crate) fn keep_after_failure(self: &Arc<Self>) {
        self.has_failed.store(true, Relaxed);
        if self.is_kept.swap(true, Relaxed) {
            return;
        }
        let seat = self.clone();
        let keeping = async move {
            while seat.has_failed.swap(false, Relaxed) {
                let remembered = tokio::time::sleep(FAILURE_REMEMBERED);
                tokio::select! {
                    () = remembered => {}
                    () = seat.pod.sockets.closed() => break,
                }
            }
            seat.is_kept.store(false, Relaxed);
        };
        tokio::spawn(log_panic("memory of a failed dial", keeping));
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.worker.forget_seat(self.pod.id);
    }
}

#[cfg(test)]
mod tests;
