//! What counts connections: ztunnel's `istio_tcp_*` with their labels.
//!
//! To find a counter by its labels took a fifth of what a new connection costs, for there are 23 of them to be made, hashed and
//! compared. So each worker keeps what it has found ([`KnownSeries`]), under what the labels are made from.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use foldhash::fast::RandomState;
use metrics::{
    Counter, Gauge, Label, SharedString, counter, describe_counter, describe_gauge, gauge,
};
use underpass_config::{Name, Service, SpiffeId, Workload};

use crate::record::{Direction, Party};

const OPENED: &str = "istio_tcp_connections_opened_total";
const CLOSED: &str = "istio_tcp_connections_closed_total";
const FAILED: &str = "istio_tcp_connections_failed_total";
const SENT: &str = "istio_tcp_sent_bytes_total";
const RECEIVED: &str = "istio_tcp_received_bytes_total";
const OPEN: &str = "istio_tcp_sockets_open";

/// What a label says of what is not known; ztunnel's word.
const UNKNOWN: &str = "unknown";
/// The flags of a connection that nothing was wrong with.
const NO_FLAGS: &str = "-";
/// How many series a worker keeps, some 500 bytes each. More pairs of workloads than that, and all are looked up again now and
/// then.
const KNOWN_AT_MOST: usize = 1024;

pub(super) fn describe() {
    describe_counter!(OPENED, "TCP connections opened.");
    describe_counter!(CLOSED, "TCP connections closed, having been opened.");
    describe_counter!(FAILED, "TCP connections that could not be opened.");
    describe_counter!(SENT, "Bytes sent to clients: responses.");
    describe_counter!(RECEIVED, "Bytes received from clients: requests.");
    describe_gauge!(OPEN, "TCP connections open now.");
}

/// What all labels of a connection but the flags are made from. Workloads and services are the same if they are the same value of
/// the same mesh: they are held, so that their addresses are nobody else's.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Labels {
    direction: Direction,
    source: Side,
    destination: Side,
    service: Value<Service>,
    mutual_tls: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Side {
    workload: Value<Workload>,
    identity: Option<SpiffeId>,
}

/// Compared by its address.
#[derive(Debug, Clone)]
struct Value<T>(Option<Arc<T>>);

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
        let side = |party: &Party| Side {
            workload: Value(party.workload.clone()),
            identity: party.identity.clone(),
        };
        Self {
            direction,
            source: side(source),
            destination: side(destination),
            service: Value(service.cloned()),
            mutual_tls,
        }
    }

    fn with_flags(&self, flags: &'static str) -> Vec<Label> {
        let Self { source, destination, mutual_tls, .. } = self;
        let service = |field: fn(&Service) -> &Name| {
            shared(self.service.0.as_deref().map(|service| field(service).clone()))
        };
        let mut labels = vec![
            self.reporter(),
            Label::from_static_parts("request_protocol", "tcp"),
            Label::from_static_parts(
                "connection_security_policy",
                if *mutual_tls { "mutual_tls" } else { UNKNOWN },
            ),
            Label::new("destination_service", service(|s| &s.hostname)),
            Label::new("destination_service_name", service(|s| &s.name)),
            Label::new("destination_service_namespace", service(|s| &s.namespace)),
            Label::from_static_parts("response_flags", flags),
        ];
        for (name, side) in [("source", source), ("destination", destination)] {
            let workload = side.workload.0.as_deref();
            let mut label = |field: &str, value: Option<Name>| {
                let value = value.filter(|value| !value.is_empty());
                labels.push(Label::new(format!("{name}_{field}"), shared(value)));
            };
            let of = |field: fn(&Workload) -> &Name| workload.map(|w| field(w).clone());
            label("workload", of(|w| &w.workload_name));
            label("workload_namespace", of(|w| &w.namespace));
            label("canonical_service", of(|w| &w.canonical_name));
            label("canonical_revision", of(|w| &w.canonical_revision));
            label("app", of(|w| &w.canonical_name));
            label("version", of(|w| &w.canonical_revision));
            label("cluster", of(|w| &w.cluster_id));
            label("principal", side.identity.as_ref().map(|id| id.to_string().into()));
        }
        labels
    }

    fn reporter(&self) -> Label {
        let reporter = match self.direction {
            Direction::Inbound => "destination",
            Direction::Outbound => "source",
        };
        Label::from_static_parts("reporter", reporter)
    }
}

