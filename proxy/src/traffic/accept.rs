//! Accepts connections: one loop per listener, which assigns each connection to a worker.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::coop::unconstrained;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep, sleep_until};
use underpass_hbone::catch_panic;
use underpass_interception::{Listener, reset_on_close};

use crate::decide::connection_registry::Registration;
use crate::decide::subject::Decision;
use crate::error::ProxyError;
use crate::limits::{AdmissionKind, Limits, Rate, Refusal, Shortage};
use crate::node::assignment::Assignment;
use crate::node::pod::Pod;
use crate::node::worker::Worker;
use crate::observe::metrics;
use crate::observe::party::{Direction, Party};
use crate::observe::record::{ConnectionRecord, Facts, PodRecords};
use crate::traffic::accepted::Accepted;
use crate::traffic::listeners::{Kind, ListenerKind as _};

/// The pause of a listener when the system has no descriptor or memory: long enough not to spin,
/// short enough not to be noticed. The kernel queues connections meanwhile.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// The number of connections to accept before other tasks run, which takes a few milliseconds.
/// tokio would yield after 128. With thousands of busy connections the next turn then comes so late
/// that a burst overflows the accept queue (4096). Clients whose packets are dropped wait for
/// seconds.
const ACCEPTS_AT_ONCE: usize = 512;
/// The number of connections to accept in the turn of a pod that shares its worker with others:
/// eight take about as long as one poll of a new connection.
const ACCEPTS_IN_TURN: usize = 8;

/// A listener of a pod, on the worker that accepts its connections.
struct Listening {
    worker: Arc<Worker>,
    pod: Arc<Pod>,
    kind: Kind,
    listener: Listener,
}

/// Accepts until the pod or the process drains, then closes the listener. Cancel-safe.
pub(crate) async fn accept_loop(
    worker: Arc<Worker>,
    pod: Arc<Pod>,
    kind: Kind,
    listener: Listener,
) {
    let listening = Listening { worker, pod, kind, listener };
    let gate = &listening.pod.accepting;
    let accepting = async {
        loop {
            gate.pass(restart_after_panic(kind, || accept_forever(&listening))).await;
        }
    };
    tokio::select! {
        () = listening.pod.closing.cancelled() => {}
        () = accepting => {}
    }
}

/// Restarts the accept loop after a panic, which concerns only one connection.
async fn restart_after_panic<F: Future<Output = ()>>(kind: Kind, accept: impl Fn() -> F) {
    while let Err(panic) = catch_panic(accept()).await {
        tracing::error!(task = "accept", listener = kind.name(), %panic, "a task panicked");
        sleep(ACCEPT_BACKOFF).await;
    }
}

async fn accept_forever(listening: &Listening) {
    let Listening { worker, pod, kind, listener } = listening;
    // Set the options again at every start: a failed take-over may have set other options on the
    // shared listener.
    if let Err(error) = pod.sockets.settings().prepare(listener, kind.accepted()) {
        tracing::error!(listener = kind.name(), %error, "cannot set socket options of the listener");
    }
    let Limits { descriptors, accepts_per_second, .. } = &worker.node.limits;
    let mut rate = accepts_per_second.map(Rate::new);
    let at_once = if worker.turns.is_some() { ACCEPTS_IN_TURN } else { ACCEPTS_AT_ONCE };
    for accepted in (1..=at_once).cycle() {
        if accepted == at_once {
            match &worker.turns {
                Some(turns) => turns.accept(pod.id).await,
                None => yield_now().await,
            }
        }
        if !pod.limits.has_room(admission_kind(*kind)) {
            let _paused = descriptors.pause(kind.name(), Shortage::Descriptors);
            pod.limits.wait_for_room(admission_kind(*kind)).await;
        }
        match unconstrained(listener.accept()).await {
            Ok((stream, client)) => {
                assign_or_refuse(listening, stream, client);
                if let Some(next) = rate.as_mut().and_then(Rate::take) {
                    metrics::accept_paused(kind.name(), "rate");
                    sleep_until(next).await;
                }
            }
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                let shortage = Shortage::System(error.raw_os_error());
                let _paused = descriptors.pause(kind.name(), shortage);
                sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

/// Whether the error belongs to the accepted connection: accept(2) returns its pending errors.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{
        ConnectionAborted, ConnectionReset, HostUnreachable, NetworkDown, NetworkUnreachable,
    };
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionReset | HostUnreachable | NetworkDown | NetworkUnreachable
    )
}

