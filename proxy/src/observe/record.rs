//! The record of one connection. It is created after connecting, and counted, logged and traced
//! exactly once: when the connection has ended or could not be opened.
//!
//! Metrics have ztunnel's names, so that dashboards keep working. Claims about a party have
//! separate names (`party.rs`).
//!
//! The registry of connections and the list of recent ones (`recent.rs`) share a part of the
//! record, for `underpass connections`.

mod minutes;
pub(crate) mod recent;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::time::Instant;
use underpass_config::{Policy, Service};
use underpass_hbone::{LogLimit, TraceParent};

pub(crate) use self::minutes::MINUTES;
use self::recent::RecentConnections;
use crate::error::{ProxyError, Reason, ResponseFlags};
use crate::observe::access_log;
use crate::observe::ended::{Durations, Ended};
use crate::observe::metrics;
use crate::observe::metrics::{KnownSeries, Labels, Milestone, Series, SeriesRegistry, Timings};
use crate::observe::party::{Direction, Party};
use crate::observe::pod_name::PodName;
use crate::observe::trace::Spans;

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
    /// The ALLOW policy that matched; `None` without ALLOW policies.
    pub(crate) policy: Option<Arc<Policy>>,
    pub(crate) spans: Spans,
}

impl Facts {
    pub(crate) fn new(direction: Direction, source: Party, destination: Party) -> Self {
        let (service, hbone, trace, policy, spans) = Default::default();
        Self { direction, source, destination, service, hbone, trace, policy, spans }
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

/// Counts and lists the connections of one worker.
#[derive(Debug, Default)]
pub(crate) struct WorkerRecords {
    series: KnownSeries,
    pub(crate) recent: Arc<RecentConnections>,
}

impl WorkerRecords {
    /// The records of one of `workers` workers.
    pub(crate) fn new(series: Arc<SeriesRegistry>, workers: usize) -> Self {
        let recent = Arc::new(RecentConnections::new(workers));
        Self { series: KnownSeries::new(series), recent }
    }

    /// Releases the workloads and services of an old mesh.
    pub(crate) fn forget_series(&self) {
        self.series.forget();
    }

    /// The durations that this worker measures.
    pub(crate) fn timings(&self) -> &Arc<Timings> {
        self.series.timings()
    }

    /// The records of `pod` on this worker.
    pub(crate) fn of_pod<'a>(&'a self, pod: &'a Arc<PodName>) -> PodRecords<'a> {
        PodRecords { pod, worker: self }
    }
}

/// Counts and lists the connections of a pod on a worker.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PodRecords<'a> {
    pod: &'a Arc<PodName>,
    worker: &'a WorkerRecords,
}

/// The part of a record that the lists of connections share.
#[derive(Debug)]
pub(crate) struct TrackedConnection {
    pub(crate) pod: Arc<PodName>,
    pub(crate) facts: Facts,
    pub(crate) accepted: Instant,
    sent: AtomicU64,
    received: AtomicU64,
    /// The time from the accept to the first byte for the client in microseconds; 0: none yet.
    first_byte: AtomicU64,
}

impl TrackedConnection {
    fn new(pod: &Arc<PodName>, facts: Facts, accepted: Instant) -> Arc<Self> {
        let (sent, received, first_byte) = Default::default();
        Arc::new(Self { pod: pod.clone(), facts, accepted, sent, received, first_byte })
    }

    /// The number of bytes sent to and received from the client.
    pub(crate) fn bytes(&self) -> [u64; 2] {
        [self.sent.load(Relaxed), self.received.load(Relaxed)]
    }

    /// The time from the accept to the first byte for the client.
    pub(crate) fn first_byte(&self) -> Option<Duration> {
        let micros = self.first_byte.load(Relaxed);
        (micros > 0).then(|| Duration::from_micros(micros))
    }
}

/// A connection that has ended, or that could not be opened.
#[derive(Debug)]
pub(crate) struct EndedConnection {
    pub(crate) connection: Arc<TrackedConnection>,
    pub(crate) at: Instant,
    pub(crate) was_open: bool,
    pub(crate) outcome: Result<(), ProxyError>,
}

impl EndedConnection {
    /// Why it failed or ended early.
    pub(crate) fn reason(&self) -> Option<Reason> {
        self.outcome.as_ref().err().map(ProxyError::reason)
    }
}

/// The record of an open connection and its byte counts.
#[derive(Debug)]
pub(crate) struct ConnectionRecord {
    connection: Arc<TrackedConnection>,
    /// The time from the accept until the connection was open.
    connect: Duration,
    series: Arc<Series>,
    timings: Arc<Timings>,
    recent: Arc<RecentConnections>,
    is_closed: bool,
}

impl ConnectionRecord {
    /// Counts a connection as opened. `accepted` is the time of its accept.
    pub(crate) fn opened(accepted: Instant, facts: Facts, records: PodRecords<'_>) -> Self {
        let PodRecords { pod, worker: WorkerRecords { series, recent } } = records;
        let (timings, series) = (series.timings().clone(), series.get(facts.labels()));
        series.opened();
        let connection = TrackedConnection::new(pod, facts, accepted);
        recent.opened(&connection);
        let (connect, recent) = (Duration::ZERO, recent.clone());
        let mut record = Self { connection, connect, series, timings, recent, is_closed: false };
        record.connect = record.reached(Milestone::Connected);
        record
    }

