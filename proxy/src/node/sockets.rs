//! The sockets for a pod's upstream connections, opened in its namespace by the namespaces thread.
//!
//! Opening a socket takes a message to that thread and back. So that a connection does not wait for
//! it, sockets are opened in batches ahead of demand: the stock. Two connections in quick
//! succession start a stock. The batch grows and shrinks with the rate of connections. After a
//! second without a connection the stock is closed, so that an idle pod holds no socket.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use underpass_hbone::log_panic;
use underpass_interception::{
    Family, NamespaceAccess, ReadySocket, SocketKind, SocketRole, Sockets,
};

use crate::limits::{Descriptors, FdPermit};

/// The stock starts with two connections within this time, and is closed after this time without
/// one.
const IDLE_TIMEOUT: Duration = Duration::from_secs(1);
/// The size of the first batch.
const MIN_BATCH: usize = 4;
/// The maximum size of a batch, and so of the stock of one kind.
const MAX_BATCH: usize = 64;
/// A batch has at most this fraction of the file descriptors (one 32nd), so that connections keep
/// most of them.
const DESCRIPTORS_PER_STOCK_SOCKET: usize = 32;
/// A batch that is used up within this time is followed by one of twice its size.
const GROW_IF_USED_WITHIN: Duration = Duration::from_millis(50);

/// The sockets of one pod, shared by the workers.
#[derive(Debug)]
pub(crate) struct PodSockets {
    access: NamespaceAccess,
    sockets: Sockets,
    /// The limits that count the sockets of the stock. The stock shrinks when connections need
    /// descriptors.
    descriptors: Descriptors,
    /// The maximum size of a batch.
    max_batch: usize,
    /// One stock for each address family and role.
    stocks: [SharedStock; 6],
    closed: CancellationToken,
}

/// The stock of one address family and role.
#[derive(Debug, Default)]
struct SharedStock {
    stock: Mutex<Stock>,
    low: Notify,
}

#[derive(Debug, Default)]
struct Stock {
    /// The ready sockets, the oldest first.
    ready: VecDeque<(ReadySocket, FdPermit)>,
    /// The number of sockets that a refill opens.
    batch: usize,
    /// Whether a task refills the stock.
    has_refiller: bool,
    /// Whether that task has been asked to refill.
    refill_requested: bool,
    /// Whether a socket was taken since that task last checked.
    was_used: bool,
    /// The last time that a connection found the stock empty.
    missed: Option<Instant>,
}

/// The result of taking a socket from the stock.
enum TakenSocket {
    Ready(ReadySocket),
    Nothing {
        /// Whether the caller has to start the task that refills the stock.
        start_refiller: bool,
    },
}

impl PodSockets {
    pub(crate) fn new(
        access: NamespaceAccess,
        sockets: Sockets,
        descriptors: Descriptors,
    ) -> Arc<Self> {
        let max_batch = MAX_BATCH.min(descriptors.total() / DESCRIPTORS_PER_STOCK_SOCKET);
        let (stocks, closed) = (<[SharedStock; 6]>::default(), CancellationToken::new());
        Arc::new(Self { access, sockets, descriptors, max_batch, stocks, closed })
    }

    pub(crate) fn settings(&self) -> &Sockets {
        &self.sockets
    }

    /// Opens a connection to `destination`. The caller sets the timeout.
    ///
    /// # Errors
    ///
    /// The kernel rejected the connection, or the pod has been removed.
    pub(crate) async fn connect(
        self: &Arc<Self>,
        destination: SocketAddr,
    ) -> io::Result<TcpStream> {
        let socket = self.take(SocketKind::new(SocketRole::Upstream, destination)).await?;
        socket.connect(destination).await
    }

