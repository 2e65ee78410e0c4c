//! Starts the worker threads, and distributes and removes the listeners of pods.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use underpass_interception::{BoundListener, Kept, confine_thread};

use crate::error::ProxyError;
use crate::mesh::publish;
use crate::mesh::publish::Reports;
use crate::node::Node;
use crate::node::assignment::WorkerCommand;
use crate::node::commands;
use crate::node::pod::{Pod, PodId};
use crate::node::worker::Worker;
use crate::traffic::listeners::Kind;

/// The capacity of a worker's command queue. If it is full, the worker that accepts a connection
/// serves it.
const COMMAND_QUEUE: usize = 1024;

/// Timeout for closing the tunnels of a removed pod.
const TUNNELS_CLOSE: Duration = Duration::from_secs(2);

/// The running workers.
#[derive(Debug)]
pub(crate) struct Workers {
    threads: Vec<WorkerThread>,
    commands: Arc<[mpsc::Sender<WorkerCommand>]>,
    /// The worker that gets the next listener.
    turn: AtomicUsize,
}

/// The thread of one worker.
#[derive(Debug)]
struct WorkerThread {
    handle: JoinHandle<()>,
    /// Closed when the thread ends, also after a panic.
    end: oneshot::Receiver<Infallible>,
}

impl WorkerThread {
    /// Waits for the end of the thread without a helper thread, which could fail to start.
    async fn join(self) {
        self.end.await.ok();
        if self.handle.join().is_err() {
            tracing::error!("a worker panicked");
        }
    }
}

impl Workers {
    /// Starts `count` workers without listeners and without capabilities. They report the mesh
    /// generations that they have applied.
    ///
    /// # Errors
    ///
    /// A thread or its runtime cannot be made.
    pub(crate) fn start(node: &Arc<Node>, count: usize) -> io::Result<(Self, Reports)> {
        let (senders, receivers): (Vec<_>, Vec<_>) =
            (0..count).map(|_| mpsc::channel(COMMAND_QUEUE)).unzip();
        let commands: Arc<[mpsc::Sender<WorkerCommand>]> = senders.into();
        let (reporters, reports) = publish::reports(count);
        let start_one = |(index, (receiver, reporter))| {
            let worker = Worker::new(node.clone(), index, commands.clone());
            start_thread(index, move || commands::execute(worker, receiver, reporter))
        };
        let started = receivers.into_iter().zip(reporters).enumerate().map(start_one);
        let threads = started.collect::<io::Result<_>>()?;
        Ok((Self { threads, commands, turn: AtomicUsize::new(0) }, reports))
    }

    /// Deals the listeners of `pod` to the workers in turn.
    pub(crate) async fn add_listeners(
        &self,
        pod: &Arc<Pod>,
        listeners: impl IntoIterator<Item = (Kind, BoundListener)>,
    ) {
        for (kind, listener) in listeners {
            let turn = self.turn.fetch_add(1, Relaxed) % self.commands.len().max(1);
            let Some(worker) = self.commands.get(turn) else { return };
            let command = WorkerCommand::AddListener { pod: pod.clone(), kind, listener };
            if worker.send(command).await.is_err() {
                tracing::error!(listener = kind.name(), "the worker of a listener has ended");
            }
        }
    }

    /// Closes the listeners of `pod` at every worker, and returns when they are closed. Its open
    /// connections go on.
    pub(crate) async fn remove_listeners(&self, pod: PodId) {
        for worker in &*self.commands {
            let (removed, confirmed) = oneshot::channel();
            // A worker that has ended has no listener.
            if worker.send(WorkerCommand::RemoveListeners { pod, removed }).await.is_ok() {
                confirmed.await.ok();
            }
        }
    }

    /// Removes a pod: closes its listeners, waits up to `deadline` for its connections and
    /// terminates the rest, and closes its tunnels and sockets. Returns how many connections were
    /// terminated.
    pub(crate) async fn remove_pod(&self, pod: &Pod, deadline: Duration) -> usize {
        self.remove_listeners(pod.id).await;
        pod.closing.cancel();
        let connections = &pod.connections;
        let terminated = match timeout(deadline, connections.all_ended()).await {
            Ok(()) => 0,
            Err(_) => connections.open(),
        };
        connections.close(|| ProxyError::Drained).await;
        pod.sockets.close();
        self.close_tunnels(pod).await;
        terminated
    }

