//! The sockets that a pod connects with, opened in its namespace by the namespaces thread.
//!
//! Opening a socket takes a hop to that thread. So that a connection does not pay for it, sockets
//! are opened in batches ahead of demand: the stock. Only connections in quick succession make one.
//! A batch grows with the rate of connections, shrinks with it, and is closed after a second
//! without any: a pod at rest holds no socket.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use underpass_hbone::log_panic;
use underpass_interception::{
    Family, NamespaceAccess, ReadySocket, SocketKind, SocketRole, Sockets,
};

use crate::limits::{Descriptors, FdPermit};

/// The stock is closed after this time without a connection, and begins with two connections within
/// it.
const IDLE: Duration = Duration::from_secs(1);
/// The size of the first batch.
const SMALLEST: usize = 4;
/// The largest batch, and so the most that a pod has of one kind.
const LARGEST: usize = 64;
/// A batch is at most this part of all descriptors: with few of them, connections need them more.
const PART_OF_DESCRIPTORS: usize = 32;
/// A batch that lasts for less than this is followed by one of twice its size.
const GROW_WITHIN: Duration = Duration::from_millis(50);

/// The sockets of one pod. Workers share it.
#[derive(Debug)]
pub(crate) struct PodSockets {
    access: NamespaceAccess,
    sockets: Sockets,
    /// Sockets of the stock count, as long as connections leave plenty.
    descriptors: Descriptors,
    /// The largest batch.
    largest: usize,
    /// One for each family and role.
    stocks: [SharedStock; 4],
    closed: CancellationToken,
}

/// The stock of one kind.
#[derive(Debug, Default)]
struct SharedStock {
    stock: Mutex<Stock>,
    low: Notify,
}

#[derive(Debug, Default)]
struct Stock {
    /// The oldest first.
    ready: VecDeque<(ReadySocket, FdPermit)>,
    /// The number of sockets after a refill.
    batch: usize,
    /// Whether a task refills it.
    kept: bool,
    /// Whether the task has been notified to refill.
    refill_requested: bool,
    /// Whether a socket was taken since that task looked.
    taken: bool,
    /// When a connection last found the stock empty.
    missed: Option<Instant>,
}

/// The result of taking a socket from the stock.
enum Found {
    Ready(ReadySocket),
    Nothing {
        /// Whether the caller has to start the task that refills the stock.
        keep: bool,
    },
}

impl PodSockets {
    pub(crate) fn new(
        access: NamespaceAccess,
        sockets: Sockets,
        descriptors: Descriptors,
    ) -> Arc<Self> {
        let largest = LARGEST.min(descriptors.total() / PART_OF_DESCRIPTORS);
        let (stocks, closed) = (<[SharedStock; 4]>::default(), CancellationToken::new());
        Arc::new(Self { access, sockets, descriptors, largest, stocks, closed })
    }

    /// The options of the sockets.
    pub(crate) fn settings(&self) -> &Sockets {
        &self.sockets
    }

    /// Opens a connection to `destination`. The caller sets the timeout.
    ///
    /// # Errors
    ///
    /// The kernel's, and that the pod has been removed.
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

    /// Closes the stock; no socket is opened any more.
    pub(crate) fn close(&self) {
        self.closed.cancel();
        self.stocks.iter().for_each(SharedStock::clear);
    }

    /// Ends when the pod is removed.
    pub(crate) async fn closed(&self) {
        self.closed.cancelled().await;
    }

    async fn take(self: &Arc<Self>, kind: SocketKind) -> io::Result<ReadySocket> {
        let shared = self.shared(kind);
        self.check_open()?;
        let keep = match shared.take(self.largest) {
            Found::Ready(socket) => return Ok(socket),
            Found::Nothing { keep } => keep,
        };
        if keep {
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
        let [upstream_v4, upstream_v6, workload_v4, workload_v6] = &self.stocks;
        match (kind.role, kind.family) {
            (SocketRole::Upstream, Family::V4) => upstream_v4,
            (SocketRole::Upstream, Family::V6) => upstream_v6,
            (SocketRole::Workload, Family::V4) => workload_v4,
            (SocketRole::Workload, Family::V6) => workload_v6,
        }
    }
}

impl SharedStock {
    fn stock(&self) -> MutexGuard<'_, Stock> {
        // No code panics while it holds the lock.
        self.stock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, largest: usize) -> Found {
        let mut stock = self.stock();
        let ready = stock.ready.pop_front();
        stock.taken = true;
        if stock.kept && !stock.refill_requested && stock.ready.len() <= stock.batch / 2 {
            stock.refill_requested = true;
            self.low.notify_one();
        }
        let Some((socket, _held)) = ready else {
            return Found::Nothing { keep: largest >= SMALLEST && stock.record_miss() };
        };
        Found::Ready(socket)
    }

    /// Closes the stock.
    fn clear(&self) {
        let ready = std::mem::take(&mut self.stock().ready);
        drop(ready);
    }
}

