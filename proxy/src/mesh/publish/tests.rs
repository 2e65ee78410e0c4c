//! A test of many overlapping generations, with a worker that gets no CPU time.

use std::cell::Cell;
use std::net::SocketAddr;
use std::pin::pin;
use std::task::Poll;

use underpass_config::MeshSize;

use super::*;
use crate::decide::subject::{Decision, Subject};
use crate::error::ProxyError;
use crate::node::testing::{node_in, pod, snapshot};
use crate::node::worker::Worker;
use crate::node::worker::seat::Seat;

const GENERATIONS: u16 = 40;
/// The number of connections to each denied port on each worker.
const CONNECTIONS: usize = 25;

/// The snapshot of generation `number`, which denies the ports from 2 up to its number.
fn generation(number: u16) -> Arc<Snapshot> {
    let ports = (2..=number).map(|port| port.to_string()).collect::<Vec<_>>().join(", ");
    let rules = if ports.is_empty() {
        String::new()
    } else {
        format!(
            "{{name: p, namespace: default, scope: Namespace, action: Deny, dryRun: false, \
              rules: [[[{{destinationPorts: [{ports}]}}]]]}}"
        )
    };
    snapshot(number.into(), &format!("policies: [{rules}]"))
}

/// Opens a connection to `port` that ends when it is terminated.
fn open(seat: Arc<Seat>, port: u16) {
    let registration = seat.registry.register(Decision::default());
    let at = |last, port| SocketAddr::from(([10, 0, 0, last], port));
    let subject = Subject::inbound(at(9, 40000), at(1, port), None);
    seat.permit(subject, &registration).map(drop).unwrap();
    tokio::spawn(async move {
        let ended = registration.termination().or_terminate::<()>(std::future::pending()).await;
        assert!(matches!(ended, Err(ProxyError::NoLongerAllowed(_))), "{ended:?}");
        drop(seat);
    });
}

/// Runs `work` only while `starved` is not set.
async fn unless_starved(starved: &Cell<bool>, work: impl Future<Output = ()>) {
    let mut work = pin!(work);
    std::future::poll_fn(|cx| {
        if starved.get() {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        work.as_mut().poll(cx)
    })
    .await;
}

#[tokio::test]
async fn overlapping_mesh_generations_are_counted_once_with_a_starved_worker() {
    let (current, mesh) = watch::channel(generation(1));
    let (node, pod) = (node_in(2, mesh), pod(&[]));
    let workers = [0, 1].map(|index| Worker::new(node.clone(), index, Arc::default()));
    for worker in &workers {
        for port in 2..=GENERATIONS {
            (0..CONNECTIONS).for_each(|_| open(worker.seat(&pod), port));
        }
    }
    let (reporters, Reports { mut reports, .. }) = reports(workers.len());
    let mut ledger = Ledger::new(workers.len());
    let starved = Cell::new(false);
    let mut accounts = Vec::new();
    let publishing = async {
        for number in 1..=GENERATIONS {
            ledger.publish(Published::first(number.into(), MeshSize::default()));
            if number > 1 {
                current.send_replace(generation(number));
            }
            accounts.extend(ledger.take(reports.recv().await.unwrap()));
            if number == 1 {
                accounts.extend(ledger.take(reports.recv().await.unwrap()));
            }
            // From here on the first worker applies every generation, the second worker none.
            starved.set(true);
        }
        starved.set(false);
        accounts.extend(ledger.take(reports.recv().await.unwrap()));
    };
    let enforcing = async {
        tokio::join!(
            workers[0].enforce(&reporters[0]),
            unless_starved(&starved, workers[1].enforce(&reporters[1]))
        )
    };
    tokio::select! {
        () = publishing => {}
        _ = enforcing => unreachable!("the mesh is open"),
    }
    let accounts: Vec<_> = accounts.iter().map(Published::facts).collect();
    let generations = (1..=u64::from(GENERATIONS)).map(|number| match number {
        1 => (1, 0, false),
        // The last generation terminates all connections of the starved worker.
        number if number == u64::from(GENERATIONS) => {
            (number, CONNECTIONS * usize::from(GENERATIONS), false)
        }
        number => (number, CONNECTIONS, true),
    });
    assert_eq!(accounts, generations.collect::<Vec<_>>());
    assert_eq!(pod.connections.open(), 0);
}