    /// Closes the tunnels that a pod has opened; waits at most [`TUNNELS_CLOSE`].
    async fn close_tunnels(&self, pod: &Pod) {
        for worker in &*self.commands {
            // A worker that has ended has no tunnel.
            worker.send(WorkerCommand::CloseTunnels(pod.id)).await.ok();
        }
        pod.seats.close();
        if timeout(TUNNELS_CLOSE, pod.seats.wait()).await.is_err() {
            tracing::warn!(seats = pod.seats.len(), "a removed pod still has tunnels");
        }
    }

    /// Waits for the end of all threads.
    pub(crate) async fn join(self) {
        futures_util::future::join_all(self.threads.into_iter().map(WorkerThread::join)).await;
    }
}

/// Starts a thread that runs the task on a new runtime and ends with it. The runtime is made on the
/// new thread, because it must be dropped there; a failure to make it is returned.
fn start_thread<F: Future<Output = ()>>(
    index: usize,
    task: impl FnOnce() -> F + Send + 'static,
) -> io::Result<WorkerThread> {
    let (alive, end) = oneshot::channel();
    let (made, made_or_not) = std::sync::mpsc::sync_channel(1);
    let body = move || {
        let _alive = alive;
        if let Err(error) = confine_thread(Kept::Nothing) {
            tracing::warn!(%error, "a worker keeps capabilities that it does not need");
        }
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                made.send(Err(error)).ok();
                return;
            }
        };
        made.send(Ok(())).ok();
        runtime.block_on(task());
    };
    let handle = std::thread::Builder::new().name(format!("worker-{index}")).spawn(body)?;
    made_or_not.recv().unwrap_or_else(|_| Err(io::Error::other("a worker ended at once")))?;
    Ok(WorkerThread { handle, end })
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::io::AsyncReadExt as _;
    use tokio::net::TcpStream;
    use underpass_interception::{Entered, ListenerRequest};

    use super::*;
    use crate::node::testing::{node, pod};

    fn listener(pod: &Pod) -> (BoundListener, SocketAddr) {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let kind = Kind::Plaintext;
        let request = ListenerRequest {
            address: any,
            closing: kind.closing(),
            purpose: "a test",
            setting: "none",
        };
        let here = Entered::current().unwrap();
        let bound = pod.sockets.settings().listen(&here, request).unwrap();
        let address = bound.local_addr().unwrap();
        (bound, address)
    }

    /// Whether a connection was accepted. It was not intercepted, so the proxy then resets it.
    async fn is_served(address: SocketAddr) -> bool {
        match TcpStream::connect(address).await {
            Ok(mut client) => client.read_u8().await.is_err(),
            // The reset may arrive before the client reads.
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }

    #[tokio::test]
    async fn adds_and_removes_listeners_while_other_pod_is_served() {
        let node = node(2);
        let (workers, _reports) = Workers::start(&node, 2).unwrap();
        let [first, second] =
            [pod(&["interception.profile=none"]), pod(&["interception.profile=none"])];
        let (kept, kept_at) = listener(&first);
        workers.add_listeners(&first, [(Kind::Plaintext, kept)]).await;
        assert!(is_served(kept_at).await);

        let (one, one_at) = listener(&second);
        let (two, two_at) = listener(&second);
        workers.add_listeners(&second, [(Kind::Plaintext, one), (Kind::Outbound, two)]).await;
        assert!(is_served(one_at).await && is_served(two_at).await && is_served(kept_at).await);

        workers.remove_listeners(second.id).await;
        assert!(!is_served(one_at).await && !is_served(two_at).await);
        assert!(is_served(kept_at).await, "the other pod's listener stays");
        workers.remove_listeners(second.id).await;

        node.drain.drain(&second.connections, Duration::ZERO).await;
        workers.join().await;
        assert_eq!(Arc::strong_count(&second), 1, "workers keep nothing of a removed pod");
    }
}
