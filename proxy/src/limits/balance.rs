//! Which worker serves a new connection: the least loaded one, unless another already holds a tunnel to its destination.
//!
//! Every worker has a pool of its own, so a quiet pair of peers would pay for a tunnel per worker if connections were
//! spread blindly; a busy pair is spread over several tunnels, and so over several cores.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use underpass_hbone::Budget;

/// By how many connections a worker with a tunnel may exceed the least loaded one and still be preferred: a handful is
/// cheaper to carry in one thread than another handshake and another tunnel are.
const AFFINITY_SLACK: usize = 4;

/// The load of every worker, and which workers hold tunnels to which peer.
#[derive(Debug)]
pub(crate) struct Balance {
    loads: Vec<Budget>,
    /// What one worker may serve at most.
    limit: usize,
    /// For each peer, how many tunnels each worker holds to it; entries go with their last tunnel.
    tunnels: Mutex<HashMap<IpAddr, Vec<usize>>>,
}

impl Balance {
    pub(crate) fn new(workers: usize, limit: usize) -> Arc<Self> {
        let loads = (0..workers.max(1)).map(|_| Budget::new(limit)).collect();
        Arc::new(Self { loads, limit, tunnels: Mutex::default() })
    }

    /// What all workers may serve together.
    pub(super) fn total(&self) -> usize {
        self.loads.len().saturating_mul(self.limit)
    }

    /// Chooses a worker for a connection to `peer` and counts it there until the returned load is dropped. `None` if even the
    /// least loaded one serves as much as it may.
    pub(crate) fn assign(self: &Arc<Self>, peer: Option<IpAddr>) -> Option<Load> {
        let loads = || self.loads.iter().map(Budget::used).enumerate();
        let (mut worker, least) = loads().min_by_key(|(_, load)| *load).unwrap_or_default();
        if let Some(peer) = peer {
            let holders = self.holders(peer);
            let holds = |worker: usize| holders.get(worker).is_some_and(|tunnels| *tunnels > 0);
            let most = self.limit.saturating_sub(1).min(least + AFFINITY_SLACK);
            let near = loads().filter(|(w, load)| holds(*w) && *load <= most);
            worker = near.min_by_key(|(_, load)| *load).map_or(worker, |(w, _)| w);
        }
        self.load(worker)
    }

    /// Counts one more connection or stream on `worker`; `None` if it serves as much as it may.
    pub(crate) fn load(self: &Arc<Self>, worker: usize) -> Option<Load> {
        self.loads.get(worker)?.take(1).ok()?;
        Some(Load { balance: self.clone(), worker })
    }

    /// Notes that `worker` has a tunnel to `peer` until the returned value is dropped.
    pub(crate) fn tunnel(self: &Arc<Self>, worker: usize, peer: IpAddr) -> HeldTunnel {
        let workers = self.loads.len();
        self.change(peer, |tunnels| {
            tunnels.resize(workers, 0);
            if let Some(count) = tunnels.get_mut(worker) {
                *count += 1;
            }
        });
        HeldTunnel { balance: self.clone(), worker, peer }
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
pub(crate) struct HeldTunnel {
    balance: Arc<Balance>,
    worker: usize,
    peer: IpAddr,
}

impl Drop for HeldTunnel {
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
    fn a_connection_goes_to_the_least_loaded_worker() {
        let balance = Balance::new(3, usize::MAX);
        let loads: Vec<_> = (0..6).map(|_| balance.assign(None).unwrap()).collect();
        let workers: Vec<_> = loads.iter().map(Load::worker).collect();
        assert_eq!(workers, [0, 1, 2, 0, 1, 2]);
        drop(loads);
        assert_eq!(balance.assign(None).unwrap().worker(), 0);
    }

    #[test]
    fn the_holder_of_a_tunnel_is_preferred_until_it_is_clearly_busier() {
        let balance = Balance::new(2, usize::MAX);
        let tunnel = balance.tunnel(1, PEER);
        let loads: Vec<_> =
            (0..=AFFINITY_SLACK).map(|_| balance.assign(Some(PEER)).unwrap()).collect();
        assert!(loads.iter().all(|load| load.worker() == 1));
        assert_eq!(balance.assign(Some(PEER)).unwrap().worker(), 0, "beyond the slack");
        drop(tunnel);
        drop(loads);
        assert_eq!(balance.assign(Some(PEER)).unwrap().worker(), 0, "the tunnel is gone");
    }

    #[test]
    fn beyond_the_limit_of_every_worker_nothing_is_taken() {
        let balance = Balance::new(2, 3);
        let _tunnel = balance.tunnel(1, PEER);
        let loads: Vec<_> = (0..6).map_while(|_| balance.assign(Some(PEER))).collect();
        let workers: Vec<_> = loads.iter().map(Load::worker).collect();
        assert_eq!(workers, [1, 1, 1, 0, 0, 0], "a tunnel is no reason to go beyond the limit");
        assert!(balance.assign(None).is_none() && balance.load(0).is_none());
        drop(loads);
        assert!(balance.assign(None).is_some() && balance.load(0).is_some());
    }

    #[test]
    fn nothing_is_remembered_of_a_peer_without_tunnels() {
        let balance = Balance::new(2, usize::MAX);
        drop((balance.tunnel(0, PEER), balance.tunnel(1, PEER)));
        assert!(balance.tunnels.lock().unwrap().is_empty());
    }
}