fn admission_kind(kind: Kind) -> AdmissionKind {
    match kind {
        Kind::Outbound => AdmissionKind::Outbound,
        Kind::Plaintext => AdmissionKind::Plaintext,
        Kind::Hbone => AdmissionKind::Tunnel,
    }
}

/// Assigns a connection to a worker, or refuses it if it exceeds a limit.
fn assign_or_refuse(
    Listening { worker, pod, kind, .. }: &Listening,
    stream: TcpStream,
    client: SocketAddr,
) {
    let kind = *kind;
    let accepted = match Accepted::new(kind, stream, client, pod.context.ports) {
        Ok(accepted) => accepted,
        Err(error) => {
            let records = worker.records.of_pod(&pod.name);
            return record_uncaught(records, kind, client, error);
        }
    };
    if pod.self_test.claims(&accepted) {
        return;
    }
    let is_drained = || kind != Kind::Outbound && pod.inbound_drain.refuses();
    if is_drained() {
        return refuse_drained(worker.records.of_pod(&pod.name), &accepted);
    }
    let peer = (kind == Kind::Outbound).then(|| accepted.destination.address().ip());
    match pod.limits.admit(admission_kind(kind), client.ip(), peer) {
        Ok(ticket) => {
            let registration = register(pod, ticket.worker(), kind);
            // A drain that has begun meanwhile may not have counted the connection.
            if is_drained() {
                return refuse_drained(worker.records.of_pod(&pod.name), &accepted);
            }
            assign(worker, Assignment { pod: pod.clone(), accepted, registration, ticket });
        }
        Err(refusal) => refuse(worker, kind, &accepted.stream, refusal),
    }
}

/// Records a connection that no rule redirected to the listener.
fn record_uncaught(records: PodRecords<'_>, kind: Kind, client: SocketAddr, error: ProxyError) {
    let direction = match kind {
        Kind::Outbound => Direction::Outbound,
        Kind::Plaintext | Kind::Hbone => Direction::Inbound,
    };
    let destination = match &error {
        ProxyError::OwnListener(address) => Party::at_address(*address),
        _ => Party::default(),
    };
    let failure = Facts::new(direction, Party::at_address(client), destination).failed(error);
    ConnectionRecord::failed(Instant::now(), failure, records);
}

/// Refuses an inbound connection to a pod that an operator drains. By RST: a FIN would look like an
/// answer.
fn refuse_drained(records: PodRecords<'_>, accepted: &Accepted) {
    reset_on_close(&accepted.stream);
    let (client, destination) = (accepted.client, accepted.destination.address());
    let (source, destination) = (Party::at_address(client), Party::at_address(destination));
    let facts = Facts::new(Direction::Inbound, source, destination);
    let failure = facts.failed(ProxyError::Draining);
    ConnectionRecord::handshake_failed(Instant::now(), failure, records);
}

fn assign(worker: &Arc<Worker>, assignment: Assignment) {
    let Some(mut returned) = worker.assign(assignment) else { return };
    if let Err(refusal) = returned.ticket.move_to(worker.index) {
        let Accepted { kind, stream, .. } = &returned.accepted;
        return refuse(worker, *kind, stream, refusal);
    }
    let registration = register(&returned.pod, worker.index, returned.accepted.kind);
    worker.serve(Assignment { registration, ..returned });
}

/// Registers an accepted connection of `pod` on a worker.
fn register(pod: &Pod, worker: usize, kind: Kind) -> Registration<Decision> {
    pod.connections.for_worker(worker).register(Decision::undecided(kind != Kind::Outbound))
}

/// Refuses by RST: a FIN would look like an answer.
fn refuse(worker: &Worker, kind: Kind, stream: &TcpStream, refusal: Refusal) {
    reset_on_close(stream);
    worker.node.limits.refused(refusal, kind.name());
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn panic_while_accepting_does_not_close_the_listener() {
        let starts = AtomicUsize::new(0);
        let accept = || async {
            assert!(starts.fetch_add(1, Relaxed) > 0, "the first run panics");
        };
        restart_after_panic(Kind::Outbound, accept).await;
        assert_eq!(starts.load(Relaxed), 2);
    }
}
