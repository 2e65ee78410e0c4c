//! The registry of the open connections of a pod on a worker: it counts them and terminates them.
//!
//! A connection is registered once, when it is accepted; so is every tunnel and every stream of a
//! tunnel. Policy, the drain deadline and the removal of the pod terminate connections here and
//! nowhere else, also those that are still connecting.
//!
//! ```text
//! open ── terminate() ──> terminated ── Terminated::end() ──> woken ──> ended
//!                         moves no byte any longer            closes its sockets, is logged
//! ```
//!
//! `terminate` only marks connections, which is fast; `end` wakes them a few at a time, because
//! closing their sockets is not. `policy.rs` decides which connections are allowed.

pub(crate) mod index;

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::task::AtomicWaker;
use slab::Slab;
use tokio::sync::Notify;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use self::index::{Index, Indexed};
use crate::error::ProxyError;

/// The number of connections that are checked before the worker's other tasks run: some hundreds of
/// microseconds.
const CHECK_AT_ONCE: usize = 256;
/// The number of terminated connections that are woken before the worker's other tasks run. Each
/// closes two sockets and writes a log line: some tens of microseconds.
const WAKE_AT_ONCE: usize = 32;
/// Timeout for the end of terminated connections, after which an error is logged.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// The registries of one pod, one for each worker.
#[derive(Debug)]
pub(crate) struct Registries<T> {
    first: Arc<ConnectionRegistry<T>>,
    others: Box<[Arc<ConnectionRegistry<T>>]>,
}

impl<T> Registries<T> {
    pub(crate) fn new(workers: usize) -> Self {
        Self { first: Arc::default(), others: (1..workers).map(|_| Arc::default()).collect() }
    }

    /// The registry of one worker.
    pub(crate) fn for_worker(&self, worker: usize) -> &Arc<ConnectionRegistry<T>> {
        worker.checked_sub(1).and_then(|index| self.others.get(index)).unwrap_or(&self.first)
    }

    fn all(&self) -> impl Iterator<Item = &Arc<ConnectionRegistry<T>>> {
        std::iter::once(&self.first).chain(&self.others)
    }

    /// The number of open connections, tunnels and streams.
    pub(crate) fn open(&self) -> usize {
        self.all().map(|registry| registry.open()).sum()
    }

    /// The number of open connections, tunnels and streams that `selects` selects.
    pub(crate) async fn count(&self, selects: impl Fn(&T) -> bool) -> usize {
        let mut count = 0;
        for registry in self.all() {
            registry.visit(|subject| count += usize::from(selects(subject))).await;
        }
        count
    }

    /// Terminates all open connections, and every later one when it is registered. Waits for the
    /// end of the open ones.
    pub(crate) async fn close(&self, reason: fn() -> ProxyError) {
        for registry in self.all() {
            registry.lock().closed = Some(reason);
        }
        self.terminate(|_| Err(reason())).await;
    }

    /// Terminates the open connections that `check` does not allow, and waits for their end.
    /// Returns their number.
    pub(crate) async fn terminate(&self, check: impl Fn(&T) -> Result<(), ProxyError>) -> usize {
        let mut terminated = Terminated::default();
        for registry in self.all() {
            registry.terminate(&mut terminated, &check).await;
        }
        let count = terminated.count();
        terminated.end().await;
        count
    }

    /// Resolves when no connection is open on any worker.
    pub(crate) async fn all_ended(&self) {
        // A worker may register a connection with another worker's registry that was empty before.
        while self.open() > 0 {
            for registry in self.all() {
                registry.all_ended().await;
            }
        }
    }
}

/// The open connections of a pod on a worker. Each has a subject `T`, which decides whether it is
/// terminated.
#[derive(Debug)]
pub(crate) struct ConnectionRegistry<T> {
    /// Locked by the worker's thread, by a worker that assigns a connection to it, and by the
    /// control thread during a drain.
    connections: Mutex<Connections<T>>,
    ended: Notify,
}

#[derive(Debug)]
struct Connections<T> {
    open: Slab<Connection<T>>,
    /// The connections of `open` by their addresses.
    index: Index,
    /// The reason for terminating every later connection on registration, after
    /// [`Registries::close`].
    closed: Option<fn() -> ProxyError>,
    /// Whether a task waits for the end of the last connection.
    is_awaited: bool,
}

#[derive(Debug)]
struct Connection<T> {
    subject: T,
    termination: Arc<TerminationState>,
    /// Counts a terminated connection until it has ended.
    ending: Option<TaskTrackerToken>,
}

impl<T> Default for ConnectionRegistry<T> {
    fn default() -> Self {
        let (open, index) = (Slab::new(), Index::default());
        let connections = Connections { open, index, closed: None, is_awaited: false };
        Self { connections: Mutex::new(connections), ended: Notify::new() }
    }
}

