//! The open connections of one worker, so that a change of the mesh can end those that it forbids, and a drain all of them.
//!
//! A connection is decided on and registered in one step, on the thread that looks through all of them after a change: what was
//! decided by the older mesh is found by that look, and what comes later is decided by the newer one. First everything that is
//! forbidden is stopped, which takes next to nothing; then it is ended, a few at a time. Not here: what is allowed (`policy.rs`).

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::task::AtomicWaker;
use slab::Slab;
use tokio::sync::Notify;

use crate::error::ProxyError;

/// How many connections are looked at before others get their turn: some hundreds of microseconds.
const LOOK_AT_ONCE: usize = 256;
/// How many are ended before others get their turn. To end one takes some tens of microseconds: two sockets, and a log line.
const END_AT_ONCE: usize = 32;
/// How long connections that are stopped may take to end before that is said and they are no longer waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// The open connections of one worker, each with a `T` that is checked.
#[derive(Debug)]
pub(crate) struct Live<T> {
    /// Only ever locked by one thread at a time, its worker's, and never across an await.
    connections: Mutex<Connections<T>>,
    ended: Notify,
}

#[derive(Debug)]
struct Connections<T> {
    all: Slab<Connection<T>>,
    /// How many are stopped and have not ended yet.
    stopped: usize,
}

#[derive(Debug)]
struct Connection<T> {
    subject: T,
    /// The generation of the mesh that it was decided by when it began.
    since: u64,
    stop: Arc<Stop>,
}

/// Why a connection must end, once it must.
#[derive(Debug, Default)]
struct Stop {
    /// Read at every turn of the connection, and so apart from the reason.
    stopped: AtomicBool,
    reason: Mutex<Option<ProxyError>>,
    waker: AtomicWaker,
}

/// An open connection, for as long as this lives.
#[derive(Debug)]
pub(crate) struct Registration<T> {
    live: Arc<Live<T>>,
    key: usize,
}

/// Tells a connection that it has to end: it is no longer allowed, or the proxy stops.
#[derive(Debug)]
pub(crate) struct Revocation(Arc<Stop>);

impl Revocation {
    /// `work`, unless the connection is stopped. That is asked first at every turn: once it is, nothing more is moved. It is pinned
    /// by the caller, see [`crate::drain::Drain::or_abort`].
    pub(crate) async fn or_end<T>(
        &mut self,
        mut work: impl Future<Output = Result<T, ProxyError>> + Unpin,
    ) -> Result<T, ProxyError> {
        poll_fn(|cx| match self.poll_stopped(cx) {
            Poll::Ready(reason) => Poll::Ready(Err(reason)),
            Poll::Pending => Pin::new(&mut work).poll(cx),
        })
        .await
    }

    /// Ready, once, when the connection is stopped: why.
    pub(crate) fn poll_stopped(&mut self, cx: &mut Context<'_>) -> Poll<ProxyError> {
        self.0.waker.register(cx.waker());
        self.0.reason().map_or(Poll::Pending, Poll::Ready)
    }
}

impl Stop {
    fn stop(&self, reason: ProxyError) {
        *self.reason.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
        self.stopped.store(true, Relaxed);
    }

    fn is_stopped(&self) -> bool {
        // Both sides are on one thread.
        self.stopped.load(Relaxed)
    }

