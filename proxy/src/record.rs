//! One record per connection: opened at accept, counted and logged exactly once at the end, however it ends.
//!
//! Names of the access log's fields and of the metrics are ztunnel's, so that dashboards and parsers keep working.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use http::HeaderMap;
use tokio::time::Instant;
use underpass_config::{Quoted, Service, SpiffeId, Workload};
use underpass_hbone::{Baggage, LogLimit, TraceParent};

use crate::error::{Fault, ProxyError};
use crate::metrics::{self, KnownSeries, Labels, Series};

/// Which way a connection goes, and so who reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Direction {
    Inbound,
    Outbound,
}

impl Direction {
    fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

/// One end of a connection, as far as it is known.
#[derive(Debug, Default, Clone)]
pub(crate) struct Party {
    pub(crate) address: Option<SocketAddr>,
    pub(crate) workload: Option<Arc<Workload>>,
    /// Proven by a handshake, or demanded of one.
    pub(crate) identity: Option<SpiffeId>,
}

/// What is known of a connection, and what it carried.
#[derive(Debug)]
pub(crate) struct ConnectionRecord {
    direction: Direction,
    opened: Instant,
    pub(crate) source: Party,
    pub(crate) destination: Party,
    /// The service that the connection is for, if it is for one.
    pub(crate) service: Option<Arc<Service>>,
    /// The address of the HBONE listener, if a tunnel carries the connection.
    pub(crate) hbone: Option<SocketAddr>,
    /// What it is logged under, here and at the peer.
    trace: Option<TraceParent>,
    /// Who the peer says that the source is, in words for people; used where the mesh does not know.
    claimed: Option<Box<Claim>>,
    series: Option<Arc<Series>>,
    sent: AtomicU64,
    received: AtomicU64,
    outcome: Result<(), ProxyError>,
    /// Whether the log has no line of it: it has too many of the same.
    unlogged: bool,
}

/// What a peer says of the workload that it speaks for, as far as the log has it.
#[derive(Debug)]
struct Claim {
    workload: Option<Quoted>,
    namespace: Quoted,
    cluster: Quoted,
}

impl From<Baggage> for Claim {
    fn from(baggage: Baggage) -> Self {
        Self {
            workload: baggage.workload.map(|(_, name)| Quoted::new(&*name)),
            namespace: Quoted::new(&*baggage.namespace),
            cluster: Quoted::new(&*baggage.cluster),
        }
    }
}

impl ConnectionRecord {
    pub(crate) fn new(direction: Direction, source: Party, destination: Party) -> Self {
        Self {
            direction,
            opened: Instant::now(),
            source,
            destination,
            service: None,
            hbone: None,
            // Who is connected to is told by whoever connects.
            trace: (direction == Direction::Outbound).then(TraceParent::new),
            claimed: None,
            series: None,
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            outcome: Err(ProxyError::Dropped),
            unlogged: false,
        }
    }

    /// The trace that the connection is logged under, here and at the peer.
    pub(crate) fn trace(&self) -> Option<TraceParent> {
        self.trace
    }

    /// Notes what the peer says of the connection; of the source only if the mesh does not know it.
    pub(crate) fn claimed(&mut self, headers: &HeaderMap) {
        self.trace = TraceParent::read(headers);
        if self.source.workload.is_none() {
            self.claimed = Baggage::read(headers).map(|baggage| Box::new(baggage.into()));
        }
    }

    /// Counts the connection as opened; both parties must be known by now.
    pub(crate) fn established(&mut self, known: &KnownSeries) {
        if self.series.is_none() {
            self.series = Some(Series::opened(self.labels(), known));
        }
    }

