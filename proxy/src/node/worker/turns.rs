//! Lets the pods of a worker take turns in the work that their new connections cause.
//!
//! ```text
//! poll of a new connection ─ the first one in this pass ─▶ runs at once
//!                          └ another one ─▶ queue of its pod ─▶ in each pass, one poll of one pod
//! ```
//!
//! Opening a connection takes far more CPU time than relaying a request, most of it in handshakes.
//! Without turns, a pod that opens connections faster than its worker serves them fills the
//! runtime's queue, and each request of every other pod waits for all of them. With turns, the
//! runtime runs everything else that is ready between two polls of new connections: a pass.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use pin_project_lite::pin_project;
use tokio::sync::Notify;
use tokio::task::yield_now;

use crate::node::pod::PodId;

/// The number of polls for which a connection takes turns. They suffice to open it, to relay one
/// short exchange and to close it. Later ones cost as little as those of any open connection.
const POLLS_IN_TURN: u8 = 16;

/// While this many connections of a pod wait, its listeners wait too, for as many turns at most.
/// Further connections stay in the kernel's queue, where they cost less: an accepted one has a
/// descriptor, and all streams of a tunnel that ends are ready at once, which takes tens of
/// milliseconds for thousands of them.
const MAX_WAITING: usize = 256;

/// The work that takes turns. The two kinds of one pod alternate up to [`MAX_WAITING`] connections:
/// a listener that waited for all connections of its pod would let the kernel's queue overflow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Work {
    Accept(PodId),
    Connect(PodId),
}

/// The turns on one worker. Clones share them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Turns(Arc<State>);

#[derive(Debug, Default)]
struct State {
    /// Only the worker's thread locks it.
    queue: Mutex<Queue>,
    /// Wakes [`Turns::give`].
    taken: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    /// Whether a turn was taken in this pass. While it is false nothing waits.
    is_turn_taken: bool,
    /// The number of entries so far.
    entered: u64,
    /// The works in the order of their turns.
    works: VecDeque<Work>,
    /// The waiting polls of each of these works, in the order of their entries.
    waiting: HashMap<Work, BTreeMap<u64, Waker>>,
    /// The entries whose turn it is.
    granted: HashSet<u64>,
    /// How often the listeners of a pod were passed over since their last turn. Streams of open
    /// tunnels take turns too: without a limit, they could keep the listeners waiting for ever.
    passed_over: HashMap<PodId, usize>,
}

/// One turn. It leaves the queue when dropped.
#[derive(Debug)]
struct Turn {
    turns: Turns,
    work: Work,
    /// Its entry in the queue.
    entry: Option<u64>,
}

pin_project! {
    /// A connection whose first polls take turns.
    pub(crate) struct InTurn<F> {
        turn: Option<Turn>,
        polls_left: u8,
        #[pin]
        connection: F,
    }
}

impl Turns {
    /// Gives turns to the waiting pods, for ever.
    pub(crate) async fn give(&self) {
        loop {
            self.0.taken.notified().await;
            while self.0.queue().give_next() {
                // Returns when all that is ready has run, and the new events have been read.
                yield_now().await;
            }
        }
    }

    /// Waits for a turn of `pod` to accept. Cancel-safe.
    pub(crate) async fn accept(&self, pod: PodId) {
        let mut turn = self.turn(Work::Accept(pod));
        poll_fn(|cx| turn.poll(cx)).await;
    }

    fn turn(&self, work: Work) -> Turn {
        Turn { turns: self.clone(), work, entry: None }
    }
}

impl State {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        // No code panics while it holds the lock.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    /// Begins a pass. Returns false if nothing waits.
    fn give_next(&mut self) -> bool {
        for _ in 0..self.works.len() {
            let Some(work) = self.works.pop_front() else { break };
            if let Work::Accept(pod) = work {
                let passes = self.passed_over.get(&pod).copied().unwrap_or(0);
                if passes < MAX_WAITING && self.must_wait(pod) {
                    self.passed_over.insert(pod, passes + 1);
                    self.works.push_back(work);
                    continue;
                }
                self.passed_over.remove(&pod);
            }
            let Some(waiting) = self.waiting.get_mut(&work) else { continue };
            let first = waiting.pop_first();
            if waiting.is_empty() {
                self.waiting.remove(&work);
            } else {
                self.works.push_back(work);
            }
            if let Some((entry, waker)) = first {
                self.granted.insert(entry);
                waker.wake();
                return true;
            }
        }
        self.is_turn_taken = false;
        false
    }

    /// Whether the listeners of a pod wait for its connections. Their turn comes first then, so a
    /// pass never begins without a turn.
    fn must_wait(&self, pod: PodId) -> bool {
        let connections = self.waiting.get(&Work::Connect(pod));
        connections.is_some_and(|waiting| waiting.len() >= MAX_WAITING)
    }

    /// Adds an entry, or replaces the waker of one.
    fn wait(&mut self, work: Work, entry: u64, waker: &Waker) {
        let waiting = self.waiting.entry(work).or_insert_with(|| {
            self.works.push_back(work);
            BTreeMap::new()
        });
        waiting.entry(entry).or_insert_with(|| waker.clone()).clone_from(waker);
    }
}

impl Turn {
    fn poll(&mut self, cx: &Context<'_>) -> Poll<()> {
        let Self { turns: Turns(state), work, entry } = self;
        let mut queue = state.queue();
        let is_next = match *entry {
            Some(entry) => queue.granted.remove(&entry),
            None => !queue.is_turn_taken,
        };
        if is_next {
            *entry = None;
            queue.is_turn_taken = true;
        } else {
            let entry = *entry.get_or_insert_with(|| {
                queue.entered += 1;
                queue.entered
            });
            queue.wait(*work, entry, cx.waker());
        }
        drop(queue);
        state.taken.notify_one();
        if is_next { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let Some(entry) = self.entry else { return };
        let mut queue = self.turns.0.queue();
        queue.granted.remove(&entry);
        // Work without entries is removed at its turn.
        if let Some(waiting) = queue.waiting.get_mut(&self.work) {
            waiting.remove(&entry);
        }
    }
}

impl<F> InTurn<F> {
    /// `connection` as a connection of `pod`; without `turns` all of its polls run at once.
    pub(crate) fn new(turns: Option<&Turns>, pod: PodId, connection: F) -> Self {
        let turn = turns.map(|turns| turns.turn(Work::Connect(pod)));
        Self { turn, polls_left: POLLS_IN_TURN, connection }
    }
}

impl<F: Future> Future for InTurn<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        if let Some(turn) = this.turn {
            ready!(turn.poll(cx));
            *this.polls_left -= 1;
            if *this.polls_left == 0 {
                *this.turn = None;
            }
        }
        this.connection.poll(cx)
    }
}

#[cfg(test)]
mod tests;
