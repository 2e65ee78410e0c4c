//! The counters of connections: ztunnel's `istio_tcp_*` with their labels.
//!
//! A [`Series`] has all counters of one set of labels. Looking up a series is the most expensive
//! part of counting a connection, so each worker has a cache (`known.rs`). The cache has weak
//! references: after a series has expired in `registry.rs`, the next connection registers a new
//! one.

use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use underpass_config::{Locality, MetricLabel, Name, Service, SpiffeId, Workload};

use super::exposition::Page;
use super::series_map::Counted;
use crate::error::ResponseFlags;
use crate::observe::party::{Direction, Party};

/// The value of an unknown label, as in ztunnel.
const UNKNOWN: &str = "unknown";

/// The sources of a connection's labels. Workloads and services are compared by pointer. The labels
/// own them, so that no other value gets the same address.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Labels {
    pub(super) direction: Direction,
    pub(super) source: EndLabels,
    pub(super) destination: EndLabels,
    pub(super) service: Value<Service>,
    pub(super) mutual_tls: bool,
}

/// The labels of one end of a connection: its source or its destination.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct EndLabels {
    workload: Value<Workload>,
    identity: Option<SpiffeId>,
}

/// A value that is compared by its memory address.
#[derive(Debug, Clone)]
pub(super) struct Value<T>(Option<Arc<T>>);

impl<T> Value<T> {
    fn address(&self) -> Option<*const T> {
        self.0.as_ref().map(Arc::as_ptr)
    }
}

impl<T> PartialEq for Value<T> {
    fn eq(&self, other: &Self) -> bool {
        self.address() == other.address()
    }
}

impl<T> Eq for Value<T> {}

impl<T> Hash for Value<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.address().hash(state);
    }
}

impl Labels {
    pub(crate) fn new(
        direction: Direction,
        source: &Party,
        destination: &Party,
        service: Option<&Arc<Service>>,
        mutual_tls: bool,
    ) -> Self {
        Self {
            direction,
            source: EndLabels::new(source),
            destination: EndLabels::new(destination),
            service: Value(service.cloned()),
            mutual_tls,
        }
    }

    /// The labels in Prometheus' text format, without `response_flags` and those that are omitted.
    pub(super) fn text(&self, omitted: &[MetricLabel]) -> String {
        let mut text = self.fixed_text();
        let service = self.service.0.as_deref();
        let service = [
            service.map(|service| &*service.hostname),
            service.map(|service| &*service.name),
            service.map(|service| &*service.namespace),
        ];
        put_all(&mut text, &SERVICE, &service, omitted);
        self.source.put(&mut text, &SOURCE, omitted);
        self.destination.put(&mut text, &DESTINATION, omitted);
        text
    }

    /// The labels of the overflow series, in which connections beyond the limit are counted.
    pub(super) fn overflow_text(&self, omitted: &[MetricLabel]) -> String {
        let mut text = self.fixed_text();
        put_all(&mut text, &SERVICE, &[Some("overflow"); 3], omitted);
        for names in [SOURCE, DESTINATION] {
            put_all(&mut text, &names, &[Some("overflow"); 8], omitted);
        }
        text
    }

    fn fixed_text(&self) -> String {
        let reporter = match self.direction {
            Direction::Inbound => "destination",
            Direction::Outbound => "source",
        };
        let mut text = String::with_capacity(1024);
        put(&mut text, "reporter", Some(reporter));
        put(&mut text, "request_protocol", Some("tcp"));
        let policy = self.mutual_tls.then_some("mutual_tls");
        put(&mut text, "connection_security_policy", policy);
        text
    }
}

const SERVICE: [&str; 3] =
    ["destination_service", "destination_service_name", "destination_service_namespace"];
