//! A data worker: a thread that serves connections of all pods.
//!
//! The listeners of a pod are distributed to the workers in turn. The accepting worker assigns each
//! connection to the worker that [`crate::limits::Balance`] selects, before any runtime has
//! registered the socket. The connection stays on that worker, so that no byte wakes another
//! thread.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use futures_util::future::FutureExt as _;
use futures_util::stream::{FuturesOrdered, StreamExt as _};
use tokio::sync::mpsc;
use underpass_hbone::log_panic;

use crate::decide::connection_registry::Terminated;
use crate::decide::policy::MeshChange;
use crate::decide::snapshot::Snapshot;
use crate::decide::subject::Decision;
use crate::error::ProxyError;
use crate::mesh::publish::Reporter;
use crate::node::Node;
use crate::node::assignment::{Assignment, WorkerCommand};
use crate::node::pod::{Pod, PodId};
use crate::node::worker::seat::Seat;
use crate::node::worker::turns::{InTurn, Turns};
use crate::observe::record::WorkerRecords;
use crate::traffic::listeners::Kind;
use crate::traffic::{inbound, outbound};

mod inspect;
pub(crate) mod seat;
pub(crate) mod turns;

/// State that the connections of one worker share.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) node: Arc<Node>,
    pub(crate) index: usize,
    pub(crate) records: WorkerRecords,
    /// The turns of the pods; `None` if there is one pod.
    pub(crate) turns: Option<Turns>,
    /// The command channels of all workers, including this one.
    workers: Arc<[mpsc::Sender<WorkerCommand>]>,
    /// The seats of the pods that have a connection or a tunnel on this worker. Only this worker's
    /// thread locks it, and never across an await.
    seats: Mutex<HashMap<PodId, Weak<Seat>>>,
}

impl Worker {
    pub(crate) fn new(
        node: Arc<Node>,
        index: usize,
        workers: Arc<[mpsc::Sender<WorkerCommand>]>,
    ) -> Arc<Self> {
        let records = WorkerRecords::new(node.series.clone(), node.workers);
        let turns = node.has_many_pods.then(Turns::default);
        Arc::new(Self { node, index, records, turns, workers, seats: Mutex::default() })
    }

    /// The seat of `pod`, created for the first connection of the pod on this worker.
    pub(crate) fn seat(self: &Arc<Self>, pod: &Arc<Pod>) -> Arc<Seat> {
        let known = self.seats().get(&pod.id).and_then(Weak::upgrade);
        known.unwrap_or_else(|| {
            let seat = Seat::new(self, pod);
            self.seats().insert(pod.id, Arc::downgrade(&seat));
            seat
        })
    }

    /// Removes the seat of `pod`, which is being dropped.
    pub(super) fn forget_seat(&self, pod: PodId) {
        let mut seats = self.seats();
        // A new seat may have replaced the dropped one.
        if seats.get(&pod).is_some_and(|seat| seat.strong_count() == 0) {
            seats.remove(&pod);
        }
    }

    fn seats(&self) -> MutexGuard<'_, HashMap<PodId, Weak<Seat>>> {
        // No code panics while it holds the lock.
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a connection to its worker. Returns the connection if that worker's queue is full.
    pub(crate) fn assign(self: &Arc<Self>, assignment: Assignment) -> Option<Assignment> {
        let chosen = assignment.ticket.worker();
        let Some(other) = self.workers.get(chosen).filter(|_| chosen != self.index) else {
            self.serve(assignment);
            return None;
        };
        match other.try_send(WorkerCommand::Serve(assignment)).err()?.into_inner() {
            WorkerCommand::Serve(assignment) => Some(assignment),
            // Unreachable: only `Serve` was sent.
            WorkerCommand::AddListener { .. }
            | WorkerCommand::AddDns { .. }
            | WorkerCommand::RemoveListeners { .. }
            | WorkerCommand::CloseTunnels(_)
            | WorkerCommand::Inspect(_) => None,
        }
    }

    /// Serves a connection on this worker until it ends or is terminated.
    pub(crate) fn serve(self: &Arc<Self>, assignment: Assignment) {
        let seat = self.seat(&assignment.pod);
        let (turns, pod) = (self.turns.as_ref(), assignment.pod.id);
        // Separate task types: otherwise every connection would need the memory of a tunnel.
        match assignment.accepted.kind {
            Kind::Outbound => {
                let serving = InTurn::new(turns, pod, outbound::serve(seat, assignment));
                tokio::spawn(log_panic("outbound connection", serving))
            }
            Kind::Plaintext => {
                let serving = InTurn::new(turns, pod, inbound::serve_plaintext(seat, assignment));
                tokio::spawn(log_panic("inbound connection", serving))
            }
            Kind::Hbone => {
                // Its handshake and its streams take turns.
                tokio::spawn(log_panic("tunnel of a peer", inbound::serve_tunnel(seat, assignment)))
            }
        };
    }

    pub(super) fn close_tunnels(&self, pod: PodId) {
        let seat = self.seats().get(&pod).and_then(Weak::upgrade);
        if let Some(seat) = seat {
            seat.pool.drain();
        }
    }

