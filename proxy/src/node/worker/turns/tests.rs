//! Tests of the order of turns, of passes, and of entries that leave the queue.

use std::cell::RefCell;
use std::rc::Rc;

use tokio::task::{LocalSet, spawn_local};

use super::*;

type Log = Rc<RefCell<Vec<&'static str>>>;

/// Runs `script` beside the task that gives turns.
async fn run(turns: &Turns, script: impl Future<Output = ()>) {
    let giving = turns.clone();
    let local = LocalSet::new();
    local.spawn_local(async move { giving.give().await });
    local.run_until(script).await;
}

/// A connection that needs `polls` polls, each of which logs `name`.
async fn connection(name: &'static str, polls: usize, log: Log) {
    for _ in 0..polls {
        log.borrow_mut().push(name);
        yield_now().await;
    }
}

fn begin(turns: &Turns, pod: PodId, name: &'static str, polls: usize, log: &Log) {
    spawn_local(InTurn::new(Some(turns), pod, connection(name, polls, log.clone())));
}

#[tokio::test]
async fn pods_take_turns_however_many_connections_one_has() {
    let (turns, log) = (Turns::default(), Log::default());
    let (busy, other) = (PodId::next(), PodId::next());
    run(&turns, async {
        for _ in 0..50 {
            begin(&turns, busy, "busy", 4, &log);
        }
        begin(&turns, other, "other", 4, &log);
        while log.borrow().iter().filter(|name| **name == "other").count() < 4 {
            yield_now().await;
        }
        let before = log.borrow().iter().filter(|name| **name == "busy").count();
        assert!(before <= 8, "{before} polls of the busy pod preceded 4 of the other one");
    })
    .await;
}

#[tokio::test]
async fn ready_task_runs_between_two_turns() {
    let (turns, log) = (Turns::default(), Log::default());
    run(&turns, async {
        for _ in 0..20 {
            begin(&turns, PodId::next(), "new", 2, &log);
        }
        let relay = spawn_local(connection("relay", 10, log.clone()));
        relay.await.unwrap();
        let before = log.borrow().iter().filter(|name| **name == "new").count();
        assert!((5..=15).contains(&before), "{before} turns while a relay ran 10 times");
    })
    .await;
}

#[tokio::test]
async fn only_first_poll_of_pass_runs_at_once() {
    let (turns, pod) = (Turns::default(), Work::Connect(PodId::next()));
    let cx = Context::from_waker(Waker::noop());
    let (mut first, mut second) = (turns.turn(pod), turns.turn(pod));
    assert!(first.poll(&cx).is_ready());
    assert!(second.poll(&cx).is_pending());
    assert!(turns.0.queue().give_next());
    assert!(first.poll(&cx).is_pending(), "the second connection has the turn");
    assert!(second.poll(&cx).is_ready());
    assert!(turns.0.queue().give_next() && first.poll(&cx).is_ready());
    assert!(!turns.0.queue().give_next());
    assert!(second.poll(&cx).is_ready(), "a new pass");
}

#[tokio::test]
async fn listener_does_not_wait_for_all_connections_of_its_pod() {
    let (turns, log, pod) = (Turns::default(), Log::default(), PodId::next());
    run(&turns, async {
        for _ in 0..50 {
            begin(&turns, pod, "connection", 4, &log);
        }
        for _ in 0..5 {
            turns.accept(pod).await;
        }
        let before = log.borrow().len();
        assert!(before <= 10, "{before} polls of connections preceded 5 turns of the listener");
    })
    .await;
}