    /// Opens a connection to the workload at `destination` for `client`.
    ///
    /// # Errors
    ///
    /// As [`connect`](Self::connect).
    pub(crate) async fn connect_workload(
        self: &Arc<Self>,
        destination: SocketAddr,
        client: IpAddr,
    ) -> io::Result<TcpStream> {
        let socket = self.take(SocketKind::new(SocketRole::Workload, destination)).await?;
        self.sockets.bind_for(&socket, destination, client)?;
        socket.connect(destination).await
    }

    /// Opens a UDP socket for queries to a DNS server.
    ///
    /// # Errors
    ///
    /// As [`connect`](Self::connect).
    pub(crate) async fn connect_datagram(
        self: &Arc<Self>,
        server: SocketAddr,
    ) -> io::Result<UdpSocket> {
        let socket = self.take(SocketKind::new(SocketRole::NameServer, server)).await?;
        socket.connect_datagram(server)
    }

    /// Closes the stock. Later connections fail.
    pub(crate) fn close(&self) {
        self.closed.cancel();
        self.stocks.iter().for_each(SharedStock::clear);
    }

    /// Waits for the removal of the pod.
    pub(crate) async fn closed(&self) {
        self.closed.cancelled().await;
    }

    async fn take(self: &Arc<Self>, kind: SocketKind) -> io::Result<ReadySocket> {
        let shared = self.shared(kind);
        self.check_open()?;
        let start_refiller = match shared.take(self.max_batch) {
            TakenSocket::Ready(socket) => return Ok(socket),
            TakenSocket::Nothing { start_refiller } => start_refiller,
        };
        if start_refiller {
            let refiller = Refiller { sockets: self.clone(), kind };
            tokio::spawn(log_panic("stock of sockets", refiller.run()));
        }
        let opened = self.access.open_sockets(&self.sockets, kind, 1).await?;
        self.check_open()?;
        opened.into_iter().next().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn check_open(&self) -> io::Result<()> {
        if self.closed.is_cancelled() {
            return Err(io::Error::new(io::ErrorKind::NotConnected, "the pod has been removed"));
        }
        Ok(())
    }

    fn shared(&self, kind: SocketKind) -> &SharedStock {
        let [upstream_v4, upstream_v6, workload_v4, workload_v6, server_v4, server_v6] =
            &self.stocks;
        match (kind.role, kind.family) {
            (SocketRole::Upstream, Family::V4) => upstream_v4,
            (SocketRole::Upstream, Family::V6) => upstream_v6,
            (SocketRole::Workload, Family::V4) => workload_v4,
            (SocketRole::Workload, Family::V6) => workload_v6,
            (SocketRole::NameServer, Family::V4) => server_v4,
            (SocketRole::NameServer, Family::V6) => server_v6,
        }
    }
}

impl SharedStock {
    fn stock(&self) -> MutexGuard<'_, Stock> {
        // No code panics while it holds the lock.
        self.stock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, max_batch: usize) -> TakenSocket {
        let mut stock = self.stock();
        let ready = stock.ready.pop_front();
        stock.was_used = true;
        if stock.has_refiller && !stock.refill_requested && stock.ready.len() <= stock.batch / 2 {
            stock.refill_requested = true;
            self.low.notify_one();
        }
        let Some((socket, _permit)) = ready else {
            return TakenSocket::Nothing {
                start_refiller: max_batch >= MIN_BATCH && stock.record_miss(),
            };
        };
        TakenSocket::Ready(socket)
    }

    /// Closes the sockets of the stock.
    fn clear(&self) {
        let ready = std::mem::take(&mut self.stock().ready);
        drop(ready);
    }
}

impl Stock {
    /// Records a connection that found the stock empty. Returns whether to start a stock, because
    /// connections come in quick succession.
    fn record_miss(&mut self) -> bool {
        if self.has_refiller {
            return false;
        }
        let now = Instant::now();
        let last = self.missed.replace(now);
        self.has_refiller = last.is_some_and(|last| now.duration_since(last) < IDLE_TIMEOUT);
        if self.has_refiller {
            self.batch = MIN_BATCH;
        }
        self.has_refiller
    }
}