impl Stock {
    /// Whether to begin a stock, since connections come in quick succession.
    fn record_miss(&mut self) -> bool {
        if self.kept {
            return false;
        }
        let now = Instant::now();
        let last = self.missed.replace(now);
        self.kept = last.is_some_and(|last| now.duration_since(last) < IDLE);
        if self.kept {
            self.batch = SMALLEST;
        }
        self.kept
    }
}

/// Refills the stock of one kind until it has been idle.
struct Refiller {
    sockets: Arc<PodSockets>,
    kind: SocketKind,
}

impl Refiller {
    async fn run(self) {
        let closed = self.sockets.closed.clone();
        let keep = async { while self.refill().await {} };
        tokio::select! {
            () = keep => {}
            () = closed.cancelled() => {}
        }
    }

    /// Refills the stock and waits until it needs another refill; `false` when it has been idle.
    async fn refill(&self) -> bool {
        let shared = self.sockets.shared(self.kind);
        self.fill(shared).await;
        let filled = Instant::now();
        let is_low = timeout(IDLE, shared.low.notified()).await.is_ok();
        let mut stock = shared.stock();
        if is_low && filled.elapsed() < GROW_WITHIN {
            stock.batch = (stock.batch * 2).min(self.sockets.largest);
        } else if !is_low {
            stock.batch = (stock.batch / 2).max(SMALLEST);
        }
        let surplus = stock.ready.len().saturating_sub(stock.batch);
        let closed: Vec<_> = stock.ready.drain(..surplus).collect();
        let goes_on = is_low || std::mem::take(&mut stock.taken);
        drop(stock);
        drop(closed);
        goes_on
    }

    async fn fill(&self, shared: &SharedStock) {
        let PodSockets { access, sockets, descriptors, .. } = &*self.sockets;
        let wanted = {
            let stock = shared.stock();
            stock.batch.saturating_sub(stock.ready.len())
        };
        let held: Vec<FdPermit> = (0..wanted).map_while(|_| descriptors.spare(1)).collect();
        let opened = match held.len() {
            0 => Ok(Vec::new()),
            count => access.open_sockets(sockets, self.kind, count).await,
        };
        let mut stock = shared.stock();
        stock.refill_requested = false;
        match opened {
            Ok(opened) => stock.ready.extend(opened.into_iter().zip(held)),
            // The connection that opens a socket for itself reports it.
            Err(error) => tracing::debug!(%error, "no sockets can be opened ahead of demand"),
        }
    }
}

impl Drop for Refiller {
    /// Allows another refiller, also when the runtime drops the task.
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
    struct Counting {
        batches: Mutex<Vec<usize>>,
    }

    impl PrivilegedOperations for Counting {
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
        counting: Arc<Counting>,
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
    async fn opens_one_socket_for_each_of_rare_connections() {
        let scene = Scene::new(10_000);
        for _ in 0..3 {
            scene.connect().await;
            sleep(IDLE).await;
        }
        assert_eq!((scene.batches(), scene.ready()), (vec![1; 3], 0));
    }

    #[tokio::test(start_paused = true)]
    async fn opens_batches_ahead_of_connections_in_quick_succession() {
        let scene = Scene::new(10_000);
        for _ in 0..1000 {
            scene.connect().await;
            // Let the refilling task run.
            sleep(Duration::from_millis(1)).await;
        }
        let batches = scene.batches();
        assert!(batches.len() < 50, "few hops for many connections: {batches:?}");
        assert!(scene.ready() <= LARGEST, "{}", scene.ready());
        assert_eq!(batches.iter().filter(|batch| **batch == 1).count(), 2, "{batches:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn closes_stock_when_idle() {
        let scene = Scene::new(10_000);
        scene.connect().await;
        scene.connect().await;
        tokio::task::yield_now().await;
        assert_eq!(scene.ready(), SMALLEST);
        sleep(IDLE * 3).await;
        assert_eq!(scene.ready(), 0);
        assert_eq!(Arc::strong_count(&scene.sockets), 1, "no task is left");
        // The next connections open a new stock.
        scene.connect().await;
        scene.connect().await;
        tokio::task::yield_now().await;
        assert_eq!(scene.ready(), SMALLEST);
    }

    #[tokio::test(start_paused = true)]
    async fn stock_leaves_descriptors_to_connections() {
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
    async fn stock_is_empty_if_descriptors_are_few() {
        let scene = Scene::new(100);
        for _ in 0..10 {
            scene.connect().await;
            sleep(Duration::from_millis(1)).await;
        }
        assert_eq!((scene.batches(), scene.ready()), (vec![1; 10], 0));
    }

    #[tokio::test(start_paused = true)]
    async fn closed_stock_holds_nothing_and_opens_nothing() {
        let scene = Scene::new(10_000);
        scene.connect().await;
        scene.connect().await;
        tokio::task::yield_now().await;
        assert_eq!(scene.ready(), SMALLEST);
        scene.sockets.close();
        let to = scene.listener.local_addr().unwrap();
        let refused = scene.sockets.connect(to).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::NotConnected);
        tokio::task::yield_now().await;
        assert_eq!(scene.ready(), 0);
        assert_eq!(Arc::strong_count(&scene.sockets), 1, "no task is left");
    }
}
