//! The data workers: threads with a runtime, a pool and connections of their own.
//!
//! The three listeners are dealt to the workers in turn. Whoever accepts gives the connection, not yet registered with any
//! runtime, to the worker that [`Balance`] chooses; there it stays: nothing is woken across threads per byte.

use std::net::IpAddr;
use std::sync::Arc;
use std::thread::JoinHandle;

use tokio::sync::mpsc;
use tokio::sync::watch;
use underpass_config::{SpiffeId, Timeouts, TunnelSettings};
use underpass_hbone::{
    Acceptor, ClientSettings, Connector, Credentials, Pool, PoolSettings, ServerSettings,
    SourceGuard,
};
use underpass_interception::{BoundListener, Sockets, drop_capabilities};

use crate::accept::{Accepted, Kind, accept_loop};
use crate::balance::Balance;
use crate::cli::{CommandError, single_threaded_runtime};
use crate::copy::{Buffers, Deadlines};
use crate::descriptors::Held;
use crate::dial::TunnelDialer;
use crate::drain::Drain;
use crate::endpoint_health::EndpointHealth;
use crate::error::ProxyError;
use crate::gate::Gate;
use crate::limits::{Limits, Place, Refusal};
use crate::live::{Live, Revocation};
use crate::metrics::KnownSeries;
use crate::policy::{Change, Permit, Rules, Subject};
use crate::publish::Applied;
use crate::resolve::Resolver;
use crate::self_test::SelfTest;
use crate::snapshot::Snapshot;
use crate::{inbound, metrics, outbound, policy};

/// Connections that may wait to be taken over by a worker; beyond it the accepting worker keeps them.
const HANDOVER_QUEUE: usize = 1024;

/// What all workers share: settings and snapshots, nothing that is locked per byte.
#[derive(Debug, Clone)]
pub(crate) struct Shared {
    pub(crate) sockets: Sockets,
    pub(crate) rules: Arc<Rules>,
    pub(crate) timeouts: Timeouts,
    pub(crate) tunnels: TunnelSettings,
    pub(crate) mesh: watch::Receiver<Arc<Snapshot>>,
    /// How the endpoints of services fare.
    pub(crate) endpoints: Arc<EndpointHealth>,
    /// What hostnames resolve to.
    pub(crate) resolver: Arc<Resolver>,
    /// What we prove and whom we trust, as it is renewed; `None` without a certificate.
    pub(crate) credentials: Option<watch::Receiver<Credentials>>,
    pub(crate) limits: Limits,
    /// What the copy may hold.
    pub(crate) buffers: Buffers,
    /// How long a connection may rest.
    pub(crate) deadlines: Deadlines,
    pub(crate) drain: Drain,
    pub(crate) accept: Gate,
    pub(crate) self_test: SelfTest,
    /// Whether workers can do without any capability.
    pub(crate) unprivileged: bool,
}

impl Shared {
    /// Who we prove to be, if anybody.
    pub(crate) fn identity(&self) -> Option<SpiffeId> {
        let credentials = self.credentials.as_ref()?.borrow();
        Some(credentials.identity().spiffe_id().clone())
    }
}

/// What the connections of one worker share.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) shared: Shared,
    /// The tunnels that this worker has opened.
    pub(crate) pool: Pool<TunnelDialer>,
    /// What opens tunnels, and what accepts them; `None` without a certificate.
    pub(crate) connector: Option<Connector>,
    pub(crate) acceptor: Option<Acceptor>,
    /// The connections that this worker serves.
    pub(crate) live: Arc<Live>,
    /// What they are counted in.
    pub(crate) series: KnownSeries,
    pub(crate) balance: Arc<Balance>,
    pub(crate) index: usize,
}