/// Refills the stock of one address family and role until it is idle.
struct Refiller {
    sockets: Arc<PodSockets>,
    kind: SocketKind,
}

impl Refiller {
    async fn run(self) {
        let closed = self.sockets.closed.clone();
        let refilling = async { while self.refill().await {} };
        tokio::select! {
            () = refilling => {}
            () = closed.cancelled() => {}
        }
    }

    /// Refills the stock and waits until it needs another refill; `false` once the stock is idle.
    async fn refill(&self) -> bool {
        let shared = self.sockets.shared(self.kind);
        self.fill(shared).await;
        let filled = Instant::now();
        let is_low = timeout(IDLE_TIMEOUT, shared.low.notified()).await.is_ok();
        let mut stock = shared.stock();
        if is_low && filled.elapsed() < GROW_IF_USED_WITHIN {
            stock.batch = (stock.batch * 2).min(self.sockets.max_batch);
        } else if !is_low {
            stock.batch = (stock.batch / 2).max(MIN_BATCH);
        }
        let surplus = stock.ready.len().saturating_sub(stock.batch);
        let closed: Vec<_> = stock.ready.drain(..surplus).collect();
        let is_in_use = is_low || std::mem::take(&mut stock.was_used);
        drop(stock);
        drop(closed);
        is_in_use
    }

    async fn fill(&self, shared: &SharedStock) {
        let PodSockets { access, sockets, descriptors, .. } = &*self.sockets;
        let wanted = {
            let stock = shared.stock();
            stock.batch.saturating_sub(stock.ready.len())
        };
        let permits: Vec<FdPermit> = (0..wanted).map_while(|_| descriptors.spare(1)).collect();
        let opened = match permits.len() {
            0 => Ok(Vec::new()),
            count => access.open_sockets(sockets, self.kind, count).await,
        };
        let mut stock = shared.stock();
        stock.refill_requested = false;
        match opened {
            Ok(opened) => stock.ready.extend(opened.into_iter().zip(permits)),
            // The connection that then opens a socket for itself reports the error.
            Err(error) => tracing::debug!(%error, "cannot open sockets ahead of demand"),
        }
    }
}

