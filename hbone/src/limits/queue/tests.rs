//! Tests of the order of admission, and of cancelled requests.

use std::cell::Cell;

use futures_util::FutureExt as _;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, yield_now};

use super::super::budget::Sharing;
use super::*;

type Granted = mpsc::UnboundedReceiver<(&'static str, QueuePermit<u8>)>;

/// Queues requests in this order. Reports the order of their admission.
async fn queue(
    queue: &Queue<u8>,
    budget: &Arc<Budget>,
    requests: &[(&'static str, u8)],
) -> (Vec<JoinHandle<()>>, Granted) {
    let (report, given) = mpsc::unbounded_channel();
    let mut tasks = Vec::new();
    for &(name, rank) in requests {
        let (queue, budget, report) = (queue.clone(), budget.clone(), report.clone());
        tasks.push(tokio::spawn(async move {
            let turn = queue.turn(&budget, rank, || ()).await;
            report.send((name, turn)).unwrap();
        }));
        yield_now().await;
    }
    (tasks, given)
}

const MIXED: [(&str, u8); 5] =
    [("late", 2), ("soon", 1), ("first", 0), ("second", 0), ("later", 2)];

#[tokio::test]
async fn lowest_rank_is_admitted_first_and_equal_ranks_in_order() {
    let (waiting, budget) = (Queue::default(), Arc::new(Budget::new(1)));
    let mut held = waiting.turn(&budget, 2, || unreachable!()).await;
    let (_tasks, mut given) = queue(&waiting, &budget, &MIXED).await;
    for expected in ["first", "second", "soon", "late", "later"] {
        assert!(given.try_recv().is_err(), "one at a time");
        drop(held);
        let (name, turn) = given.recv().await.unwrap();
        assert_eq!(name, expected);
        held = turn;
    }
    drop(held);
    assert_eq!(budget.used(), 0);
}

#[tokio::test]
async fn cancelled_request_does_not_block_others() {
    let (waiting, budget) = (Queue::default(), Arc::new(Budget::new(2)));
    let held = [waiting.turn(&budget, 0, || ()).await, waiting.turn(&budget, 1, || ()).await];
    let (tasks, mut given) = queue(&waiting, &budget, &MIXED).await;
    // Cancel one request in the queue, and one that has just been admitted.
    tasks[2].abort();
    yield_now().await;
    assert_eq!(waiting.lock().waiters.len(), 4, "the cancelled one is removed");
    drop(held);
    tasks[3].abort();
    yield_now().await;
    let mut names = Vec::new();
    while let Ok((name, turn)) = given.try_recv() {
        names.push(name);
        drop(turn);
        yield_now().await;
    }
    assert_eq!(names, ["soon", "late", "later"]);
    assert_eq!(budget.used(), 0);
    assert!(waiting.lock().waiters.is_empty());
}

#[tokio::test]
async fn request_for_another_part_is_not_blocked() {
    let (waiting, whole) = (Queue::default(), Arc::new(Budget::new(8)));
    let part = |limit| Arc::new(Budget::part(&whole, limit, Sharing::UnknownParts));
    let (heavy, light) = (part(1), part(8));
    let held = waiting.turn(&heavy, 0u8, || unreachable!()).await;
    let waits = Cell::new(false);
    let mut second = Box::pin(waiting.turn(&heavy, 1, || waits.set(true)));
    assert!((&mut second).now_or_never().is_none() && waits.get());
    let late_request = waiting.turn(&light, 0, || unreachable!()).now_or_never();
    assert!(late_request.is_some());
    drop(held);
    assert!(second.now_or_never().is_some());
}

#[tokio::test]
async fn cancelled_first_request_unblocks_the_next() {
    let (waiting, whole) = (Queue::default(), Arc::new(Budget::new(8)));
    let part = |limit| Arc::new(Budget::part(&whole, limit, Sharing::UnknownParts));
    let (heavy, light) = (part(1), part(8));
    let _held = waiting.turn(&heavy, 0u8, || unreachable!()).await;
    let mut front = Box::pin(waiting.turn(&heavy, 1, || ()));
    assert!((&mut front).now_or_never().is_none());
    let mut next = Box::pin(waiting.turn(&light, 1, || ()));
    assert!((&mut next).now_or_never().is_none(), "it is the second in the queue");
    drop(front);
    assert!(next.now_or_never().is_some());
}
