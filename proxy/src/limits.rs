//! What is taken and what is refused: connections of one worker and of one source, how fast they are accepted, and the handshakes
//! and descriptors that they need. Each is a setting (`limits.*`), and what exceeds one is counted.
//!
//! What is refused at accept is not logged by itself: a storm of connections must not become one of log lines.

mod rate;

use std::fmt;
use std::fs;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use underpass_config::SpiffeId;
use underpass_hbone::{CountGuard, CountLimit, HandshakeLimit, SourceGuard, SourceLimit};
use underpass_interception::raise_open_files;

pub(crate) use self::rate::Rate;
use crate::balance::Load;
use crate::descriptors::Descriptors;
use crate::endpoints::Readiness;
use crate::metrics;

/// How often the log tells of refused connections.
const TELL_EVERY: Duration = Duration::from_secs(1);
/// What a process has open that cannot look: more than this one does when it starts.
const SURELY_OPEN: usize = 64;

/// What all workers count together; how much one of them serves, [`crate::balance::Balance`] counts. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    sources: Option<SourceLimit>,
    tunnel_sources: Option<SourceLimit>,
    tunnel_identities: Option<CountLimit<SpiffeId>>,
    pub(crate) accepts_per_second: Option<u32>,
    pub(crate) connections_per_worker: usize,
    pub(crate) handshakes: HandshakeLimit,
    pub(crate) descriptors: Descriptors,
    refusals: Arc<Refusals>,
}

/// What a connection or stream counts as, for as long as it lives.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) load: Load,
    /// Without a limit there is none.
    #[expect(dead_code, reason = "it counts for as long as it lives")]
    pub(crate) source: Option<SourceGuard>,
}

/// Which limit a connection exceeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Even the least loaded worker serves as much as it may.
    Worker,
    /// This address, or its /64, has as many as it may.
    Source(IpAddr),
    /// This address, or its /64, has as many tunnels as it may.
    TunnelSource(IpAddr),
    /// An identity has as many tunnels as it may.
    TunnelIdentity,
}

impl Limits {
    /// Those of this process, which will have so many workers.
    pub(crate) fn new(settings: &underpass_config::Limits, workers: usize) -> Self {
        // The start has raised it already, and failed if it could not.
        let limit = raise_open_files().unwrap_or(u64::MAX);
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let open = fs::read_dir("/proc/self/fd").map_or(SURELY_OPEN, Iterator::count);
        Self {
            sources: settings.connections_per_source.map(SourceLimit::new),
            tunnel_sources: settings.tunnels_per_source.map(SourceLimit::new),
            tunnel_identities: settings.tunnels_per_identity.map(CountLimit::new),
            accepts_per_second: settings.accepts_per_second,
            connections_per_worker: settings.connections_per_worker,
            handshakes: HandshakeLimit::new(settings.handshakes, settings.handshakes_per_source),
            descriptors: Descriptors::new(limit, open, workers),
            refusals: Arc::default(),
        }
    }

    /// One more connection or stream of `source`, which the returned value counts.
    pub(crate) fn admit(&self, source: IpAddr) -> Result<Option<SourceGuard>, Refusal> {
        let admit = |limit: &SourceLimit| limit.admit(source).ok_or(Refusal::Source(source));
        self.sources.as_ref().map(admit).transpose()
    }

    /// One more tunnel of `source`, before its handshake.
    pub(crate) fn admit_tunnel(&self, source: IpAddr) -> Result<Option<SourceGuard>, Refusal> {
        let admit = |limit: &SourceLimit| limit.admit(source).ok_or(Refusal::TunnelSource(source));
        self.tunnel_sources.as_ref().map(admit).transpose()
    }

    /// One more tunnel of `identity`, after its handshake.
    pub(crate) fn admit_identity(
        &self,
        identity: &SpiffeId,
    ) -> Result<Option<CountGuard<SpiffeId>>, Refusal> {
        let admit =
            |limit: &CountLimit<SpiffeId>| limit.admit(identity).ok_or(Refusal::TunnelIdentity);
        self.tunnel_identities.as_ref().map(admit).transpose()
    }

    /// Notes a connection that was refused without a word.
    pub(crate) fn refused(&self, refusal: Refusal, listener: &'static str) {
        metrics::connection_refused(refusal.limit(), listener);
        self.refusals.add(refusal);
    }

    /// Tells the log of what was refused, and log and probes whether accepting pauses; for ever.
    pub(crate) async fn tell(&self, readiness: Readiness) {
        tokio::join!(self.refusals.tell(), self.descriptors.tell(&readiness));
    }
}

