//! The record of one connection. It is created after connecting, and counted and logged exactly
//! once: when the connection has ended or could not be opened.
//!
//! Fields of the access log and metrics have ztunnel's names, so that dashboards and parsers keep
//! working. Claims about a party have separate names (`party.rs`).

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tokio::time::Instant;
use underpass_config::{Hint, Quoted, Service};
use underpass_hbone::{LogLimit, TraceParent};

use crate::error::{Fault, ProxyError, ResponseFlags};
use crate::observe::metrics;
use crate::observe::metrics::{KnownSeries, Labels, Series};
use crate::observe::party::{Direction, Party};

/// The facts of a connection after it was connected or failed.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    pub(crate) direction: Direction,
    pub(crate) source: Party,
    pub(crate) destination: Party,
    /// The service of the connection, if there is one.
    pub(crate) service: Option<Arc<Service>>,
    /// The address of the HBONE listener, if a tunnel carries the connection.
    pub(crate) hbone: Option<SocketAddr>,
    /// The trace id in the log lines of this proxy and of the peer.
    pub(crate) trace: Option<TraceParent>,
}

impl Facts {
    pub(crate) fn new(direction: Direction, source: Party, destination: Party) -> Self {
        Self { direction, source, destination, service: None, hbone: None, trace: None }
    }

    /// The failure of a connection with these facts.
    pub(crate) fn failed(self, error: ProxyError) -> Box<ConnectFailure> {
        Box::new(ConnectFailure { facts: self, error })
    }

    fn labels(&self) -> Labels {
        let Self { direction, source, destination, service, hbone, .. } = self;
        Labels::new(*direction, source, destination, service.as_ref(), hbone.is_some())
    }
}

/// The error of a connection that could not be opened, and its facts.
#[derive(Debug)]
pub(crate) struct ConnectFailure {
    pub(crate) facts: Facts,
    pub(crate) error: ProxyError,
}

/// The record of an open connection and its byte counts.
#[derive(Debug)]
pub(crate) struct ConnectionRecord {
    facts: Facts,
    accepted: Instant,
    series: Arc<Series>,
    sent: AtomicU64,
    received: AtomicU64,
    outcome: Result<(), ProxyError>,
}

impl ConnectionRecord {
    /// Counts a connection as opened. `accepted` is the time of its accept.
    pub(crate) fn opened(accepted: Instant, facts: Facts, known: &KnownSeries) -> Self {
        let series = known.get(facts.labels());
        series.opened();
        Self {
            facts,
            accepted,
            series,
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            outcome: Err(ProxyError::Dropped),
        }
    }

    /// Counts and logs a connection that could not be opened. `accepted` is the time of its accept.
    pub(crate) fn failed(accepted: Instant, failure: &ConnectFailure, known: &KnownSeries) {
        Self::count_failure(failure, known);
        Self::log_failure(accepted, failure);
    }

    /// Counts and logs a client whose handshake failed, or which was refused after it.
    /// Unauthenticated clients can cause these, so beyond a rate they are only counted.
    pub(crate) fn handshake_failed(
        accepted: Instant,
        failure: &ConnectFailure,
        known: &KnownSeries,
    ) {
        static LIMIT: LogLimit = LogLimit::new("failed handshakes");
        let reason = failure.error.reason().code;
        metrics::handshake_failed(reason);
        Self::count_failure(failure, known);
        if LIMIT.admit(reason) {
            Self::log_failure(accepted, failure);
        }
    }

    fn count_failure(ConnectFailure { facts, error }: &ConnectFailure, known: &KnownSeries) {
        known.get(facts.labels()).failed(error.reason().flags);
    }

    fn log_failure(accepted: Instant, ConnectFailure { facts, error }: &ConnectFailure) {
        log(facts, accepted, [0, 0], Some(error));
    }

    /// The facts of the connection.
    pub(crate) fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Counts bytes that went to the client.
    pub(crate) fn sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Relaxed);
        self.series.sent(bytes as u64);
    }

    /// Counts bytes that came from the client.
    pub(crate) fn received(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Relaxed);
        self.series.received(bytes as u64);
    }

    /// The number of bytes in both directions.
    pub(crate) fn moved(&self) -> u64 {
        self.sent.load(Relaxed).wrapping_add(self.received.load(Relaxed))
    }

    /// Closes the record: counts an opened connection as closed, and logs it. No other function
    /// does.
    pub(crate) fn close(mut self, outcome: Result<(), ProxyError>) {
        self.outcome = outcome;
    }
}

impl Drop for ConnectionRecord {
    /// Counts and logs a record that was not closed, because its task was cancelled, as dropped.
    fn drop(&mut self) {
        let error = self.outcome.as_ref().err();
        self.series.closed(error.map_or(ResponseFlags::None, |error| error.reason().flags));
        let bytes = [self.sent.load(Relaxed), self.received.load(Relaxed)];
        log(&self.facts, self.accepted, bytes, error);
    }
}

/// Writes the access log line of a connection with the bytes `sent` to and `received` from the
/// client.
fn log(facts: &Facts, accepted: Instant, [sent, received]: [u64; 2], error: Option<&ProxyError>) {
    let Facts { direction, source, destination, service, hbone, trace } = facts;
    let reason = error.map(ProxyError::reason);
    let hint = error.and_then(Hint::hint);
    let error = error.map(|error| Quoted::chain(error));
    let error = error.as_ref().map(Quoted::as_str);
    let (src, src_claimed) = (source.proven_names(), source.claimed_names());
    let (dst, dst_claimed) = (destination.proven_names(), destination.claimed_names());
    // As in ztunnel: the address of the TCP connection, and that of the tunnel's target.
    let (address, tunnelled) = match hbone {
        Some(hbone) => (Some(*hbone), destination.address),
        None => (destination.address, None),
    };
    macro_rules! access {
        ($level:expr, $message:literal) => {
            tracing::event!(
                target: "access",
                $level,
                src.addr = source.address.map(tracing::field::display),
                src.workload = src.workload,
                src.namespace = src.namespace,
                src.identity = source.identity.as_ref().map(ToString::to_string),
                src.cluster = src.cluster,
                src.claimed.workload = src_claimed.workload,
                src.claimed.namespace = src_claimed.namespace,
                src.claimed.cluster = src_claimed.cluster,
                dst.addr = address.map(tracing::field::display),
                dst.hbone_addr = tunnelled.map(tracing::field::display),
                dst.service = service.as_ref().map(|service| &*service.hostname),
                dst.workload = dst.workload,
                dst.namespace = dst.namespace,
                dst.identity = destination.identity.as_ref().map(ToString::to_string),
                dst.cluster = dst.cluster,
                dst.claimed.workload = dst_claimed.workload,
                dst.claimed.namespace = dst_claimed.namespace,
                dst.claimed.cluster = dst_claimed.cluster,
                direction = direction.as_str(),
                trace_id = trace.map(|trace| format!("{:032x}", trace.trace_id())),
                bytes_sent = sent,
                bytes_recv = received,
                duration = format!("{}ms", accepted.elapsed().as_millis()),
                reason = reason.map(|reason| reason.code),
                error,
                hint = hint.as_deref(),
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