impl<T: Indexed> ConnectionRegistry<T> {
    /// Registers a connection until the registration is dropped.
    pub(crate) fn register(self: &Arc<Self>, subject: T) -> Registration<T> {
        let state = Arc::new(TerminationState::default());
        let connection = Connection { subject, termination: state.clone(), ending: None };
        let mut connections = self.lock();
        if let Some(reason) = connections.closed {
            state.terminate(reason());
        }
        let by = connection.subject.indexed_by();
        let key = connections.open.insert(connection);
        connections.index.insert(by, key);
        drop(connections);
        Registration { registry: self.clone(), key, termination: Termination(state) }
    }
}

impl<T> ConnectionRegistry<T> {
    /// The number of open connections.
    pub(crate) fn open(&self) -> usize {
        self.lock().open.len()
    }

    /// Resolves when no connection is open.
    pub(crate) async fn all_ended(&self) {
        loop {
            let ended = self.ended.notified();
            {
                let mut connections = self.lock();
                if connections.open.is_empty() {
                    return;
                }
                connections.is_awaited = true;
            }
            ended.await;
        }
    }

    /// Calls `visit` with the subject of each open connection. The worker's other tasks run in
    /// between, so a connection that is opened or ends meanwhile may be left out.
    pub(crate) async fn visit(&self, mut visit: impl FnMut(&T)) {
        let mut next = 0;
        while let Some(reached) = self.visit_some(next, &mut visit) {
            next = reached;
            tokio::task::yield_now().await;
        }
    }

    /// Visits some connections from the key `next` on. Returns the next key; `None` at the end.
    fn visit_some(&self, next: usize, visit: &mut impl FnMut(&T)) -> Option<usize> {
        let connections = self.lock();
        let end = connections.open.capacity().min(next + CHECK_AT_ONCE);
        let open = (next..end).filter_map(|key| connections.open.get(key));
        open.for_each(|connection| visit(&connection.subject));
        (next < end).then_some(end)
    }

    /// Terminates every connection that `check` does not allow: it forwards no more bytes.
    pub(crate) async fn terminate(
        &self,
        terminated: &mut Terminated,
        mut check: impl FnMut(&T) -> Result<(), ProxyError>,
    ) {
        let mut next = 0;
        while let Some(reached) = self.terminate_some(next, &mut check, terminated) {
            next = reached;
            tokio::task::yield_now().await;
        }
    }

    /// The connections that `find` selects. A key may belong to another connection later, for which
    /// a check is harmless.
    pub(crate) fn find<R>(&self, find: impl FnOnce(&Index) -> R) -> R {
        find(&self.lock().index)
    }

    /// Terminates every connection of `keys` that `check` does not allow.
    pub(crate) async fn terminate_found(
        &self,
        keys: &[usize],
        terminated: &mut Terminated,
        mut check: impl FnMut(&T) -> Result<(), ProxyError>,
    ) {
        for chunk in keys.chunks(CHECK_AT_ONCE) {
            self.terminate_keys(chunk, &mut check, terminated);
            tokio::task::yield_now().await;
        }
    }

    fn terminate_keys(
        &self,
        keys: &[usize],
        check: &mut impl FnMut(&T) -> Result<(), ProxyError>,
        terminated: &mut Terminated,
    ) {
        let mut connections = self.lock();
        keys.iter().for_each(|key| connections.terminate(*key, check, terminated));
    }

    /// Checks some connections from the key `next` on. Returns the next key; `None` at the end.
    fn terminate_some(
        &self,
        next: usize,
        check: &mut impl FnMut(&T) -> Result<(), ProxyError>,
        terminated: &mut Terminated,
    ) -> Option<usize> {
        let mut connections = self.lock();
        let end = connections.open.capacity().min(next + CHECK_AT_ONCE);
        for key in next..end {
            connections.terminate(key, check, terminated);
        }
        (next < end).then_some(end)
    }

    fn lock(&self) -> MutexGuard<'_, Connections<T>> {
        // No code panics between related changes, so the state is consistent after a panic.
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Connections<T> {
    /// Terminates an open connection that `check` does not allow.
    fn terminate(
        &mut self,
        key: usize,
        check: &mut impl FnMut(&T) -> Result<(), ProxyError>,
        terminated: &mut Terminated,
    ) {
        let open = self.open.get_mut(key);
        let Some(connection) = open.filter(|one| !one.termination.is_terminated()) else { return };
        if let Err(reason) = check(&connection.subject) {
            connection.termination.terminate(reason);
            connection.ending = Some(terminated.ending.token());
            terminated.marked.push(connection.termination.clone());
        }
    }
}

/// Connections that were terminated together.
#[derive(Debug, Default)]
#[must_use = "terminated connections wait to be woken"]
pub(crate) struct Terminated {
    marked: Vec<Arc<TerminationState>>,
    /// Counts the connections that have not ended.
    ending: TaskTracker,
}

impl Terminated {
    /// The number of terminated connections.
    pub(crate) fn count(&self) -> usize {
        self.marked.len()
    }