/// A name as a label's value, without a copy of it.
fn shared(name: Option<Name>) -> SharedString {
    name.map_or_else(|| SharedString::const_str(UNKNOWN), SharedString::from_shared)
}

/// The series that one worker has counted in.
#[derive(Debug, Default)]
pub(crate) struct KnownSeries(Mutex<Known>);

/// With a fast hash: the keys come from the mesh and from proven identities.
type Known = HashMap<Labels, Arc<Series>, RandomState>;

impl KnownSeries {
    fn get(&self, labels: Labels) -> Arc<Series> {
        let mut known = self.lock();
        if known.len() >= KNOWN_AT_MOST && !known.contains_key(&labels) {
            known.clear();
        }
        known.entry(labels).or_insert_with_key(|labels| Arc::new(Series::find(labels))).clone()
    }

    /// Lets go of all, and of the mesh that they are of.
    pub(crate) fn forget(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        // What is in there is whole at any time; only its worker's thread ever locks it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What connections with the same labels count in.
pub(crate) struct Series {
    opened: Counter,
    closed: Counter,
    sent: Counter,
    received: Counter,
    open: Gauge,
}

impl std::fmt::Debug for Series {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Series")
    }
}

impl Series {
    /// Counts a connection as opened.
    pub(crate) fn opened(labels: Labels, known: &KnownSeries) -> Arc<Self> {
        let series = known.get(labels);
        series.opened.increment(1);
        series.open.increment(1);
        series
    }

    pub(crate) fn sent(&self, bytes: u64) {
        self.sent.increment(bytes);
    }

    pub(crate) fn received(&self, bytes: u64) {
        self.received.increment(bytes);
    }

    /// Counts the connection as closed; its labels are wanted only if something was wrong with it.
    pub(crate) fn closed(&self, flags: &'static str, labels: impl FnOnce() -> Labels) {
        self.open.decrement(1);
        if flags == NO_FLAGS {
            self.closed.increment(1);
        } else {
            counter!(CLOSED, labels().with_flags(flags)).increment(1);
        }
    }

    fn find(labels: &Labels) -> Self {
        let flagged = labels.with_flags(NO_FLAGS);
        Self {
            opened: counter!(OPENED, flagged.clone()),
            closed: counter!(CLOSED, flagged.clone()),
            sent: counter!(SENT, flagged.clone()),
            received: counter!(RECEIVED, flagged),
            open: gauge!(OPEN, vec![labels.reporter()]),
        }
    }
}

/// Counts a connection that was never opened.
pub(crate) fn failed(labels: &Labels, flags: &'static str) {
    counter!(FAILED, labels.with_flags(flags)).increment(1);
}

#[cfg(test)]
mod tests {
    use underpass_config::Mesh;

    use super::*;

    /// As a state of the mesh has it.
    fn workload() -> Arc<Workload> {
        let mesh = Mesh::from_text("mesh", "workloads: [{name: a, workloadIps: [10.0.0.1]}]");
        mesh.unwrap().workloads()[0].clone()
    }

    fn to(workload: &Arc<Workload>) -> Labels {
        let destination = Party { workload: Some(workload.clone()), ..Party::default() };
        Labels::new(Direction::Outbound, &Party::default(), &destination, None, true)
    }

    #[test]
    fn a_series_is_found_once_and_no_other_mesh_or_end_has_it() {
        let known = KnownSeries::default();
        let (here, again) = (workload(), workload());
        let first = Series::opened(to(&here), &known);
        assert!(Arc::ptr_eq(&first, &Series::opened(to(&here), &known)));
        assert!(!Arc::ptr_eq(&first, &Series::opened(to(&again), &known)));
        let plain = Labels { mutual_tls: false, ..to(&here) };
        assert!(!Arc::ptr_eq(&first, &Series::opened(plain, &known)));
        let Labels { source, destination, .. } = to(&here);
        let back = Labels { source: destination, destination: source, ..to(&here) };
        assert!(!Arc::ptr_eq(&first, &Series::opened(back, &known)));
    }

    #[test]
    fn what_is_known_is_bounded_and_holds_no_mesh_that_is_gone() {
        let known = KnownSeries::default();
        let workloads: Vec<_> = (0..=KNOWN_AT_MOST).map(|_| workload()).collect();
        workloads.iter().for_each(|one| drop(known.get(to(one))));
        assert_eq!(known.lock().len(), 1);
        known.forget();
        assert!(workloads.iter().all(|one| Arc::strong_count(one) == 1));
    }
}
