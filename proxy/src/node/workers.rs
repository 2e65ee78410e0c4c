//! Starts the worker threads; distributes and closes listeners and tunnels of pods.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use futures_util::future::join_all;
use thiserror::Error;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use underpass_interception::{BoundListener, KeptCapabilities, confine_thread};

use crate::dns::service::DnsService;
use crate::mesh::publish;
use crate::mesh::publish::Reports;
use crate::node::Node;
use crate::node::assignment::WorkerCommand;
use crate::node::commands;
use crate::node::inspection::Inspection;
use crate::node::pod::{Pod, PodId};
use crate::node::worker::Worker;
use crate::process::supervise::Supervisor;
use crate::traffic::listeners::{DnsKind, Kind, Listeners};

/// The capacity of a worker's command queue. If it is full, the worker that accepts a connection
/// serves it.
const COMMAND_QUEUE: usize = 1024;

/// Timeout for closing the tunnels of a removed pod.
const TUNNEL_CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Timeout for the answer of a worker to an inspection.
pub(crate) const INSPECTION_TIMEOUT: Duration = Duration::from_secs(2);

/// Timeout for closing the listeners of a pod: an unresponsive worker must not delay the drain.
const LISTENER_CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Timeout for the answer of a worker that does not hang. A busy one answers within milliseconds.
const PING_TIMEOUT: Duration = Duration::from_secs(8);

/// A worker does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("worker-{worker} does not answer within {} s", PING_TIMEOUT.as_secs())]
pub(crate) struct WorkerHangs {
    worker: usize,
}

/// The running workers. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Workers {
    node: Arc<Node>,
    commands: Arc<[mpsc::Sender<WorkerCommand>]>,
    /// The worker that gets the next listener.
    turn: Arc<AtomicUsize>,
}

/// The handles of the worker threads, to wait for their end.
#[derive(Debug)]
pub(crate) struct WorkerThreads(Vec<WorkerThread>);

#[derive(Debug)]
struct WorkerThread {
    handle: JoinHandle<()>,
    /// Closed when the thread ends, also after a panic.
    end: oneshot::Receiver<Infallible>,
}

impl WorkerThread {
    /// Waits for the end of the thread. A helper thread for this could fail to start.
    async fn join(self) {
        self.end.await.ok();
        // The supervisor already has a report of a panic.
        self.handle.join().ok();
    }
}

impl Workers {
    /// Starts `count` workers without listeners and without capabilities. They report the mesh
    /// generations that they have applied, and report panics to `supervisor`.
    ///
    /// # Errors
    ///
    /// A thread or its runtime cannot be created.
    pub(crate) fn start(
        node: &Arc<Node>,
        count: usize,
        supervisor: &Supervisor,
    ) -> io::Result<(Self, WorkerThreads, Reports)> {
        let (senders, receivers): (Vec<_>, Vec<_>) =
            (0..count).map(|_| mpsc::channel(COMMAND_QUEUE)).unzip();
        let commands: Arc<[mpsc::Sender<WorkerCommand>]> = senders.into();
        let (reporters, reports) = publish::reports(count);
        let start_one = |(index, (receiver, reporter))| {
            let worker = Worker::new(node.clone(), index, commands.clone());
            let supervised = supervisor.clone();
            let series = node.series.clone();
            let task = move || {
                series.runtimes.include(index, &Handle::current());
                commands::execute(worker, receiver, reporter, supervised)
            };
            start_thread(index, supervisor.clone(), task)
        };
        let started = receivers.into_iter().zip(reporters).enumerate().map(start_one);
        let threads = started.collect::<io::Result<_>>().map(WorkerThreads)?;
        Ok((Self { node: node.clone(), commands, turn: Arc::default() }, threads, reports))
    }

    /// Distributes the listeners of `pod` to the workers in turn, and returns when they accept.
    /// From then on the node serves the pod.
    ///
    /// # Errors
    ///
    /// A worker has ended, or cannot register a listener.
    pub(crate) async fn add_listeners(
        &self,
        pod: &Arc<Pod>,
        listeners: impl IntoIterator<Item = (Kind, BoundListener)>,
    ) -> io::Result<()> {
        self.node.pods.add(pod);
        for (kind, listener) in listeners {
            let pod = pod.clone();
            self.command(|added| WorkerCommand::AddListener { pod, kind, listener, added }).await?;
        }
        Ok(())
    }

    /// Gives the DNS proxy of `pod` to a worker, and returns when it receives queries.
    ///
    /// # Errors
    ///
    /// As [`add_listeners`](Self::add_listeners).
    pub(crate) async fn add_dns(
        &self,
        pod: &Arc<Pod>,
        service: Arc<DnsService>,
        listeners: Listeners<DnsKind>,
    ) -> io::Result<()> {
        let pod = pod.clone();
        self.command(|added| WorkerCommand::AddDns { pod, service, listeners, added }).await
    }

