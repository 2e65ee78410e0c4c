//! Tests of the connection registry, with numbers as subjects.

use std::net::IpAddr;

use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::index::IndexedBy;
use super::*;

type Registry = Arc<ConnectionRegistry<usize>>;

/// Even numbers are inbound, and odd ones outbound; the number modulo ten is the address.
impl Indexed for usize {
    fn indexed_by(&self) -> IndexedBy {
        let address = address(self % 10);
        if self.is_multiple_of(2) {
            IndexedBy::Inbound(address)
        } else {
            IndexedBy::Outbound([address, [192, 0, 2, 1].into()])
        }
    }
}

fn address(host: usize) -> IpAddr {
    [10, 0, 0, u8::try_from(host).unwrap()].into()
}

#[tokio::test]
async fn index_finds_connections_by_their_addresses() {
    let registry = Registry::default();
    let mut open: Vec<_> = (0..100).map(|number| registry.register(number)).collect();
    let inbound = registry.find(|index| index.inbound_addresses().collect::<Vec<_>>());
    assert_eq!(inbound, [0, 2, 4, 6, 8].map(address));
    let numbers = |find: fn(&Index) -> Vec<usize>| registry.find(find).len();
    assert_eq!(numbers(|index| index.inbound_to(address(2)).collect()), 10);
    assert_eq!(numbers(|index| index.inbound_to(address(3)).collect()), 0);
    assert_eq!(numbers(|index| index.outbound_to(address(3)).collect()), 10);
    assert_eq!(numbers(|index| index.outbound_to([192, 0, 2, 1].into()).collect()), 50);
    // Changed subjects and closed connections.
    open[3].update(|number| *number = 4);
    assert_eq!(numbers(|index| index.inbound_to(address(4)).collect()), 11);
    assert_eq!(numbers(|index| index.outbound_to(address(3)).collect()), 9);
    let keys = registry.find(|index| index.outbound_to(address(5)).collect::<Vec<_>>());
    let mut terminated = Terminated::default();
    registry.terminate_found(&keys, &mut terminated, forbid).await;
    assert_eq!(terminated.count(), 10);
    assert_eq!(open.iter().filter(|one| one.termination().is_terminated()).count(), 10);
    open.clear();
    assert_eq!(numbers(|index| index.outbound_to([192, 0, 2, 1].into()).collect()), 0);
    assert!(registry.find(|index| index.inbound_addresses().next()).is_none());
    terminated.end().await;
}

/// A connection that ends only when it is terminated.
fn idle(registry: &Registry, number: usize) -> JoinHandle<Result<(), ProxyError>> {
    let registration = registry.register(number);
    tokio::spawn(
        async move { registration.termination().or_terminate(std::future::pending()).await },
    )
}

fn forbid(_: &usize) -> Result<(), ProxyError> {
    Err(ProxyError::Drained)
}

async fn mark(
    registry: &Registry,
    check: impl FnMut(&usize) -> Result<(), ProxyError>,
) -> Terminated {
    let mut terminated = Terminated::default();
    registry.terminate(&mut terminated, check).await;
    terminated
}

async fn terminate(
    registry: &Registry,
    check: impl FnMut(&usize) -> Result<(), ProxyError>,
) -> usize {
    let terminated = mark(registry, check).await;
    let count = terminated.count();
    terminated.end().await;
    count
}

#[tokio::test]
async fn forbidden_connections_end_and_others_continue() {
    let registry = Registry::default();
    let running: Vec<_> = (0..1000).map(|number| idle(&registry, number)).collect();
    tokio::task::yield_now().await;
    let even = |number: &usize| if number.is_multiple_of(2) { forbid(number) } else { Ok(()) };
    assert_eq!(terminate(&registry, even).await, 500);
    assert_eq!(registry.open(), 500);
    for (number, task) in running.into_iter().enumerate() {
        if number.is_multiple_of(2) {
            assert!(matches!(task.await.unwrap(), Err(ProxyError::Drained)));
        } else {
            assert!(!task.is_finished());
            task.abort();
        }
    }
}

#[tokio::test]
async fn terminated_connection_forwards_nothing_before_wake() {
    let registry = Registry::default();
    let registration = registry.register(1);
    let terminated = mark(&registry, forbid).await;
    let ready = std::future::ready(Ok("moved"));
    let outcome = registration.termination().or_terminate(ready).await;
    assert!(matches!(outcome, Err(ProxyError::Drained)), "{outcome:?}");
    assert_eq!(terminated.count(), 1);
}