    /// Counts bytes that went to the client.
    pub(crate) fn sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Relaxed);
        if let Some(series) = &self.series {
            series.sent(bytes as u64);
        }
    }

    /// Counts bytes that came from the client.
    pub(crate) fn received(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Relaxed);
        if let Some(series) = &self.series {
            series.received(bytes as u64);
        }
    }

    /// How many bytes went either way.
    pub(crate) fn moved(&self) -> u64 {
        self.sent.load(Relaxed).wrapping_add(self.received.load(Relaxed))
    }

    /// Closes the record of a client that failed to handshake, or was refused by its handshake.
    /// Anyone can cause one, so that beyond a rate they are only counted.
    pub(crate) fn close_unproven(mut self, error: ProxyError) {
        static LIMIT: LogLimit = LogLimit::new("failed handshakes");
        let reason = error.reason().code;
        metrics::handshake_failed(reason);
        self.unlogged = !LIMIT.admit(reason);
        self.outcome = Err(error);
    }

    /// Closes the record: it is counted and logged here and nowhere else.
    pub(crate) fn close(mut self, outcome: Result<(), ProxyError>) {
        self.outcome = outcome;
    }

    /// Goes on with what was opened, or closes with why it was not.
    pub(crate) fn or_close<T>(self, opened: Result<T, ProxyError>) -> Option<(Self, T)> {
        match opened {
            Ok(opened) => Some((self, opened)),
            Err(error) => {
                self.close(Err(error));
                None
            }
        }
    }

    fn labels(&self) -> Labels {
        let service = self.service.as_ref();
        Labels::new(self.direction, &self.source, &self.destination, service, self.hbone.is_some())
    }

    fn log(&self) {
        let reason = self.outcome.as_ref().err().map(ProxyError::reason);
        let error = self.outcome.as_ref().err().map(|error| Quoted::chain(error));
        let error = error.as_ref().map(Quoted::as_str);
        let source = PartyFields::new(&self.source, self.claimed.as_deref());
        let destination = PartyFields::new(&self.destination, None);
        // As ztunnel has it: the address of the connection itself, and the one that the tunnel leads to.
        let target = self.destination.address;
        let (address, tunnelled) = match self.hbone {
            Some(hbone) => (Some(hbone), target),
            None => (target, None),
        };
        macro_rules! access {
            ($level:expr, $message:literal) => {
                tracing::event!(
                    target: "access",
                    $level,
                    src.addr = self.source.address.map(tracing::field::display),
                    src.workload = source.workload,
                    src.namespace = source.namespace,
                    src.identity = source.identity,
                    src.cluster = source.cluster,
                    dst.addr = address.map(tracing::field::display),
                    dst.hbone_addr = tunnelled.map(tracing::field::display),
                    dst.service = self.service.as_ref().map(|service| &*service.hostname),
                    dst.workload = destination.workload,
                    dst.namespace = destination.namespace,
                    dst.identity = destination.identity,
                    dst.cluster = destination.cluster,
                    direction = self.direction.as_str(),
                    trace_id = self.trace.map(|trace| format!("{:032x}", trace.trace_id())),
                    bytes_sent = self.sent.load(Relaxed),
                    bytes_recv = self.received.load(Relaxed),
                    duration = format!("{}ms", self.opened.elapsed().as_millis()),
                    reason = reason.map(|reason| reason.code),
                    error,
                    $message
                )
            };
        }
        match reason.map(|reason| reason.fault) {
            None => access!(tracing::Level::INFO, "connection complete"),
            Some(Fault::Client) => access!(tracing::Level::WARN, "connection failed"),
            Some(Fault::Peer | Fault::Us) => access!(tracing::Level::ERROR, "connection failed"),
        }
    }
}

/// What the access log tells of one end.
struct PartyFields<'a> {
    workload: Option<&'a str>,
    namespace: Option<&'a str>,
    cluster: Option<&'a str>,
    identity: Option<String>,
}

impl<'a> PartyFields<'a> {
    /// What the mesh knows goes before what the party says of itself.
    fn new(party: &'a Party, claimed: Option<&'a Claim>) -> Self {
        let identity = party.identity.as_ref().map(ToString::to_string);
        let text = |text: &'a Quoted| Some(text.as_str()).filter(|text| !text.is_empty());
        match (&party.workload, claimed) {
            (Some(workload), _) => Self {
                workload: Some(&*workload.name),
                namespace: Some(&*workload.namespace),
                cluster: Some(&*workload.cluster_id),
                identity,
            },
            (None, Some(claimed)) => Self {
                workload: claimed.workload.as_ref().and_then(text),
                namespace: text(&claimed.namespace),
                cluster: text(&claimed.cluster),
                identity,
            },
            (None, None) => Self { workload: None, namespace: None, cluster: None, identity },
        }
    }
}

impl Drop for ConnectionRecord {
    /// A record that nobody closed (its task was cancelled) is counted and logged as dropped.
    fn drop(&mut self) {
        let flags = self.outcome.as_ref().err().map_or("-", |error| error.reason().flags);
        match &self.series {
            Some(series) => series.closed(flags, || self.labels()),
            None => metrics::failed(&self.labels(), flags),
        }
        if !self.unlogged {
            self.log();
        }
    }
}
