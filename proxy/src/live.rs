//! The open connections of one worker, so that a change of the mesh can end those that it forbids.
//!
//! A connection is decided on and registered in one step, on the thread that looks through all of them after a change: what was
//! decided by the older mesh is found by that look, and what comes later is decided by the newer one. Not here: what is
//! allowed (`policy.rs`).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use slab::Slab;
use tokio::sync::{Notify, oneshot};

use crate::error::ProxyError;
use crate::policy::Subject;

/// How many connections are looked at before others get their turn: some tens of microseconds.
const LOOK_AT_ONCE: usize = 256;
/// How many are ended before others get their turn. To end one takes some tens of microseconds too: two sockets and a log line.
const CUT_AT_ONCE: usize = 32;
/// How long connections that were told to end may take to do so before that is said and no longer waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// The open connections of one worker.
#[derive(Debug, Default)]
pub(crate) struct Live {
    /// Only ever locked by one thread at a time, its worker's, and never across an await.
    connections: Mutex<Connections>,
    ended: Notify,
}

#[derive(Debug, Default)]
struct Connections {
    all: Slab<Connection>,
    /// How many were told to end and have not yet.
    ending: usize,
}

#[derive(Debug)]
struct Connection {
    subject: Subject,
    /// The generation of the mesh that it was decided by when it began.
    since: u64,
    /// `None` once it was told to end.
    cut: Option<oneshot::Sender<ProxyError>>,
}

/// An open connection, for as long as this lives.
#[derive(Debug)]
pub(crate) struct Registration {
    live: Arc<Live>,
    key: usize,
}

/// Tells a connection that it is no longer allowed.
#[derive(Debug)]
pub(crate) struct Revocation(oneshot::Receiver<ProxyError>);

impl Revocation {
    /// `work`, unless the connection must end first. The order matters: once it is told, nothing more is moved.
    pub(crate) async fn or_end<T>(
        &mut self,
        work: impl Future<Output = Result<T, ProxyError>>,
    ) -> Result<T, ProxyError> {
        tokio::select! {
            biased;
            Ok(reason) = &mut self.0 => Err(ProxyError::NoLongerAllowed(Box::new(reason))),
            outcome = work => outcome,
        }
    }
}

impl Live {
    /// Adds a connection that the mesh of generation `since` allows.
    pub(crate) fn register(
        self: &Arc<Self>,
        subject: Subject,
        since: u64,
    ) -> (Registration, Revocation) {
        let (cut, told) = oneshot::channel();
        let connection = Connection { subject, since, cut: Some(cut) };
        let key = self.lock().all.insert(connection);
        (Registration { live: self.clone(), key }, Revocation(told))
    }

    /// Ends every connection that `check` does not allow, and waits until they have ended; returns how many that were. `check` is
    /// told the generation of the mesh that allowed the connection when it began.
    pub(crate) async fn enforce(
        &self,
        mut check: impl FnMut(&Subject, u64) -> Result<(), ProxyError>,
    ) -> usize {
        let (mut next, mut cut) = (0, 0);
        while let Some((reached, ended)) = self.enforce_some(next, &mut check) {
            (next, cut) = (reached, cut + ended);
            tokio::task::yield_now().await;
        }
        let all_ended = async {
            while self.lock().ending > 0 {
                self.ended.notified().await;
            }
        };
        if tokio::time::timeout(PATIENCE, all_ended).await.is_err() {
            let connections = self.lock().ending;
            tracing::error!(connections, "connections that are no longer allowed did not end");
        }
        cut
    }

    /// The same from `next` on until others must get their turn: how far that was and how many were ended; `None` at the end.
    fn enforce_some(
        &self,
        next: usize,
        check: &mut impl FnMut(&Subject, u64) -> Result<(), ProxyError>,
    ) -> Option<(usize, usize)> {
        let mut connections = self.lock();
        let end = connections.all.capacity().min(next + LOOK_AT_ONCE);
        let mut cut = 0;
        for key in next..end {
            let Some(connection) = connections.all.get_mut(key) else { continue };
            if connection.cut.is_some()
                && let Err(reason) = check(&connection.subject, connection.since)
            {
                // Nobody listens if the connection is ending by itself just now.
                connection.cut.take().map(|told| told.send(reason).ok());
                connections.ending += 1;
                cut += 1;
                if cut == CUT_AT_ONCE {
                    return Some((key + 1, cut));
                }
            }
        }
        (next < end).then_some((end, cut))
    }

    fn lock(&self) -> MutexGuard<'_, Connections> {
        // What is in there is whole at any time.
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut connections = self.live.lock();
        if connections.all.try_remove(self.key).is_some_and(|gone| gone.cut.is_none()) {
            connections.ending -= 1;
            if connections.ending == 0 {
                self.live.ended.notify_one();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;

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
        assert_eq!(live.enforce(even).await, 500);
        assert_eq!(live.lock().all.len(), 500);
        for (index, task) in running.into_iter().enumerate() {
            if index % 2 == 1 {
                let ended = task.await.unwrap();
                assert!(matches!(ended, Err(ProxyError::NoLongerAllowed(_))), "{ended:?}");
            } else {
                assert!(!task.is_finished());
                task.abort();
            }
        }
    }

    #[tokio::test]
    async fn a_connection_that_is_told_to_end_moves_nothing_more() {
        let live = Arc::new(Live::default());
        let (registration, mut told) = live.register(subject(1), 1);
        let ended = tokio::join!(
            async {
                // Both are ready at once: what ends it goes first.
                tokio::task::yield_now().await;
                let outcome = told.or_end(async { Ok("moved") }).await;
                drop(registration);
                outcome
            },
            live.enforce(forbidden)
        );
        assert!(matches!(ended, (Err(ProxyError::NoLongerAllowed(_)), 1)), "{ended:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn what_does_not_end_when_told_is_not_waited_for_for_ever() {
        let live = Arc::new(Live::default());
        let (_registration, _told) = live.register(subject(1), 1);
        let began = tokio::time::Instant::now();
        assert_eq!(live.enforce(forbidden).await, 1);
        assert_eq!(began.elapsed(), PATIENCE);
        // It is told once.
        assert_eq!(live.enforce(forbidden).await, 0);
    }

    #[tokio::test]
    async fn others_get_their_turn_while_many_are_ended() {
        let live = Arc::new(Live::default());
        let mut open: Vec<_> = (0..10_000).map(|_| live.register(subject(1), 1)).collect();
        let turns = async {
            let mut turns = 0;
            while !open.is_empty() {
                open.retain_mut(|(_, told)| told.0.try_recv().is_err());
                turns += 1;
                tokio::task::yield_now().await;
            }
            turns
        };
        let (cut, turns) = tokio::join!(live.enforce(forbidden), turns);
        assert_eq!(cut, 10_000);
        assert!(turns >= 10_000 / CUT_AT_ONCE, "{turns}");
    }
}