    /// Sends a command to the worker whose turn it is, and returns its result.
    async fn command(
        &self,
        command: impl FnOnce(oneshot::Sender<io::Result<()>>) -> WorkerCommand,
    ) -> io::Result<()> {
        let turn = self.turn.fetch_add(1, Relaxed) % self.commands.len().max(1);
        let (added, result) = oneshot::channel();
        let sent = match self.commands.get(turn) {
            Some(worker) => worker.send(command(added)).await.is_ok(),
            None => false,
        };
        let ended = || Err(io::Error::other("the worker of a listener has ended"));
        if sent { result.await.unwrap_or_else(|_| ended()) } else { ended() }
    }

    /// Closes the listeners of `pod` on every worker, and returns when they are closed. Open
    /// connections continue.
    pub(crate) async fn remove_listeners(&self, pod: PodId) {
        self.node.pods.remove(pod);
        let remove = async {
            for worker in &*self.commands {
                let (removed, confirmed) = oneshot::channel();
                // A worker that has ended has no listener.
                if worker.send(WorkerCommand::RemoveListeners { pod, removed }).await.is_ok() {
                    confirmed.await.ok();
                }
            }
        };
        timeout(LISTENER_CLOSE_TIMEOUT, remove).await.ok();
    }

    /// Inspects every worker. `None` for a worker that does not answer within
    /// [`INSPECTION_TIMEOUT`].
    pub(crate) async fn inspect<T>(
        &self,
        inspection: impl Fn(oneshot::Sender<T>) -> Inspection,
    ) -> Vec<Option<T>> {
        self.inspect_within(INSPECTION_TIMEOUT, inspection).await
    }

    /// Waits until every worker has answered, at most for [`PING_TIMEOUT`].
    ///
    /// # Errors
    ///
    /// A worker hangs or has ended.
    pub(crate) async fn ping(&self) -> Result<(), WorkerHangs> {
        let answers = self.inspect_within(PING_TIMEOUT, Inspection::Ping).await;
        match answers.iter().position(Option::is_none) {
            Some(worker) => Err(WorkerHangs { worker }),
            None => Ok(()),
        }
    }

    async fn inspect_within<T>(
        &self,
        limit: Duration,
        inspection: impl Fn(oneshot::Sender<T>) -> Inspection,
    ) -> Vec<Option<T>> {
        let inspect = |worker: &mpsc::Sender<WorkerCommand>| {
            let (sender, answer) = oneshot::channel();
            let (worker, command) = (worker.clone(), WorkerCommand::Inspect(inspection(sender)));
            let asking = async move {
                worker.send(command).await.ok()?;
                answer.await.ok()
            };
            async move { timeout(limit, asking).await.ok().flatten() }
        };
        join_all(self.commands.iter().map(inspect)).await
    }

    /// Closes the tunnels that a pod has opened, each when its last stream ends. Later connections
    /// open new ones.
    pub(crate) async fn renew_tunnels(&self, pod: PodId) {
        let requests = self.commands.iter().map(|worker| async move {
            // A worker that has ended has no tunnel.
            worker.send(WorkerCommand::CloseTunnels(pod)).await.ok();
        });
        timeout(TUNNEL_CLOSE_TIMEOUT, join_all(requests)).await.ok();
    }

    /// Closes the tunnels that a pod has opened, each when its last stream ends. Waits at most for
    /// [`TUNNEL_CLOSE_TIMEOUT`].
    pub(crate) async fn close_tunnels(&self, pod: &Pod) {
        pod.seats.close();
        let id = pod.id;
        let requests = self.commands.iter().map(|worker| async move {
            // A worker that has ended has no tunnel.
            worker.send(WorkerCommand::CloseTunnels(id)).await.ok();
        });
        let close = async {
            join_all(requests).await;
            pod.seats.wait().await;
        };
        if timeout(TUNNEL_CLOSE_TIMEOUT, close).await.is_err() {
            tracing::warn!(seats = pod.seats.len(), "tunnels of a removed pod are still open");
        }
    }
}

impl WorkerThreads {
    /// Waits for the end of all threads, which end when the drain has ended.
    pub(crate) async fn join(self) {
        join_all(self.0.into_iter().map(WorkerThread::join)).await;
    }
}