impl Refusal {
    pub(crate) fn limit(self) -> &'static str {
        match self {
            Self::Worker => "connections_per_worker",
            Self::Source(_) => "connections_per_source",
            Self::TunnelSource(_) => "tunnels_per_source",
            Self::TunnelIdentity => "tunnels_per_identity",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Worker => f.write_str(
                "the worker serves as many connections as it may (limits.connections_per_worker)",
            ),
            Self::Source(address) => write!(
                f,
                "{address} has as many connections as one address may (limits.connections_per_source): does it never close any?"
            ),
            Self::TunnelSource(address) => write!(
                f,
                "{address} has as many tunnels as one address may (limits.tunnels_per_source)"
            ),
            Self::TunnelIdentity => f.write_str(
                "the identity has as many tunnels as one may (limits.tunnels_per_identity)",
            ),
        }
    }
}

/// The refusals that the log has not told of yet.
#[derive(Debug, Default)]
struct Refusals {
    untold: Mutex<Untold>,
    some: Notify,
}

#[derive(Debug, Default)]
struct Untold {
    of_workers: u64,
    of_sources: u64,
    last_source: Option<IpAddr>,
    of_tunnel_sources: u64,
    last_tunnel_source: Option<IpAddr>,
    of_identities: u64,
}

impl Refusals {
    fn add(&self, refusal: Refusal) {
        {
            let mut untold = self.untold();
            match refusal {
                Refusal::Worker => untold.of_workers += 1,
                Refusal::Source(address) => {
                    untold.of_sources += 1;
                    untold.last_source = Some(address);
                }
                Refusal::TunnelSource(address) => {
                    untold.of_tunnel_sources += 1;
                    untold.last_tunnel_source = Some(address);
                }
                Refusal::TunnelIdentity => untold.of_identities += 1,
            }
        }
        self.some.notify_one();
    }

    async fn tell(&self) {
        loop {
            self.some.notified().await;
            let untold = std::mem::take(&mut *self.untold());
            untold.tell();
            tokio::time::sleep(TELL_EVERY).await;
        }
    }

    fn untold(&self) -> MutexGuard<'_, Untold> {
        // Nothing panics while it is held.
        self.untold.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Untold {
    fn tell(self) {
        if self.of_workers > 0 {
            tracing::warn!(
                refused = self.of_workers,
                "connections are refused, since all workers serve as many as they may (limits.connections_per_worker)"
            );
        }
        if let Some(last) = self.last_source {
            tracing::warn!(
                refused = self.of_sources, %last,
                "connections are refused, since their address has as many as one may (limits.connections_per_source)"
            );
        }
        if let Some(last) = self.last_tunnel_source {
            tracing::warn!(
                refused = self.of_tunnel_sources, %last,
                "tunnels are refused, since their address has as many as one may (limits.tunnels_per_source)"
            );
        }
        if self.of_identities > 0 {
            tracing::warn!(
                refused = self.of_identities,
                "tunnels are refused, since their identity has as many as one may (limits.tunnels_per_identity)"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(per_source: Option<usize>) -> Limits {
        let settings = underpass_config::Limits {
            connections_per_worker: 1,
            connections_per_source: per_source,
            accepts_per_second: None,
            handshakes: 1,
            handshakes_per_source: 1,
            tunnels_per_source: per_source,
            tunnels_per_identity: per_source,
            buffers: 1,
        };
        Limits::new(&settings, 1)
    }

    #[test]
    fn a_source_has_as_many_connections_as_it_may_and_any_number_without_a_limit() {
        let source = IpAddr::from([10, 0, 0, 1]);
        let limited = limits(Some(1));
        let held = limited.admit(source);
        assert!(matches!(held, Ok(Some(_))));
        assert_eq!(limited.admit(source).err(), Some(Refusal::Source(source)));
        let tunnel = limited.admit_tunnel(source);
        assert!(matches!(tunnel, Ok(Some(_))), "tunnels are counted apart");
        assert_eq!(limited.admit_tunnel(source).err(), Some(Refusal::TunnelSource(source)));
        let identity = "spiffe://td/ns/default/sa/client".parse().unwrap();
        let first = limited.admit_identity(&identity);
        assert!(matches!(first, Ok(Some(_))));
        assert_eq!(limited.admit_identity(&identity).err(), Some(Refusal::TunnelIdentity));
        assert!(matches!(limits(None).admit(source), Ok(None)));
        assert!(matches!(limits(None).admit_tunnel(source), Ok(None)));
        assert!(matches!(limits(None).admit_identity(&identity), Ok(None)));
    }

    #[tokio::test(start_paused = true)]
    async fn refusals_are_told_of_once_a_second_and_none_is_left_out() {
        let refusals = Refusals::default();
        let untold = || refusals.untold().of_workers;
        let storm = async {
            let for_a_while = |refused: usize| {
                (0..refused).for_each(|_| refusals.add(Refusal::Worker));
                tokio::time::sleep(TELL_EVERY * 2 / 5)
            };
            for_a_while(1).await;
            assert_eq!(untold(), 0, "the first one is told of at once");
            for_a_while(1000).await;
            assert_eq!(untold(), 1000, "the others when a second has passed");
            for_a_while(0).await;
            assert_eq!(untold(), 0);
        };
        tokio::select! {
            () = refusals.tell() => unreachable!(),
            () = storm => {}
        }
    }
}