/// Region and zone follow, if they are known.
const SOURCE: [&str; 10] = [
    "source_workload",
    "source_workload_namespace",
    "source_canonical_service",
    "source_canonical_revision",
    "source_app",
    "source_version",
    "source_cluster",
    "source_principal",
    "source_region",
    "source_zone",
];
const DESTINATION: [&str; 10] = [
    "destination_workload",
    "destination_workload_namespace",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_app",
    "destination_version",
    "destination_cluster",
    "destination_principal",
    "destination_region",
    "destination_zone",
];

impl EndLabels {
    fn new(party: &Party) -> Self {
        Self { workload: Value(party.workload.clone()), identity: party.identity.clone() }
    }

    fn put(&self, text: &mut String, names: &[&str; 10], omitted: &[MetricLabel]) {
        let workload = self.workload.0.as_deref();
        let of = |field: fn(&Workload) -> &Name| workload.map(|workload| &**field(workload));
        let principal = self.identity.as_ref().map(ToString::to_string);
        let values = [
            of(|workload| &workload.workload_name),
            of(|workload| &workload.namespace),
            of(|workload| &workload.canonical_name),
            of(|workload| &workload.canonical_revision),
            of(|workload| &workload.canonical_name),
            of(|workload| &workload.canonical_revision),
            of(|workload| &workload.cluster_id),
            principal.as_deref(),
        ];
        put_all(text, names, &values, omitted);
        let Some(Locality { region, zone, .. }) = workload.map(|workload| &*workload.locality)
        else {
            return;
        };
        // As in ztunnel: present only if they are known.
        for (name, value) in names.iter().skip(values.len()).zip([region, zone]) {
            if !value.is_empty() {
                put_all(text, &[name], &[Some(value)], omitted);
            }
        }
    }
}

/// The labels of a source without those that are omitted.
pub(super) fn source_text(source: &Party, omitted: &[MetricLabel]) -> String {
    let mut text = String::new();
    EndLabels::new(source).put(&mut text, &SOURCE, omitted);
    text
}

/// Appends the labels that are not omitted.
fn put_all(text: &mut String, names: &[&str], values: &[Option<&str>], omitted: &[MetricLabel]) {
    for (name, value) in names.iter().zip(values) {
        if !omitted.iter().any(|label| label.name() == *name) {
            put(text, name, *value);
        }
    }
}

/// Appends a label.
pub(super) fn put(text: &mut String, name: &str, value: Option<&str>) {
    let value = value.filter(|value| !value.is_empty()).unwrap_or(UNKNOWN);
    if !text.is_empty() {
        text.push(',');
    }
    text.push_str(name);
    text.push_str("=\"");
    for character in value.chars() {
        match character {
            '\\' => text.push_str("\\\\"),
            '"' => text.push_str("\\\""),
            '\n' => text.push_str("\\n"),
            other => text.push(other),
        }
    }
    text.push('"');
}

/// The counters of the connections with the same labels.
#[derive(Debug)]
pub(crate) struct Series {
    pub(super) direction: Direction,
    /// See [`Labels::text`].
    labels: Arc<str>,
    is_overflow: bool,
    opened: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
    closed: CountersByFlags,
    failed: CountersByFlags,
}

impl Series {
    pub(super) fn new(direction: Direction, labels: Arc<str>, is_overflow: bool) -> Self {
        Self {
            direction,
            labels,
            is_overflow,
            opened: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            closed: CountersByFlags::default(),
            failed: CountersByFlags::default(),
        }
    }

    pub(super) fn is_overflow(&self) -> bool {
        self.is_overflow
    }

    pub(crate) fn opened(&self) {
        self.opened.fetch_add(1, Relaxed);
    }