#[tokio::test]
async fn listener_waits_while_too_many_connections_of_its_pod_wait() {
    let (turns, pod) = (Turns::default(), PodId::next());
    let cx = Context::from_waker(Waker::noop());
    assert!(turns.turn(Work::Connect(pod)).poll(&cx).is_ready());
    let mut accept = turns.turn(Work::Accept(pod));
    let mut connections: Vec<_> =
        (0..=MAX_WAITING).map(|_| turns.turn(Work::Connect(pod))).collect();
    assert!(accept.poll(&cx).is_pending());
    assert!(connections.iter_mut().all(|turn| turn.poll(&cx).is_pending()));
    for turn in connections.iter_mut().take(2) {
        assert!(turns.0.queue().give_next() && accept.poll(&cx).is_pending());
        assert!(turn.poll(&cx).is_ready());
    }
    assert!(turns.0.queue().give_next() && accept.poll(&cx).is_ready());
    let mut other = turns.turn(Work::Accept(PodId::next()));
    assert!(other.poll(&cx).is_pending());
    assert!(turns.0.queue().give_next() && turns.0.queue().give_next());
    assert!(other.poll(&cx).is_ready(), "listeners of other pods do not wait");
}

#[tokio::test]
async fn listener_gets_turn_while_many_open_streams_of_its_pod_take_turns() {
    let (turns, pod) = (Turns::default(), PodId::next());
    let cx = Context::from_waker(Waker::noop());
    assert!(turns.turn(Work::Connect(pod)).poll(&cx).is_ready());
    let mut streams: VecDeque<_> =
        (0..MAX_WAITING + 44).map(|_| turns.turn(Work::Connect(pod))).collect();
    assert!(streams.iter_mut().all(|turn| turn.poll(&cx).is_pending()));
    for _ in 0..2 {
        let mut accept = turns.turn(Work::Accept(pod));
        assert!(accept.poll(&cx).is_pending());
        let mut passes = 0;
        loop {
            assert!(turns.0.queue().give_next());
            passes += 1;
            if accept.poll(&cx).is_ready() {
                break;
            }
            assert!(passes <= 2 * (MAX_WAITING + 1), "the listener starves");
            streams.rotate_left(1);
            let stream = streams.back_mut().unwrap();
            assert!(stream.poll(&cx).is_ready(), "a pass without a turn");
            assert!(stream.poll(&cx).is_pending(), "the stream waits again");
        }
        assert!(passes > MAX_WAITING, "the listener did not wait: {passes} passes");
        assert!(turns.0.queue().passed_over.is_empty());
    }
}

#[tokio::test]
async fn dropped_turn_leaves_nothing() {
    let (turns, pod) = (Turns::default(), PodId::next());
    let cx = Context::from_waker(Waker::noop());
    let work = Work::Connect(pod);
    assert!(turns.turn(work).poll(&cx).is_ready());
    let mut accept = turns.turn(Work::Accept(pod));
    assert!(accept.poll(&cx).is_pending());
    let mut waiting: Vec<_> = (0..=MAX_WAITING).map(|_| turns.turn(work)).collect();
    assert!(waiting.iter_mut().all(|turn| turn.poll(&cx).is_pending()));
    assert!(turns.0.queue().give_next(), "the first waiting connection gets a turn");
    assert!(!turns.0.queue().passed_over.is_empty(), "the listener was passed over");
    drop((accept, waiting));
    assert!(!turns.0.queue().give_next());
    let queue = turns.0.queue();
    assert!(queue.works.is_empty() && queue.waiting.is_empty() && queue.granted.is_empty());
    assert!(queue.passed_over.is_empty());
}

#[tokio::test]
async fn old_connection_takes_no_turns() {
    let (turns, log) = (Turns::default(), Log::default());
    let mut old =
        Box::pin(InTurn::new(Some(&turns), PodId::next(), connection("old", 40, log.clone())));
    let mut cx = Context::from_waker(Waker::noop());
    for _ in 0..POLLS_IN_TURN {
        assert!(old.as_mut().poll(&mut cx).is_pending());
        turns.0.queue().give_next();
    }
    assert_eq!(log.borrow().len(), usize::from(POLLS_IN_TURN));
    turns.0.queue().is_turn_taken = true;
    assert!(old.as_mut().poll(&mut cx).is_pending());
    assert_eq!(log.borrow().len(), usize::from(POLLS_IN_TURN) + 1);
}
