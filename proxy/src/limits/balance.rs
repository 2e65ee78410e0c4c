//! Assigns each new connection to the least loaded worker, or to a worker with a tunnel to its
//! destination.
//!
//! Each worker has its own pool. Connections of a quiet pair of peers share one tunnel instead of
//! one per worker; those of a busy pair use several tunnels, and so several cores.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use underpass_hbone::Budget;

/// The number of connections by which a worker with a tunnel may exceed the least loaded one. Below
/// it, waiting costs less than another handshake and tunnel.
const AFFINITY_SLACK: usize = 4;

/// The load of every worker, and which workers hold tunnels to which peer.
#[derive(Debug)]
pub(crate) struct Balance {
    loads: Vec<Budget>,
    /// The maximum load of one worker.
    limit: usize,
    /// The number of tunnels of each worker by peer. The last tunnel removes the entry.
    tunnels: Mutex<HashMap<IpAddr, Vec<usize>>>,
}

impl Balance {
    pub(crate) fn new(workers: usize, limit: usize) -> Arc<Self> {
        let loads = (0..workers.max(1)).map(|_| Budget::new(limit)).collect();
        Arc::new(Self { loads, limit, tunnels: Mutex::default() })
    }

    /// The maximum load of all workers together.
    pub(super) fn total(&self) -> usize {
        self.loads.len().saturating_mul(self.limit)
    }

    /// Selects a worker for a connection to `peer`, and counts the connection until the load is
    /// dropped. Returns `None` if all workers are at their limit.
    pub(crate) fn assign(self: &Arc<Self>, peer: Option<IpAddr>) -> Option<Load> {
        let loads = || self.loads.iter().map(Budget::used).enumerate();
        let (mut worker, least) = loads().min_by_key(|(_, load)| *load).unwrap_or_default();
        if let Some(peer) = peer {
            let holders = self.holders(peer);
            let holds = |worker: usize| holders.get(worker).is_some_and(|tunnels| *tunnels > 0);
            let max_load = self.limit.saturating_sub(1).min(least + AFFINITY_SLACK);
            let candidates = loads().filter(|(w, load)| holds(*w) && *load <= max_load);
            worker = candidates.min_by_key(|(_, load)| *load).map_or(worker, |(w, _)| w);
        }
        self.load(worker)
    }

    /// Counts a connection or stream on `worker`; `None` if the worker is at its limit.
    pub(crate) fn load(self: &Arc<Self>, worker: usize) -> Option<Load> {
        self.loads.get(worker)?.take(1).ok()?;
        Some(Load { balance: self.clone(), worker })
    }

    /// Records that `worker` has a tunnel to `peer` until the value is dropped.
    pub(crate) fn tunnel(self: &Arc<Self>, worker: usize, peer: IpAddr) -> WorkerTunnel {
        let workers = self.loads.len();
        self.change(peer, |tunnels| {
            tunnels.resize(workers, 0);
            if let Some(count) = tunnels.get_mut(worker) {
                *count += 1;
            }
        });
        WorkerTunnel { balance: self.clone(), worker, peer }
    }

    fn holders(&self, peer: IpAddr) -> Vec<usize> {
        let tunnels = self.tunnels.lock().unwrap_or_else(PoisonError::into_inner);
        tunnels.get(&peer).cloned().unwrap_or_default()
    }

    fn change(&self, peer: IpAddr, change: impl FnOnce(&mut Vec<usize>)) {
        let mut tunnels = self.tunnels.lock().unwrap_or_else(PoisonError::into_inner);
        let counts = tunnels.entry(peer).or_default();
        change(counts);
        if counts.iter().all(|count| *count == 0) {
            tunnels.remove(&peer);
        }
    }
}

/// One connection's share of a worker's load.
#[derive(Debug)]
pub(crate) struct Load {
    balance: Arc<Balance>,
    worker: usize,
}

impl Load {
    pub(crate) fn worker(&self) -> usize {
        self.worker
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        if let Some(load) = self.balance.loads.get(self.worker) {
            load.give_back(1);
        }
    }
}

/// A tunnel that a worker holds.
#[derive(Debug)]
pub(crate) struct WorkerTunnel {
    balance: Arc<Balance>,
    worker: usize,
    peer: IpAddr,
}

impl Drop for WorkerTunnel {
    fn drop(&mut self) {
        self.balance.change(self.peer, |tunnels| {
            if let Some(count) = tunnels.get_mut(self.worker) {
                *count = count.saturating_sub(1);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));

    #[test]
    fn assigns_connection_to_least_loaded_worker() {
        let balance = Balance::new(3, usize::MAX);
        let loads: Vec<_> = (0..6).map(|_| balance.assign(None).unwrap()).collect();
        let workers: Vec<_> = loads.iter().map(Load::worker).collect();
        assert_eq!(workers, [0, 1, 2, 0, 1, 2]);
        drop(loads);
        assert_eq!(balance.assign(None).unwrap().worker(), 0);
    }

    #[test]
    fn prefers_worker_with_tunnel_within_slack() {
        let balance = Balance::new(2, usize::MAX);
        let tunnel = balance.tunnel(1, PEER);
        let loads: Vec<_> =
            (0..=AFFINITY_SLACK).map(|_| balance.assign(Some(PEER)).unwrap()).collect();
        assert!(loads.iter().all(|load| load.worker() == 1));
        assert_eq!(balance.assign(Some(PEER)).unwrap().worker(), 0, "the slack is used up");
        drop(tunnel);
        drop(loads);
        assert_eq!(balance.assign(Some(PEER)).unwrap().worker(), 0, "the tunnel is gone");
    }

    #[test]
    fn assigns_nothing_beyond_limit_of_every_worker() {
        let balance = Balance::new(2, 3);
        let _tunnel = balance.tunnel(1, PEER);
        let loads: Vec<_> = (0..6).map_while(|_| balance.assign(Some(PEER))).collect();
        let workers: Vec<_> = loads.iter().map(Load::worker).collect();
        assert_eq!(workers, [1, 1, 1, 0, 0, 0], "a tunnel does not raise the limit");
        assert!(balance.assign(None).is_none() && balance.load(0).is_none());
        drop(loads);
        assert!(balance.assign(None).is_some() && balance.load(0).is_some());
    }

    #[test]
    fn last_tunnel_removes_entry_of_peer() {
        let balance = Balance::new(2, usize::MAX);
        drop((balance.tunnel(0, PEER), balance.tunnel(1, PEER)));
        assert!(balance.tunnels.lock().unwrap().is_empty());
    }
}