    fn reason(&self) -> Option<ProxyError> {
        if !self.is_stopped() {
            return None;
        }
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl<T> Default for Live<T> {
    fn default() -> Self {
        let connections = Mutex::new(Connections { all: Slab::new(), stopped: 0 });
        Self { connections, ended: Notify::default() }
    }
}

impl<T> Live<T> {
    /// Adds a connection that the mesh of generation `since` allows.
    pub(crate) fn register(
        self: &Arc<Self>,
        subject: T,
        since: u64,
    ) -> (Registration<T>, Revocation) {
        let stop = Arc::new(Stop::default());
        let connection = Connection { subject, since, stop: stop.clone() };
        let key = self.lock().all.insert(connection);
        (Registration { live: self.clone(), key }, Revocation(stop))
    }

    /// Stops every connection that `check` does not allow: from then on it moves nothing. `check` is told the generation of the
    /// mesh that allowed the connection when it began.
    pub(crate) async fn stop(
        &self,
        mut check: impl FnMut(&T, u64) -> Result<(), ProxyError>,
    ) -> Stopped {
        let (mut next, mut stopped) = (0, Vec::new());
        while let Some(reached) = self.stop_some(next, &mut check, &mut stopped) {
            next = reached;
            tokio::task::yield_now().await;
        }
        Stopped(stopped)
    }

    /// The same from `next` on until others must get their turn: how far that was; `None` at the end.
    fn stop_some(
        &self,
        next: usize,
        check: &mut impl FnMut(&T, u64) -> Result<(), ProxyError>,
        stopped: &mut Vec<Arc<Stop>>,
    ) -> Option<usize> {
        let mut connections = self.lock();
        let Connections { all, stopped: count } = &mut *connections;
        let end = all.capacity().min(next + LOOK_AT_ONCE);
        for key in next..end {
            let Some(connection) = all.get(key).filter(|one| !one.stop.is_stopped()) else {
                continue;
            };
            if let Err(reason) = check(&connection.subject, connection.since) {
                connection.stop.stop(reason);
                stopped.push(connection.stop.clone());
                *count += 1;
            }
        }
        (next < end).then_some(end)
    }

    /// Ends what was stopped, a few connections at a time, and waits until none is left.
    pub(crate) async fn end(&self, Stopped(stopped): Stopped) {
        for some in stopped.chunks(END_AT_ONCE) {
            some.iter().for_each(|stop| stop.waker.wake());
            tokio::task::yield_now().await;
        }
        let all_ended = async {
            while self.lock().stopped > 0 {
                self.ended.notified().await;
            }
        };
        if tokio::time::timeout(PATIENCE, all_ended).await.is_err() {
            let connections = self.lock().stopped;
            tracing::error!(connections, "connections that have to end did not");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Connections<T>> {
        // What is in there is whole at any time.
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Connections that are stopped and must be ended.
#[derive(Debug)]
pub(crate) struct Stopped(Vec<Arc<Stop>>);

impl Stopped {
    /// How many.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

impl<T> Drop for Registration<T> {
    fn drop(&mut self) {
        let mut connections = self.live.lock();
        let gone = connections.all.try_remove(self.key);
        if gone.is_some_and(|gone| gone.stop.is_stopped()) {
            connections.stopped -= 1;
            if connections.stopped == 0 {
                self.live.ended.notify_waiters();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;

    use crate::policy::Subject;

    fn subject(port: u16) -> Subject {
        let at = |port| SocketAddr::from(([10, 0, 0, 1], port));
        Subject::inbound(at(9), at(port), None)
    }

    fn port_of(subject: &Subject) -> u16 {
        subject.destination().port()
    }

    fn forbidden(subject: &Subject, _: u64) -> Result<(), ProxyError> {
        Err(ProxyError::OwnListener(subject.destination()))
    }

    async fn enforced(
        live: &Live<Subject>,
        check: impl FnMut(&Subject, u64) -> Result<(), ProxyError>,
    ) -> usize {
        let stopped = live.stop(check).await;
        let count = stopped.len();
        live.end(stopped).await;
        count
    }

    #[tokio::test]
    async fn what_is_forbidden_ends_and_the_rest_goes_on() {
        let live = Arc::new(Live::default());
        let mut running = Vec::new();
        for port in 1..=1000 {
            let (registration, mut told) = live.register(subject(port), 1);
            running.push(tokio::spawn(async move {
                let _registration = registration;
                told.or_end::<()>(std::future::pending()).await
            }));
        }
        tokio::task::yield_now().await;
        let even = |subject: &Subject, since: u64| {
            if port_of(subject).is_multiple_of(2) { forbidden(subject, since) } else { Ok(()) }
        };
        assert_eq!(enforced(&live, even).await, 500);
        assert_eq!(live.lock().all.len(), 500);
        for (index, task) in running.into_iter().enumerate() {
            if index % 2 == 1 {
                let ended = task.await.unwrap();
                assert!(matches!(ended, Err(ProxyError::OwnListener(_))), "{ended:?}");
            } else {
                assert!(!task.is_finished());
                task.abort();
            }
        }
    }

    #[tokio::test]
    async fn a_connection_that_is_stopped_moves_nothing_more_even_before_it_is_ended() {
        let live = Arc::new(Live::default());
        let (_registration, mut told) = live.register(subject(1), 1);
        let stopped = live.stop(forbidden).await;
        // It has work that is ready, and is not ended yet: the stop goes first.
        let outcome = told.or_end(std::future::ready(Ok("moved"))).await;
        assert!(matches!(outcome, Err(ProxyError::OwnListener(_))), "{outcome:?}");
        assert_eq!(stopped.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn what_does_not_end_when_told_is_not_waited_for_for_ever() {
        let live = Arc::new(Live::default());
        let (_registration, _told) = live.register(subject(1), 1);
        let began = tokio::time::Instant::now();
        assert_eq!(enforced(&live, forbidden).await, 1);
        assert_eq!(began.elapsed(), PATIENCE);
        // It is told once.
        assert_eq!(live.stop(forbidden).await.len(), 0);
    }

    #[tokio::test]
    async fn others_get_their_turn_while_many_are_stopped_and_ended() {
        let live = Arc::new(Live::default());
        let open: Vec<_> = (0..10_000).map(|_| live.register(subject(1), 1)).collect();
        let running = open.into_iter().map(|(registration, mut told)| {
            tokio::spawn(async move {
                let _registration = registration;
                told.or_end::<()>(std::future::pending()).await
            })
        });
        let running: Vec<_> = running.collect();
        tokio::task::yield_now().await;
        let turns = async {
            let mut turns = 0;
            while !running.iter().all(tokio::task::JoinHandle::is_finished) {
                turns += 1;
                tokio::task::yield_now().await;
            }
            turns
        };
        let (stopped, turns) = tokio::join!(enforced(&live, forbidden), turns);
        assert_eq!(stopped, 10_000);
        // Who waits for both is woken once for several of them.
        assert!(turns >= (10_000 / LOOK_AT_ONCE + 10_000 / END_AT_ONCE) / 4, "{turns}");
    }
}