    /// Wakes the connections, a few at a time, and waits until all have ended.
    pub(crate) async fn end(self) {
        let Self { marked, ending } = self;
        ending.close();
        for some in marked.chunks(WAKE_AT_ONCE) {
            some.iter().for_each(|state| state.waker.wake());
            tokio::task::yield_now().await;
        }
        if tokio::time::timeout(END_TIMEOUT, ending.wait()).await.is_err() {
            tracing::error!(connections = ending.len(), "terminated connections have not ended");
        }
    }
}

/// An open connection in its registry.
#[derive(Debug)]
pub(crate) struct Registration<T: Indexed> {
    registry: Arc<ConnectionRegistry<T>>,
    key: usize,
    termination: Termination,
}

impl<T: Indexed> Registration<T> {
    /// Changes the subject, which later checks use.
    pub(crate) fn update(&self, change: impl FnOnce(&mut T)) {
        let mut connections = self.registry.lock();
        let Connections { open, index, .. } = &mut *connections;
        if let Some(Connection { subject, .. }) = open.get_mut(self.key) {
            index.remove(subject.indexed_by(), self.key);
            change(subject);
            index.insert(subject.indexed_by(), self.key);
        }
    }

    /// Changes a part of the subject that the index does not depend on.
    pub(crate) fn amend(&self, change: impl FnOnce(&mut T)) {
        let mut connections = self.registry.lock();
        if let Some(Connection { subject, .. }) = connections.open.get_mut(self.key) {
            change(subject);
        }
    }

    /// The connection's handle for its termination.
    pub(crate) fn termination(&self) -> &Termination {
        &self.termination
    }
}

impl<T: Indexed> Drop for Registration<T> {
    fn drop(&mut self) {
        let mut connections = self.registry.lock();
        let ended = connections.open.try_remove(self.key);
        if let Some(connection) = &ended {
            connections.index.remove(connection.subject.indexed_by(), self.key);
        }
        let report = connections.is_awaited && connections.open.is_empty();
        drop(connections);
        // Drop outside the lock: this may be the last owner of the pod.
        drop(ended);
        if report {
            self.registry.ended.notify_waiters();
        }
    }
}

/// Signals to a connection that it is terminated, with the reason.
#[derive(Debug)]
pub(crate) struct Termination(Arc<TerminationState>);

impl Termination {
    /// Runs `work` until the connection is terminated, which every poll checks first. The caller
    /// pins `work`: moving it into this future would double its size.
    pub(crate) async fn or_terminate<T>(
        &self,
        mut work: impl Future<Output = Result<T, ProxyError>> + Unpin,
    ) -> Result<T, ProxyError> {
        poll_fn(|cx| match self.poll_terminated(cx) {
            Poll::Ready(reason) => Poll::Ready(Err(reason)),
            Poll::Pending => Pin::new(&mut work).poll(cx),
        })
        .await
    }

    /// Whether the connection is terminated.
    pub(crate) fn is_terminated(&self) -> bool {
        self.0.is_terminated()
    }

    /// Takes the reason of the termination, unless it was taken before.
    pub(crate) fn take_reason(&self) -> Option<ProxyError> {
        self.0.take_reason()
    }

    /// Ready with the reason when the connection is terminated. Ready only once.
    pub(crate) fn poll_terminated(&self, cx: &mut Context<'_>) -> Poll<ProxyError> {
        self.0.waker.register(cx.waker());
        self.0.take_reason().map_or(Poll::Pending, Poll::Ready)
    }
}

#[derive(Debug, Default)]
struct TerminationState {
    /// Read at every poll of the connection, so it is outside the mutex of the reason.
    is_terminated: AtomicBool,
    /// Boxed, because few connections are terminated.
    reason: Mutex<Option<Box<ProxyError>>>,
    waker: AtomicWaker,
}

impl TerminationState {
    fn terminate(&self, reason: ProxyError) {
        *self.reason.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(reason));
        self.is_terminated.store(true, Ordering::Release);
    }

    fn is_terminated(&self) -> bool {
        self.is_terminated.load(Ordering::Acquire)
    }

    fn take_reason(&self) -> Option<ProxyError> {
        if !self.is_terminated() {
            return None;
        }
        let reason = self.reason.lock().unwrap_or_else(PoisonError::into_inner).take();
        reason.map(|reason| *reason)
    }
}

#[cfg(test)]
mod tests;