impl Worker {
    fn new(shared: Shared, balance: Arc<Balance>, index: usize) -> Self {
        let Timeouts { connect, handshake, frame, reply, pool_idle, .. } = shared.timeouts;
        let dialer = TunnelDialer {
            sockets: shared.sockets.clone(),
            balance: balance.clone(),
            worker: index,
            descriptors: shared.limits.descriptors.clone(),
        };
        let settings = PoolSettings {
            dial: connect,
            handshake,
            reply,
            idle: pool_idle,
            max_age: shared.tunnels.max_age,
            streams_per_tunnel: shared.tunnels.streams,
            tunnels_per_peer: shared.tunnels.per_peer,
        };
        let credentials = || shared.credentials.clone();
        let client = ClientSettings { frame_timeout: frame, ..ClientSettings::default() };
        let server = ServerSettings { frame_timeout: frame, ..ServerSettings::default() };
        let connector = credentials().map(|own| Connector::new(own, client));
        let acceptor = credentials().map(|own| Acceptor::new(own, server));
        let pool = Pool::new(dialer, settings);
        let (live, series) = (Arc::default(), KnownSeries::default());
        Self { pool, connector, acceptor, live, series, balance, index, shared }
    }

    /// Decides on a connection.
    pub(crate) fn permit(&self, subject: Subject) -> Result<(Permit, Revocation), ProxyError> {
        policy::permit(subject, &self.shared.mesh, &self.shared.rules, &self.live)
    }

    /// A place for a stream of a tunnel from `client`, which came by the listener `listener`, and a descriptor to connect with.
    pub(crate) fn admit_stream(
        &self,
        client: IpAddr,
        listener: &'static str,
    ) -> Result<(Place, Held), ProxyError> {
        let Limits { descriptors, .. } = &self.shared.limits;
        let place = self.place(client).map_err(|refusal| {
            metrics::connection_refused(refusal.limit(), listener);
            ProxyError::TooManyConnections(refusal)
        });
        Ok((place?, descriptors.one().ok_or(ProxyError::OutOfDescriptors)?))
    }

    fn place(&self, client: IpAddr) -> Result<Place, Refusal> {
        let source = self.shared.limits.admit(client)?;
        let load = self.balance.load(self.index).ok_or(Refusal::Worker)?;
        Ok(Place { load, source })
    }

    /// Ends what is left when the time to drain has passed. Connecting asks for that itself, and before all else; so a connection is
    /// found here, or has not begun.
    async fn abort(&self) {
        let _drained = self.shared.drain.aborting().await;
        let all = self.live.stop(|_, _| Err(ProxyError::Drained)).await;
        self.live.end(all).await;
    }

    /// Ends what each change of the mesh forbids, for ever.
    async fn enforce(&self, applied: watch::Sender<Applied>) {
        let mut mesh = self.shared.mesh.clone();
        let mut old = mesh.borrow_and_update().clone();
        applied.send_replace(Applied { generation: old.generation, cut: 0 });
        while mesh.changed().await.is_ok() {
            let new = mesh.borrow_and_update().clone();
            self.series.forget();
            let mut change = Change::new(&old, &new, &self.shared.rules);
            let check = |subject: &Subject, since| {
                let checked = change.check(subject, since);
                checked.map_err(|reason| ProxyError::NoLongerAllowed(Box::new(reason)))
            };
            let stopped = self.live.stop(check).await;
            // The next change need not wait until all of them have ended.
            let (live, applied, generation) = (self.live.clone(), applied.clone(), new.generation);
            tokio::spawn(async move {
                let cut = stopped.len();
                live.end(stopped).await;
                applied.send_if_modified(|last| {
                    let newer = generation > last.generation;
                    if newer {
                        *last = Applied { generation, cut };
                    }
                    newer
                });
            });
            old = new;
        }
    }
}

/// A connection on its way to the worker that will serve it.
pub(crate) struct Assignment {
    pub(crate) accepted: Accepted,
    pub(crate) place: Place,
    /// What a tunnel counts as beside its place, for as long as it lives.
    pub(crate) tunnel: Option<SourceGuard>,
}