/// Starts a thread that runs the task on a new runtime and ends with it. A runtime must be dropped
/// on the thread that created it, so the new thread creates it and reports an error.
fn start_thread<F: Future<Output = ()>>(
    index: usize,
    supervisor: Supervisor,
    task: impl FnOnce() -> F + Send + 'static,
) -> io::Result<WorkerThread> {
    let (alive, end) = oneshot::channel();
    let (created, creation) = std::sync::mpsc::sync_channel(1);
    let name = format!("worker-{index}");
    let thread = std::thread::Builder::new().name(name.clone());
    let body = move || {
        let _alive = alive;
        if let Err(error) = confine_thread(KeptCapabilities::Nothing) {
            tracing::warn!(%error, "a worker keeps capabilities that it does not need");
        }
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                created.send(Err(error)).ok();
                return;
            }
        };
        created.send(Ok(())).ok();
        supervisor.essential_thread(name, || runtime.block_on(async { task().await }));
    };
    let handle = thread.spawn(body)?;
    creation.recv().unwrap_or_else(|_| Err(io::Error::other("a worker ended at once")))?;
    Ok(WorkerThread { handle, end })
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::io::AsyncReadExt as _;
    use tokio::net::TcpStream;
    use underpass_interception::{Entered, ListenerRequest, ListenerTransport};

    use super::*;
    use crate::node::testing::{node, pod};
    use crate::traffic::listeners::ListenerKind as _;

    fn listener(pod: &Pod) -> (BoundListener, SocketAddr) {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let kind = Kind::Plaintext;
        let request = ListenerRequest {
            address: any,
            transport: ListenerTransport::Stream,
            may_be_absent: false,
            accepted: kind.accepted(),
            purpose: "a test",
            setting: "none",
        };
        let here = Entered::current().unwrap();
        let bound = pod.sockets.settings().listen(&here, request).unwrap();
        let address = bound.local_addr().unwrap();
        (bound, address)
    }

    /// Whether the connection was accepted. The proxy accepts and then resets it, because no rule
    /// captured it.
    async fn is_served(address: SocketAddr) -> bool {
        match TcpStream::connect(address).await {
            Ok(mut client) => client.read_u8().await.is_err(),
            // The reset may arrive before the client reads.
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }

    #[tokio::test]
    async fn listeners_are_added_and_removed_while_another_pod_is_served() {
        let node = node(2);
        let (workers, threads, _reports) = Workers::start(&node, 2, &Supervisor::new().0).unwrap();
        let [first, second] =
            [pod(&["interception.profile=none"]), pod(&["interception.profile=none"])];
        let (kept, kept_at) = listener(&first);
        workers.add_listeners(&first, [(Kind::Plaintext, kept)]).await.unwrap();
        assert!(is_served(kept_at).await);

        let (one, one_at) = listener(&second);
        let (two, two_at) = listener(&second);
        let both = [(Kind::Plaintext, one), (Kind::Outbound, two)];
        workers.add_listeners(&second, both).await.unwrap();
        assert!(is_served(one_at).await && is_served(two_at).await && is_served(kept_at).await);

        workers.remove_listeners(second.id).await;
        assert!(!is_served(one_at).await && !is_served(two_at).await);
        assert!(is_served(kept_at).await, "the other pod's listener stays");
        workers.remove_listeners(second.id).await;

        node.drain.close();
        node.drain.end();
        threads.join().await;
        assert_eq!(Arc::strong_count(&second), 1, "workers keep nothing of a removed pod");
    }

    #[tokio::test]
    async fn blocked_worker_does_not_answer_and_others_do() {
        let node = node(2);
        let (workers, threads, _reports) = Workers::start(&node, 2, &Supervisor::new().0).unwrap();
        assert_eq!(workers.inspect(Inspection::Ping).await, [Some(()), Some(())]);
        // Nothing receives from the queue of the second worker.
        let (stuck, _receiver) = mpsc::channel(1);
        let one = workers.commands[0].clone();
        let commands = Arc::new([one, stuck]);
        let workers = Workers { commands, ..workers };
        assert_eq!(workers.inspect(Inspection::Ping).await, [Some(()), None]);
        node.drain.close();
        node.drain.end();
        threads.join().await;
    }

    #[tokio::test]
    async fn running_workers_answer() {
        let node = node(2);
        let (workers, threads, _reports) = Workers::start(&node, 2, &Supervisor::new().0).unwrap();
        workers.ping().await.unwrap();
        node.drain.close();
        node.drain.end();
        threads.join().await;
        assert_eq!(workers.ping().await, Err(WorkerHangs { worker: 0 }), "they have ended");
    }

    #[tokio::test(start_paused = true)]
    async fn worker_that_does_not_answer_is_named() {
        let (hanging, _queue) = mpsc::channel(1);
        let workers = Workers { node: node(1), commands: [hanging].into(), turn: Arc::default() };
        let error = workers.ping().await.unwrap_err();
        assert_eq!(error.to_string(), "worker-0 does not answer within 8 s");
    }

    #[tokio::test]
    async fn panicking_worker_is_reported_and_gets_no_more_listeners() {
        let (supervisor, mut failures) = Supervisor::new();
        let thread = start_thread(3, supervisor, || async { panic!("of a worker") }).unwrap();
        assert_eq!(failures.next().await.to_string(), "worker-3 panicked: of a worker");
        thread.join().await;

        let (ended, _) = mpsc::channel(1);
        let (node, commands) = (node(1), Arc::new([ended]));
        let workers = Workers { node, commands, turn: Arc::default() };
        let pod = pod(&["interception.profile=none"]);
        let refused = workers.add_listeners(&pod, [(Kind::Plaintext, listener(&pod).0)]).await;
        assert_eq!(refused.unwrap_err().to_string(), "the worker of a listener has ended");
    }
}
