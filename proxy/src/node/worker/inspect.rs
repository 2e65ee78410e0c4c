//! Answers the inspections of a worker, in turn with its other tasks.

use std::sync::{Arc, Weak};

use tokio::time::Instant;
use underpass_hbone::log_panic;

use super::Worker;
use super::seat::Seat;
use crate::decide::subject::Open;
use crate::node::inspection::{Connecting, Connections, Inspection, Summary};
use crate::observe::pod_name::PodName;

impl Worker {
    /// Starts an inspection.
    pub(crate) fn inspect(self: &Arc<Self>, inspection: Inspection) {
        let worker = self.clone();
        match inspection {
            Inspection::Summary { pod, summary } => {
                let answering = async move {
                    // Fails if the caller has stopped waiting.
                    summary.send(worker.summary(pod.as_ref()).await).ok();
                };
                tokio::spawn(log_panic("summary of connections", answering));
            }
            Inspection::Ping(answer) => {
                // Fails if the caller has stopped waiting.
                answer.send(()).ok();
            }
            Inspection::Connections { connections, subscriber } => {
                let answering = async move {
                    let listed = worker.connections().await;
                    if let Some(subscriber) = subscriber {
                        worker.records.recent.subscribe(subscriber);
                    }
                    // Fails if the caller has stopped waiting.
                    connections.send(listed).ok();
                };
                tokio::spawn(log_panic("list of connections", answering));
            }
        }
    }

    async fn summary(&self, pod: Option<&PodName>) -> Summary {
        let recent = &self.records.recent;
        let (failures, failed) = (recent.failures(Instant::now()), recent.failed());
        let mut summary = Summary { failures, failed, ..Summary::default() };
        for seat in self.open_seats() {
            let name = &seat.pod.name;
            if pod.is_some_and(|pod| *pod != **name) {
                continue;
            }
            let visit = seat.registry.visit(|decision| match &decision.open {
                Some(Open::Connection(connection)) => summary.add(connection),
                Some(Open::Tunnel(tunnel)) => {
                    summary.tunnels_of_peers.push((name.clone(), (**tunnel).clone()));
                }
                None => summary.opening += 1,
            });
            visit.await;
            let peers = seat.pool.peers().into_iter();
            summary.tunnels_to_peers.extend(peers.map(|peer| (name.clone(), peer)));
        }
        summary
    }

    async fn connections(&self) -> Connections {
        let mut listed = Connections::default();
        for seat in self.open_seats() {
            let name = &seat.pod.name;
            let visit = seat.registry.visit(|decision| match &decision.open {
                Some(Open::Connection(connection)) => listed.open.push(connection.clone()),
                Some(Open::Tunnel(_)) => {}
                None => listed
                    .connecting
                    .extend(decision.connecting().map(|subject| Connecting::new(name, subject))),
            });
            visit.await;
        }
        listed.ended = self.records.recent.list();
        listed
    }

    fn open_seats(&self) -> Vec<Arc<Seat>> {
        self.seats().values().filter_map(Weak::upgrade).collect()
    }
}
