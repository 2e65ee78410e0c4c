//! Limits of connections, descriptors, tunnels, handshakes and buffers. [`Budget`]s count them: a
//! total for the node, and a share for each pod and each source address.
//!
//! ```text
//! descriptors   node ─ pod ─ outbound | inbound ─ source      fair at every level
//! connections   node ─ source                                 limits.connections_per_source
//!               worker                                        limits.connections_per_worker
//! tunnels       source, identity                              limits.tunnels_per_…
//! handshakes    node ─ source                                 limits.handshakes; the others wait
//! buffers       node ─ pod                                    limits.buffers
//! ```
//!
//! A connection or stream is admitted once and then holds one [`Ticket`], which counts it
//! everywhere until it is dropped. Refusals at accept are logged together once a second, so that
//! many connections do not cause many log lines.

mod admission;
mod balance;
mod buffers;
mod descriptors;
mod handshakes;
mod pod_descriptors;
mod rate;
mod refusal;

use std::fs;
use std::sync::Arc;

use underpass_config::SpiffeId;
use underpass_hbone::{Budget, KeyedBudget, Share, Sharing};
use underpass_interception::raise_open_files;

pub(crate) use self::admission::{AdmissionKind, PodLimits, Ticket};
pub(crate) use self::balance::{Balance, WorkerTunnel};
pub(crate) use self::buffers::{BufferShare, Buffers};
pub(crate) use self::descriptors::{Descriptors, FdPermit, Shortage};
use self::handshakes::Handshakes;
pub(crate) use self::pod_descriptors::{PodDescriptors, PodDescriptorsPermit, TooManyPods};
pub(crate) use self::rate::Rate;
pub(crate) use self::refusal::Refusal;
use self::refusal::Refusals;
use crate::admin::readiness::Readiness;
use crate::observe::metrics;
use crate::observe::metrics::BudgetUse;

/// The number of open files that is assumed if the process cannot count them: more than at its
/// start.
const ASSUMED_OPEN: usize = 64;

/// The budgets of the node. Clones share the counts.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    pub(crate) accepts_per_second: Option<u32>,
    pub(crate) descriptors: Descriptors,
    pub(crate) balance: Arc<Balance>,
    /// Connections and streams of all workers.
    connections: Arc<Budget>,
    connections_per_source: usize,
    tunnels_per_source: usize,
    identities: Arc<KeyedBudget<SpiffeId>>,
    handshakes: Handshakes,
    buffers: Buffers,
    refusals: Arc<Refusals>,
}

impl Limits {
    /// The budgets of a process with this number of workers.
    pub(crate) fn new(settings: &underpass_config::Limits, workers: usize) -> Self {
        let descriptors = Descriptors::new(open_files_limit(), open_files(), workers);
        let balance = Balance::new(workers, settings.connections_per_worker);
        let per_identity = settings.tunnels_per_identity.unwrap_or(usize::MAX);
        let unlimited = Budget::new(usize::MAX);
        Self {
            accepts_per_second: settings.accepts_per_second,
            connections: Arc::new(Budget::new(balance.total())),
            connections_per_source: settings.connections_per_source.unwrap_or(usize::MAX),
            tunnels_per_source: settings.tunnels_per_source.unwrap_or(usize::MAX),
            identities: Arc::new(KeyedBudget::new(unlimited, per_identity, Sharing::Greedy)),
            handshakes: Handshakes::new(settings.handshakes, settings.handshakes_per_source),
            buffers: Buffers::new(settings.buffers, descriptors.clone()),
            refusals: Arc::default(),
            descriptors,
            balance,
        }
    }

    /// Counts a tunnel of `identity`, after its handshake.
    pub(crate) fn admit_identity(&self, identity: &SpiffeId) -> Result<Share, Refusal> {
        self.identities.take(identity.clone()).map_err(|_| Refusal::TunnelIdentity)
    }

    /// The use of the budgets of the node.
    pub(crate) fn budgets(&self) -> Vec<BudgetUse> {
        let budgets = [
            ("buffers", self.buffers.budget()),
            ("connections", &*self.connections),
            ("descriptors", self.descriptors.budget()),
            ("handshakes", self.handshakes.under_way()),
        ];
        let of = |(name, budget): (_, &Budget)| BudgetUse {
            budget: name,
            used: budget.used(),
            limit: budget.limit(),
        };
        budgets.map(of).to_vec()
    }

    /// Counts a connection that was refused without a response.
    pub(crate) fn refused(&self, refusal: Refusal, listener: &'static str) {
        metrics::connection_refused(refusal.limit(), listener);
        self.refusals.add(refusal);
    }

    /// Logs refusals, and reports pauses of accepting to the log and the readiness probe. Never
    /// returns.
    pub(crate) async fn report(&self, readiness: Readiness) {
        tokio::join!(self.refusals.report(), self.descriptors.report(&readiness));
    }
}

/// The limit of open files.
fn open_files_limit() -> usize {
    // The start has already tried to raise the limit; this call returns it.
    let limit = raise_open_files().unwrap_or(u64::MAX);
    usize::try_from(limit).unwrap_or(usize::MAX)
}

/// The number of open files.
fn open_files() -> usize {
    fs::read_dir("/proc/self/fd").map_or(ASSUMED_OPEN, Iterator::count)
}