    /// Measures the time since the accept.
    fn reached(&self, milestone: Milestone) -> Duration {
        let TrackedConnection { facts, accepted, .. } = &*self.connection;
        let (kind, elapsed) = ((facts.direction, facts.hbone.is_some()), accepted.elapsed());
        let trace_id = facts.trace.map(TraceParent::trace_id);
        self.timings.reached(milestone, kind, elapsed, trace_id);
        elapsed
    }

    /// Counts, lists and logs a connection that could not be opened. `accepted` is the time of its
    /// accept.
    pub(crate) fn failed(accepted: Instant, failure: Box<ConnectFailure>, records: PodRecords<'_>) {
        Self::count_failure(&failure, records);
        Self::list_failure(accepted, failure, records);
    }

    /// Counts, lists and logs a client whose handshake failed, or which was refused after it.
    /// Unauthenticated clients can cause these, so beyond a rate they are only counted.
    pub(crate) fn handshake_failed(
        accepted: Instant,
        failure: Box<ConnectFailure>,
        records: PodRecords<'_>,
    ) {
        static LIMIT: LogLimit = LogLimit::new("failed handshakes");
        let reason = failure.error.reason().code;
        metrics::handshake_failed(reason);
        Self::count_failure(&failure, records);
        if LIMIT.admit(reason) {
            Self::list_failure(accepted, failure, records);
        } else {
            records.worker.recent.count_failure(records.pod, reason, Instant::now());
        }
    }

    fn count_failure(ConnectFailure { facts, error }: &ConnectFailure, records: PodRecords<'_>) {
        let reason = error.reason();
        records.worker.series.get(facts.labels()).failed(reason.flags);
        metrics::connection_error(facts.direction, reason.code);
    }

    fn list_failure(accepted: Instant, failure: Box<ConnectFailure>, records: PodRecords<'_>) {
        let ConnectFailure { facts, error } = *failure;
        let connection = TrackedConnection::new(records.pod, facts, accepted);
        let (at, outcome) = (Instant::now(), Err(error));
        let ended = EndedConnection { connection, at, was_open: false, outcome };
        end(ended, None, &records.worker.recent);
    }

    /// The facts of the connection.
    pub(crate) fn facts(&self) -> &Facts {
        &self.connection.facts
    }

    /// The part that the list of open connections shares.
    pub(crate) fn connection(&self) -> &Arc<TrackedConnection> {
        &self.connection
    }

    /// Counts bytes that went to the client.
    pub(crate) fn sent(&self, bytes: usize) {
        let connection = &*self.connection;
        if connection.sent.fetch_add(bytes as u64, Relaxed) == 0 {
            let micros = self.reached(Milestone::FirstByte).as_micros();
            let micros = u64::try_from(micros).unwrap_or(u64::MAX).max(1);
            connection.first_byte.store(micros, Relaxed);
        }
        self.series.sent(bytes as u64);
    }

    /// Counts bytes that came from the client.
    pub(crate) fn received(&self, bytes: usize) {
        self.connection.received.fetch_add(bytes as u64, Relaxed);
        self.series.received(bytes as u64);
    }

    /// The number of bytes in both directions.
    pub(crate) fn moved(&self) -> u64 {
        let [sent, received] = self.connection.bytes();
        sent.wrapping_add(received)
    }

    /// Closes the record: counts an opened connection as closed, lists and logs it. No other
    /// function does.
    pub(crate) fn close(mut self, outcome: Result<(), ProxyError>) {
        self.end(outcome);
    }

    fn end(&mut self, outcome: Result<(), ProxyError>) {
        self.is_closed = true;
        let reason = outcome.as_ref().err().map(ProxyError::reason);
        self.series.closed(reason.as_ref().map_or(ResponseFlags::None, |reason| reason.flags));
        if let Some(reason) = reason {
            metrics::connection_error(self.facts().direction, reason.code);
        }
        self.reached(Milestone::Ended);
        let (connection, at) = (self.connection.clone(), Instant::now());
        let ended = EndedConnection { connection, at, was_open: true, outcome };
        end(ended, Some(self.connect), &self.recent);
    }
}

impl Drop for ConnectionRecord {
    /// Ends a record that was not closed, because its task was cancelled, as dropped.
    fn drop(&mut self) {
        if !self.is_closed {
            self.end(Err(ProxyError::Dropped));
        }
    }
}

/// Logs, traces and lists a connection that has ended or could not be opened. `connect` is the time
/// from its accept until it was open.
fn end(ended: EndedConnection, connect: Option<Duration>, recent: &RecentConnections) {
    let connection = &*ended.connection;
    let Facts { direction, source, destination, service, hbone, trace, spans, .. } =
        &connection.facts;
    let [sent, received] = connection.bytes();
    let total = ended.at.duration_since(connection.accepted);
    let facts = Ended {
        direction: *direction,
        source,
        destination,
        service: service.as_deref(),
        hbone: *hbone,
        trace: *trace,
        durations: Durations { connect, first_byte: connection.first_byte(), total },
        sent,
        received,
        error: ended.outcome.as_ref().err(),
    };
    access_log::log(&facts);
    spans.finish(connection.accepted, service.as_ref(), &facts);
    recent.ended(ended);
}