#[tokio::test]
async fn connection_is_terminated_according_to_its_updated_subject() {
    let registry = Registry::default();
    let registration = registry.register(1);
    let ones = |number: &usize| if *number == 1 { forbid(number) } else { Ok(()) };
    registration.update(|number| *number = 2);
    assert_eq!(mark(&registry, ones).await.count(), 0);
    registration.update(|number| *number = 1);
    assert_eq!(mark(&registry, ones).await.count(), 1);
}

#[tokio::test(start_paused = true)]
async fn waiting_for_terminated_connections_times_out() {
    let registry = Registry::default();
    let _registration = registry.register(1);
    let began = Instant::now();
    assert_eq!(terminate(&registry, forbid).await, 1);
    assert_eq!(began.elapsed(), END_TIMEOUT);
    assert_eq!(terminate(&registry, forbid).await, 0, "it is terminated once");
}

#[tokio::test(start_paused = true)]
async fn termination_waits_only_for_its_own_connections() {
    let registry = Registry::default();
    let first = registry.register(1);
    let ones = mark(&registry, |number| if *number == 1 { forbid(number) } else { Ok(()) }).await;
    let _second = registry.register(2);
    let twos = mark(&registry, forbid).await;
    assert_eq!((ones.count(), twos.count()), (1, 1));
    drop(first);
    let began = Instant::now();
    ones.end().await;
    assert_eq!(began.elapsed(), Duration::ZERO);
}

#[tokio::test]
async fn closed_registries_terminate_later_connections_from_their_start() {
    let registries = Registries::new(2);
    let early = idle(registries.for_worker(1), 1);
    registries.close(|| ProxyError::Drained).await;
    assert!(matches!(early.await.unwrap(), Err(ProxyError::Drained)));
    let late = registries.for_worker(0).register(2);
    let outcome = late.termination().or_terminate(std::future::ready(Ok(()))).await;
    assert!(matches!(outcome, Err(ProxyError::Drained)), "{outcome:?}");
}

#[tokio::test(start_paused = true)]
async fn registries_wait_for_the_last_connection_of_any_worker() {
    let registries = Registries::new(2);
    let register = |worker, number| registries.for_worker(worker).register(number);
    let (first, second) = (register(0, 1), register(1, 2));
    assert_eq!(registries.open(), 2);
    let mut ended = std::pin::pin!(registries.all_ended());
    assert!(timeout(Duration::from_millis(1), &mut ended).await.is_err());
    drop(first);
    let third = register(0, 3);
    drop(second);
    assert!(timeout(Duration::from_millis(1), &mut ended).await.is_err());
    drop(third);
    ended.await;
    assert_eq!(registries.open(), 0);
}

#[tokio::test]
async fn other_tasks_run_while_many_connections_are_terminated() {
    let registry = Registry::default();
    let running: Vec<_> = (0..10_000).map(|number| idle(&registry, number)).collect();
    tokio::task::yield_now().await;
    let turns = async {
        let mut turns = 0;
        while !running.iter().all(JoinHandle::is_finished) {
            turns += 1;
            tokio::task::yield_now().await;
        }
        turns
    };
    let (terminated, turns) = tokio::join!(terminate(&registry, forbid), turns);
    assert_eq!(terminated, 10_000);
    // One poll can serve several wake-ups of both futures, so the limit has a factor of 4.
    assert!(turns >= (10_000 / CHECK_AT_ONCE + 10_000 / WAKE_AT_ONCE) / 4, "{turns}");
}

#[tokio::test]
async fn visit_sees_every_open_connection_and_lets_other_tasks_run() {
    let registry = Registry::default();
    let mut open: Vec<_> = (0..1000).map(|number| registry.register(number)).collect();
    open.truncate(900);
    open[0].amend(|number| *number = 10_000);
    let (mut seen, mut turns) = (Vec::new(), 0);
    {
        let mut visit = std::pin::pin!(registry.visit(|number| seen.push(*number)));
        while futures_util::poll!(&mut visit).is_pending() {
            turns += 1;
            tokio::task::yield_now().await;
        }
    }
    drop(open);
    assert!(turns >= 900 / CHECK_AT_ONCE, "{turns}");
    seen.sort_unstable();
    assert!(seen.into_iter().eq((1..900).chain([10_000])));
}