/// The running workers.
pub(crate) struct Workers {
    pub(crate) threads: Vec<JoinHandle<()>>,
    /// By which mesh each of them goes.
    pub(crate) applied: Vec<watch::Receiver<Applied>>,
}

/// Starts the workers and deals the listeners to them.
pub(crate) fn start(
    shared: &Shared,
    workers: usize,
    listeners: [(Kind, BoundListener); 3],
) -> Result<Workers, CommandError> {
    let balance = Balance::new(workers, shared.limits.connections_per_worker);
    let (senders, receivers): (Vec<_>, Vec<_>) =
        (0..workers).map(|_| mpsc::channel(HANDOVER_QUEUE)).unzip();
    let senders: Arc<[mpsc::Sender<Assignment>]> = senders.into();
    let mut hands: Vec<Vec<_>> = (0..workers).map(|_| Vec::new()).collect();
    for (turn, listener) in listeners.into_iter().enumerate() {
        if let Some(hand) = hands.get_mut(turn % workers) {
            hand.push(listener);
        }
    }
    let start_one = |(index, (receiver, hand))| -> Result<_, CommandError> {
        let (applied, followed) = watch::channel(Applied::default());
        let worker = Arc::new(Worker::new(shared.clone(), balance.clone(), index));
        let senders = senders.clone();
        let runtime = single_threaded_runtime()?;
        let thread = std::thread::Builder::new().name(format!("worker-{index}"));
        let unprivileged = shared.unprivileged;
        let run = move || {
            if unprivileged && let Err(error) = drop_capabilities() {
                tracing::warn!(%error, "a worker keeps capabilities that it does not need");
            }
            runtime.block_on(run(worker, receiver, hand, senders, applied));
        };
        Ok((thread.spawn(run).map_err(CommandError::Start)?, followed))
    };
    let started: Result<Vec<_>, _> =
        receivers.into_iter().zip(hands).enumerate().map(start_one).collect();
    let (threads, applied) = started?.into_iter().unzip();
    Ok(Workers { threads, applied })
}

async fn run(
    worker: Arc<Worker>,
    mut assignments: mpsc::Receiver<Assignment>,
    listeners: Vec<(Kind, BoundListener)>,
    peers: Arc<[mpsc::Sender<Assignment>]>,
    applied: watch::Sender<Applied>,
) {
    let enforcing = worker.clone();
    tokio::spawn(async move { enforcing.enforce(applied).await });
    let aborting = worker.clone();
    tokio::spawn(async move { aborting.abort().await });
    for (kind, listener) in listeners {
        tokio::spawn(accept_loop(worker.clone(), kind, listener, peers.clone()));
    }
    let drain = worker.shared.drain.clone();
    loop {
        tokio::select! {
            () = drain.ended() => return,
            Some(assignment) = assignments.recv() => serve(&worker, assignment),
        }
    }
}

/// Serves a connection on this worker until it ends or the drain deadline passes.
pub(crate) fn serve(worker: &Arc<Worker>, assignment: Assignment) {
    let (own, drain) = (worker.clone(), &worker.shared.drain);
    // Each a task of its own size: tunnels are few, and need much more than a connection.
    match assignment.accepted.kind {
        Kind::Outbound => tokio::spawn(drain.track(outbound::serve(own, assignment))),
        Kind::Plaintext => tokio::spawn(drain.track(inbound::serve_plaintext(own, assignment))),
        Kind::Hbone => tokio::spawn(drain.track(inbound::serve_tunnel(own, assignment))),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size<A, B, F: Future>(_: impl Fn(A, B) -> F) -> usize {
        size_of::<F>()
    }

    /// It is most of what an idle connection holds, and one future that is not boxed where it should be doubles it.
    #[test]
    fn what_a_connection_needs_for_as_long_as_it_lives_is_little() {
        assert!(size(outbound::serve) <= 1024, "{}", size(outbound::serve));
        assert!(size(inbound::serve_plaintext) <= 1024, "{}", size(inbound::serve_plaintext));
    }
}
