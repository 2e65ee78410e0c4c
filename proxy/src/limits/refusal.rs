//! The limits that a connection can exceed, with one log line per second about each.

use std::fmt;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

/// The interval of log lines about refused connections.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// The limit that a connection, stream or tunnel exceeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// All workers are at their limit.
    Worker,
    /// The source is at its limit of connections.
    Source(IpAddr),
    /// The source has used up its share of the connections of all workers.
    ConnectionShare(IpAddr),
    /// The source has used up its share of the descriptors.
    DescriptorShare(IpAddr),
    /// No descriptor is left for a stream.
    Descriptors,
    /// The source is at its limit of tunnels.
    TunnelSource(IpAddr),
    /// The identity is at its limit of tunnels.
    TunnelIdentity,
}

/// The number of kinds of refusals.
const KIND_COUNT: usize = 7;

impl Refusal {
    /// The metric's label `limit`.
    pub(crate) fn limit(self) -> &'static str {
        match self {
            Self::Worker => "connections_per_worker",
            Self::Source(_) => "connections_per_source",
            Self::ConnectionShare(_) => "connections_share",
            Self::DescriptorShare(_) => "descriptors_share",
            Self::Descriptors => "descriptors",
            Self::TunnelSource(_) => "tunnels_per_source",
            Self::TunnelIdentity => "tunnels_per_identity",
        }
    }

    fn kind(self) -> usize {
        match self {
            Self::Worker => 0,
            Self::Source(_) => 1,
            Self::ConnectionShare(_) => 2,
            Self::DescriptorShare(_) => 3,
            Self::Descriptors => 4,
            Self::TunnelSource(_) => 5,
            Self::TunnelIdentity => 6,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Worker => f.write_str(
                "the worker is at its limit of connections (limits.connections_per_worker)",
            ),
            Self::Source(address) => write!(
                f,
                "{address} is at its limit of connections (limits.connections_per_source)"
            ),
            Self::ConnectionShare(address) => write!(
                f,
                "{address} has used up its share of the connections of all workers (limits.connections_per_worker)"
            ),
            Self::DescriptorShare(address) => {
                write!(
                    f,
                    "{address} has used up its share of the open files (ulimit -n, LimitNOFILE)"
                )
            }
            Self::Descriptors => f.write_str("no open files are left (ulimit -n, LimitNOFILE)"),
            Self::TunnelSource(address) => {
                write!(f, "{address} is at its limit of tunnels (limits.tunnels_per_source)")
            }
            Self::TunnelIdentity => {
                f.write_str("the identity is at its limit of tunnels (limits.tunnels_per_identity)")
            }
        }
    }
}

/// The refusals that are not logged yet.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    pending: Mutex<[Pending; KIND_COUNT]>,
    added: Notify,
}

/// Refusals of one kind.
#[derive(Debug, Clone, Copy, Default)]
struct Pending {
    count: u64,
    last: Option<Refusal>,
}

impl Refusals {
    pub(super) fn add(&self, refusal: Refusal) {
        if let Some(pending) = self.pending().get_mut(refusal.kind()) {
            pending.count += 1;
            pending.last = Some(refusal);
        }
        self.added.notify_one();
    }

    /// Logs refusals, at most one line a second for each kind. Never returns.
    pub(super) async fn report(&self) {
        loop {
            self.added.notified().await;
            let pending = std::mem::take(&mut *self.pending());
            pending.into_iter().for_each(Pending::report);
            tokio::time::sleep(REPORT_INTERVAL).await;
        }
    }

    fn pending(&self) -> MutexGuard<'_, [Pending; KIND_COUNT]> {
        // No code panics while it holds the lock.
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pending {
    fn report(self) {
        let Some(refusal) = self.last else { return };
        let (refused, hint) = (self.count, refusal.hint());
        match refusal {
            Refusal::Worker => tracing::warn!(
                refused,
                hint,
                "connections are refused: all workers are at their limit"
            ),
            Refusal::Source(last) => tracing::warn!(
                refused, %last, hint,
                "connections are refused: their source is at its limit"
            ),
            Refusal::ConnectionShare(last) => tracing::warn!(
                refused, %last, hint,
                "connections are refused: their source has used up its share of the workers' connections"
            ),
            Refusal::DescriptorShare(last) => tracing::warn!(
                refused, %last, hint,
                "connections are refused: their source has used up its share of the open files"
            ),
            Refusal::Descriptors => {
                tracing::warn!(refused, hint, "streams are refused: no open files are left")
            }
            Refusal::TunnelSource(last) => tracing::warn!(
                refused, %last, hint,
                "tunnels are refused: their source is at its limit"
            ),
            Refusal::TunnelIdentity => {
                tracing::warn!(refused, hint, "tunnels are refused: their identity is at its limit")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn logs_every_refusal_once_a_second() {
        let refusals = Refusals::default();
        let pending = || refusals.pending()[Refusal::Worker.kind()].count;
        let storm = async {
            let for_a_while = |refused: usize| {
                (0..refused).for_each(|_| refusals.add(Refusal::Worker));
                tokio::time::sleep(REPORT_INTERVAL * 2 / 5)
            };
            for_a_while(1).await;
            assert_eq!(pending(), 0, "the first one is reported at once");
            for_a_while(1000).await;
            assert_eq!(pending(), 1000, "the others are reported after a second");
            for_a_while(0).await;
            assert_eq!(pending(), 0);
        };
        tokio::select! {
            () = refusals.report() => unreachable!(),
            () = storm => {}
        }
    }
}