    pub(crate) fn sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Relaxed);
    }

    pub(crate) fn received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Relaxed);
    }

    /// Counts the end of an opened connection.
    pub(crate) fn closed(&self, flags: ResponseFlags) {
        self.closed.counter(flags).fetch_add(1, Relaxed);
    }

    /// Counts a connection that could not be opened.
    pub(crate) fn failed(&self, flags: ResponseFlags) {
        self.failed.counter(flags).fetch_add(1, Relaxed);
    }

    /// The number of open connections.
    pub(super) fn open(&self) -> u64 {
        // Read this first: every closed connection was counted as opened before.
        let closed = self.closed.sum();
        self.opened.load(Relaxed).saturating_sub(closed)
    }

    /// Appends the lines of one metric.
    pub(super) fn render(&self, metric: Metric, page: &mut Page) {
        let opened = self.opened.load(Relaxed);
        let by_flags = match metric {
            Metric::Closed => &self.closed,
            Metric::Failed => &self.failed,
            Metric::Opened | Metric::Sent | Metric::Received => {
                let value = match metric {
                    Metric::Sent => self.sent.load(Relaxed),
                    Metric::Received => self.received.load(Relaxed),
                    _ => opened,
                };
                if opened > 0 {
                    self.line(metric, ResponseFlags::None, value, page);
                }
                return;
            }
        };
        for (flags, count) in by_flags.all() {
            // With opened but no closed connections, the counter is 0, not absent.
            let is_expected =
                metric == Metric::Closed && flags == ResponseFlags::None && opened > 0;
            if count > 0 || is_expected {
                self.line(metric, flags, count, page);
            }
        }
    }

    fn line(&self, metric: Metric, flags: ResponseFlags, value: u64, page: &mut Page) {
        page.sample(
            metric.name(),
            [&self.labels, ",response_flags=\"", flags.as_str(), "\""],
            value,
        );
    }
}

impl Counted for Series {
    /// Bytes move only while a connection is open and owns the series, so they need not count.
    fn events(&self) -> u64 {
        self.opened.load(Relaxed) + self.closed.sum() + self.failed.sum()
    }
}

/// The metrics that have a line for each series.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Metric {
    Opened,
    Closed,
    Failed,
    Sent,
    Received,
}

impl Metric {
    pub(super) const ALL: [Self; 5] =
        [Self::Opened, Self::Closed, Self::Failed, Self::Sent, Self::Received];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Opened => "istio_tcp_connections_opened_total",
            Self::Closed => "istio_tcp_connections_closed_total",
            Self::Failed => "istio_tcp_connections_failed_total",
            Self::Sent => "istio_tcp_sent_bytes_total",
            Self::Received => "istio_tcp_received_bytes_total",
        }
    }

    pub(super) fn help(self) -> &'static str {
        match self {
            Self::Opened => "TCP connections opened.",
            Self::Closed => "TCP connections that were opened and have closed.",
            Self::Failed => "TCP connections that could not be opened.",
            Self::Sent => "Bytes sent to clients: responses.",
            Self::Received => "Bytes received from clients: requests.",
        }
    }
}

/// A counter for each value of `response_flags`.
#[derive(Debug, Default)]
struct CountersByFlags {
    none: AtomicU64,
    deny: AtomicU64,
    connect: AtomicU64,
    tls_failure: AtomicU64,
    h2_handshake_failure: AtomicU64,
    identity_error: AtomicU64,
}

impl CountersByFlags {
    fn counter(&self, flags: ResponseFlags) -> &AtomicU64 {
        match flags {
            ResponseFlags::None => &self.none,
            ResponseFlags::Deny => &self.deny,
            ResponseFlags::Connect => &self.connect,
            ResponseFlags::TlsFailure => &self.tls_failure,
            ResponseFlags::H2HandshakeFailure => &self.h2_handshake_failure,
            ResponseFlags::IdentityError => &self.identity_error,
        }
    }

    fn all(&self) -> impl Iterator<Item = (ResponseFlags, u64)> {
        ResponseFlags::ALL.into_iter().map(|flags| (flags, self.counter(flags).load(Relaxed)))
    }

    fn sum(&self) -> u64 {
        self.all().map(|(_, count)| count).sum()
    }
}