impl Drop for Refiller {
    /// Closes the stock, so that another refiller can start, also if the runtime drops the task.
    fn drop(&mut self) {
        let shared = self.sockets.shared(self.kind);
        let stock = std::mem::take(&mut *shared.stock());
        drop(stock);
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use tokio::time::sleep;
    use underpass_interception::{
        Entered, InterceptionError, PrivilegedOperations, Reply, ReplyFuture, Request,
    };

    use super::*;
    use crate::node::testing::settings;

    /// Performs operations in the current namespace, and counts the batches of sockets.
    #[derive(Debug, Default)]
    struct CountingNamespace {
        batches: Mutex<Vec<usize>>,
    }

    impl PrivilegedOperations for CountingNamespace {
        fn perform(&self, request: Request) -> ReplyFuture {
            let Request::OpenSockets { sockets, kind, count } = request else {
                let error = InterceptionError::UnexpectedReply(format!("{request:?}"));
                return Box::pin(async { Err(error) });
            };
            self.batches.lock().unwrap().push(count);
            let here = Entered::current().unwrap();
            let open = |_| sockets.open(&here, kind).unwrap();
            let opened = (0..count).map(open).collect();
            Box::pin(async { Ok(Reply::Sockets(opened)) })
        }
    }

    struct Scene {
        counting: Arc<CountingNamespace>,
        sockets: Arc<PodSockets>,
        descriptors: Descriptors,
        listener: TcpListener,
    }

    impl Scene {
        fn new(limit: usize) -> Self {
            let (counting, descriptors) = (Arc::default(), Descriptors::new(limit, 0, 0));
            let settings = settings(&["interception.profile=none"]);
            let sockets = Sockets::new(&settings.interception, false);
            let access = NamespaceAccess::through(Arc::clone(&counting) as Arc<_>);
            Self {
                counting,
                sockets: PodSockets::new(access, sockets, descriptors.clone()),
                descriptors,
                listener: TcpListener::bind("127.0.0.1:0").unwrap(),
            }
        }

        async fn connect(&self) -> TcpStream {
            let to = self.listener.local_addr().unwrap();
            let connected = self.sockets.connect(to).await.unwrap();
            self.listener.accept().unwrap();
            connected
        }

        fn batches(&self) -> Vec<usize> {
            self.counting.batches.lock().unwrap().clone()
        }

        fn ready(&self) -> usize {
            self.sockets.stocks.iter().map(|shared| shared.stock().ready.len()).sum()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn infrequent_connections_open_one_socket_each() {
        let scene = Scene::new(10_000);
        for _ in 0..3 {
            scene.connect().await;
            sleep(IDLE_TIMEOUT).await;
        }
        assert_eq!((scene.batches(), scene.ready()), (vec![1; 3], 0));
    }

    #[tokio::test(start_paused = true)]
    async fn frequent_connections_open_sockets_in_batches() {
        let scene = Scene::new(10_000);
        for _ in 0..1000 {
            scene.connect().await;
            // Lets the refilling task run.
            sleep(Duration::from_millis(1)).await;
        }
        let batches = scene.batches();
        assert!(batches.len() < 50, "few batches for many connections: {batches:?}");
        assert!(scene.ready() <= MAX_BATCH, "{}", scene.ready());
        assert_eq!(batches.iter().filter(|batch| **batch == 1).count(), 2, "{batches:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn idle_pod_closes_its_stock_of_sockets() {
        let scene = Scene::new(10_000);
        scene.connect().await;
        scene.connect().await;
        tokio::task::yield_now().await;
        assert_eq!(scene.ready(), MIN_BATCH);
        sleep(IDLE_TIMEOUT * 3).await;
        assert_eq!(scene.ready(), 0);
        assert_eq!(Arc::strong_count(&scene.sockets), 1, "no task is left");
        // The next connections start a new stock.
        scene.connect().await;
        scene.connect().await;
        tokio::task::yield_now().await;
        assert_eq!(scene.ready(), MIN_BATCH);
    }

    #[tokio::test(start_paused = true)]
    async fn socket_stock_leaves_descriptors_to_connections() {
        let scene = Scene::new(1000);
        let mut open = Vec::new();
        while let Some(held) = scene.descriptors.spare(1) {
            open.push(held);
        }
        for _ in 0..10 {
            scene.connect().await;
            sleep(Duration::from_millis(1)).await;
        }
        assert_eq!((scene.batches(), scene.ready()), (vec![1; 10], 0));
        open.pop();
        scene.connect().await;
        sleep(Duration::from_millis(1)).await;
        assert_eq!(scene.ready(), 1, "one descriptor is free");
        assert!(scene.descriptors.spare(1).is_none(), "the stock holds it");
    }

    #[tokio::test(start_paused = true)]
    async fn socket_stock_stays_empty_if_descriptors_are_few() {
        let scene = Scene::new(100);
        for _ in 0..10 {
            scene.connect().await;
            sleep(Duration::from_millis(1)).await;
        }
        assert_eq!((scene.batches(), scene.ready()), (vec![1; 10], 0));
    }

    #[tokio::test(start_paused = true)]
    async fn closed_socket_stock_is_empty_and_opens_no_sockets() {
        let scene = Scene::new(10_000);
        scene.connect().await;
        scene.connect().await;
        tokio::task::yield_now().await;
        assert_eq!(scene.ready(), MIN_BATCH);
        scene.sockets.close();
        let to = scene.listener.local_addr().unwrap();
        let refused = scene.sockets.connect(to).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::NotConnected);
        tokio::task::yield_now().await;
        assert_eq!(scene.ready(), 0);
        assert_eq!(Arc::strong_count(&scene.sockets), 1, "no task is left");
    }
}