    /// Terminates the connections that changes of the mesh forbid, and reports each change when
    /// they have ended. Never returns.
    pub(crate) async fn enforce(&self, reporter: &Reporter) {
        let mut mesh = self.node.mesh.clone();
        let mut old = mesh.borrow_and_update().clone();
        reporter.applied(old.generation, 0);
        let mut ending = FuturesOrdered::new();
        loop {
            tokio::select! {
                Ok(()) = mesh.changed() => {}
                Some((generation, terminated)) = ending.next() => {
                    reporter.applied(generation, terminated);
                    continue;
                }
                // The publisher has ended, because the process ends.
                else => return std::future::pending().await,
            }
            let new = mesh.borrow_and_update().clone();
            let terminated = self.apply(&old, &new).await;
            // The next change does not wait for the end of these connections.
            let (generation, count) = (new.generation, terminated.count());
            ending.push_back(terminated.end().map(move |()| (generation, count)));
            old = new;
        }
    }

    /// Terminates the connections that a change of the mesh forbids.
    async fn apply(&self, old: &Snapshot, new: &Snapshot) -> Terminated {
        self.records.forget_series();
        // A permitted connection has a seat. Connections without one yet will be decided by `new`
        // or a newer mesh.
        let seats: Vec<_> = self.seats().values().filter_map(Weak::upgrade).collect();
        let mut terminated = Terminated::default();
        for seat in seats {
            let mut change = MeshChange::new(old, new, seat.context());
            let found = seat.registry.find(|index| change.concerned(index));
            let check = |decision: &Decision| {
                let checked = change.check(decision);
                checked.map_err(|reason| ProxyError::NoLongerAllowed(Box::new(reason)))
            };
            match found {
                Some(keys) => {
                    seat.registry.terminate_found(&keys, &mut terminated, check).await;
                }
                None => seat.registry.terminate(&mut terminated, check).await,
            }
        }
        terminated
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::AdmissionKind;
    use crate::node::testing::{node, pod};
    use crate::traffic::accepted::Accepted;

    fn size<A, B, F: Future>(_: impl Fn(A, B) -> F) -> usize {
        size_of::<F>()
    }

    /// The tasks are most of an idle connection's memory. A single unboxed future would double
    /// their size.
    #[test]
    fn open_connection_needs_at_most_one_kib() {
        assert!(size(outbound::serve) <= 1024, "{}", size(outbound::serve));
        assert!(size(inbound::serve_plaintext) <= 1024, "{}", size(inbound::serve_plaintext));
    }

    #[tokio::test]
    async fn seat_is_created_by_first_connection_and_dropped_after_last() {
        let (pods, worker) = ([pod(&[]), pod(&[])], Worker::new(node(1), 0, Arc::default()));
        let first = worker.seat(&pods[0]);
        let second = worker.seat(&pods[0]);
        assert!(Arc::ptr_eq(&first, &second), "one seat for each pod");
        let other = worker.seat(&pods[1]);
        assert!(!Arc::ptr_eq(&first, &other), "each pod has its own seat");
        assert_eq!(worker.seats().len(), 2);
        drop((first, other));
        assert!(worker.seats().keys().eq([&pods[0].id]), "a connection is left");
        drop(second);
        assert!(worker.seats().is_empty());
        assert_eq!(Arc::strong_count(&pods[0]), 1, "a seat that has ended holds no pod");
        let again = worker.seat(&pods[0]);
        assert!(Arc::ptr_eq(&again, &worker.seat(&pods[0])));
    }

    #[tokio::test]
    async fn dropped_seat_does_not_remove_its_successor() {
        let (pod, worker) = (pod(&[]), Worker::new(node(1), 0, Arc::default()));
        let seat = worker.seat(&pod);
        worker.forget_seat(pod.id);
        assert!(Arc::ptr_eq(&seat, &worker.seat(&pod)));
    }

    #[tokio::test]
    async fn full_worker_queue_returns_the_connection() {
        let (sender, mut receiver) = mpsc::channel(1);
        let pod = pod(&[]);
        let worker = Worker::new(node(2), 0, Arc::from([sender.clone(), sender]));
        let assignment = || {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let _client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (stream, client) = listener.accept().unwrap();
            let accepted = Accepted::testing(Kind::Plaintext, stream, client);
            let mut ticket = pod.limits.admit(AdmissionKind::Plaintext, client.ip(), None).unwrap();
            ticket.move_to(1).unwrap();
            let registration = pod.connections.for_worker(1).register(Decision::default());
            Assignment { pod: pod.clone(), accepted, registration, ticket }
        };
        assert!(worker.assign(assignment()).is_none());
        let refused = worker.assign(assignment());
        assert!(refused.is_some_and(|back| Arc::ptr_eq(&back.pod, &pod)));
        let command = receiver.recv().await;
        assert!(matches!(command, Some(WorkerCommand::Serve(served)) if served.pod.id == pod.id));
    }
}
