//! The spans of connections: of the connection, and of its steps.
//!
//! A worker records the times of a connection, and queues them at its end. The exporter
//! (`otlp.rs`) makes spans of them. Without an exporter, nothing is recorded.
//!
//! ```text
//! outbound ─ policy, connect ─ handshake, copy
//! └ inbound (the peer; its parent is in `traceparent`) ─ policy, connect, copy
//! ```

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc;
use tokio::time::Instant;
use underpass_config::{Quoted, Ratio, Service};
use underpass_hbone::TraceParent;

use crate::error::ProxyError;
use crate::observe::ended::{Durations, Ended};
use crate::observe::metrics;
use crate::observe::party::{Direction, Party};

/// The maximum number of connections whose spans wait for the exporter.
const MAX_QUEUED: usize = 2048;

/// Selects the connections whose spans are recorded. By default none is.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tracer(Option<Enabled>);

#[derive(Debug, Clone)]
struct Enabled {
    ratio: Ratio,
    queue: mpsc::Sender<ConnectionSpans>,
}

/// The spans of one connection, if they are recorded.
#[derive(Debug, Clone, Default)]
pub(crate) struct Spans(Option<Arc<Recording>>);

#[derive(Debug)]
struct Recording {
    queue: mpsc::Sender<ConnectionSpans>,
    own: TraceParent,
    parent: Option<NonZeroU64>,
    /// Locked by the connection's worker only.
    steps: Mutex<Vec<Step>>,
}

/// A part of the work for a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StepKind {
    /// The decision whether the connection is allowed.
    Policy,
    /// Connecting to the next hop, with the CONNECT request in a tunnel.
    Connect,
    /// The TLS handshake of a tunnel that was opened for the connection.
    Handshake,
}

/// A step that has ended.
#[derive(Debug)]
pub(crate) struct Step {
    pub(crate) kind: StepKind,
    pub(crate) began: Instant,
    pub(crate) ended: Instant,
    /// The reason code of a failure.
    pub(crate) failure: Option<&'static str>,
}

/// The recorded spans of a connection that has ended.
#[derive(Debug)]
pub(crate) struct ConnectionSpans {
    /// The trace, and the id of the connection's span.
    pub(crate) own: TraceParent,
    /// The span of the client's proxy.
    pub(crate) parent: Option<NonZeroU64>,
    pub(crate) direction: Direction,
    pub(crate) source: Party,
    pub(crate) destination: Party,
    pub(crate) service: Option<Arc<Service>>,
    pub(crate) hbone: Option<SocketAddr>,
    pub(crate) accepted: Instant,
    pub(crate) durations: Durations,
    pub(crate) sent: u64,
    pub(crate) received: u64,
    /// The reason code and the text of a failure.
    pub(crate) failure: Option<(&'static str, Quoted)>,
    pub(crate) steps: Vec<Step>,
}

impl Tracer {
    /// Records this fraction of the connections. Their spans arrive at the receiver.
    pub(crate) fn new(ratio: Ratio) -> (Self, mpsc::Receiver<ConnectionSpans>) {
        let (queue, spans) = mpsc::channel(MAX_QUEUED);
        (Self(Some(Enabled { ratio, queue })), spans)
    }

    /// Starts the trace of a caught connection.
    pub(crate) fn start(&self) -> (TraceParent, Spans) {
        let own = TraceParent::new();
        match &self.0 {
            Some(enabled) if enabled.ratio.includes(random_bits(own)) => {
                let own = own.sampled();
                (own, enabled.record(own, None))
            }
            _ => (own, Spans::default()),
        }
    }

    /// Continues the trace of a peer, which decides whether it is recorded. Without one, starts a
    /// trace.
    pub(crate) fn follow(&self, peer: Option<TraceParent>) -> (Option<TraceParent>, Spans) {
        match (&self.0, peer) {
            (Some(enabled), Some(peer)) if peer.is_sampled() => {
                let own = peer.child();
                (Some(own), enabled.record(own, Some(peer.parent_id())))
            }
            (None, peer) | (Some(_), peer @ Some(_)) => (peer, Spans::default()),
            (Some(_), None) => {
                let (own, spans) = self.start();
                (Some(own), spans)
            }
        }
    }
}

impl Enabled {
    fn record(&self, own: TraceParent, parent: Option<NonZeroU64>) -> Spans {
        let (queue, steps) = (self.queue.clone(), Mutex::default());
        Spans(Some(Arc::new(Recording { queue, own, parent, steps })))
    }
}

impl Spans {
    /// The start of a step; `None` if the connection is not recorded.
    pub(crate) fn begin(&self) -> Option<Instant> {
        self.0.as_ref().map(|_| Instant::now())
    }

    /// Records a step that began at `began`.
    pub(crate) fn end<T>(
        &self,
        kind: StepKind,
        began: Option<Instant>,
        outcome: &Result<T, ProxyError>,
    ) {
        if let (Some(recording), Some(began)) = (&self.0, began) {
            let failure = outcome.as_ref().err().map(|error| error.reason().code);
            recording.steps().push(Step { kind, began, ended: Instant::now(), failure });
        }
    }

    /// Records the handshake of a tunnel, if it ended after `since`.
    pub(crate) fn handshake(&self, since: Option<Instant>, [began, ended]: [Instant; 2]) {
        if let (Some(recording), true) = (&self.0, since.is_none_or(|since| ended > since)) {
            recording.steps().push(Step { kind: StepKind::Handshake, began, ended, failure: None });
        }
    }

    /// Queues the spans of a connection that has ended. `accepted` is the time of its accept.
    pub(crate) fn finish(
        &self,
        accepted: Instant,
        service: Option<&Arc<Service>>,
        ended: &Ended<'_>,
    ) {
        let Some(recording) = &self.0 else { return };
        let spans = ConnectionSpans {
            own: recording.own,
            parent: recording.parent,
            direction: ended.direction,
            source: ended.source.clone(),
            destination: ended.destination.clone(),
            service: service.cloned(),
            hbone: ended.hbone,
            accepted,
            durations: ended.durations,
            sent: ended.sent,
            received: ended.received,
            failure: ended.error.map(|error| (error.reason().code, Quoted::chain(error))),
            steps: std::mem::take(&mut *recording.steps()),
        };
        if recording.queue.try_send(spans).is_err() {
            metrics::telemetry_dropped("traces", 1);
        }
    }
}

impl Recording {
    fn steps(&self) -> MutexGuard<'_, Vec<Step>> {
        // No code panics while it holds the lock.
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The random bits of a trace id, which decide about sampling (W3C Trace Context level 2).
pub(crate) fn random_bits(trace: TraceParent) -> u64 {
    let [_, _, _, _, _, _, _, _, low @ ..] = trace.trace_id().get().to_be_bytes();
    u64::from_be_bytes(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(flags: &str) -> TraceParent {
        format!("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-{flags}").parse().unwrap()
    }

    fn is_recorded(spans: &Spans) -> bool {
        spans.begin().is_some()
    }

    #[test]
    fn sampling_flag_of_the_peer_decides() {
        for (ratio, flags) in [("0", "01"), ("1", "01"), ("0", "00"), ("1", "00")] {
            let (tracer, _queue) = Tracer::new(ratio.parse().unwrap());
            let (own, spans) = tracer.follow(Some(peer(flags)));
            assert_eq!(is_recorded(&spans), flags == "01", "{ratio} {flags}");
            assert_eq!(own.unwrap().trace_id(), peer(flags).trace_id());
            assert_eq!(own.unwrap().parent_id() == peer(flags).parent_id(), flags == "00");
        }
    }

    #[test]
    fn ratio_decides_about_own_traces() {
        for (ratio, expected) in [("0", false), ("1", true)] {
            let (tracer, _queue) = Tracer::new(ratio.parse().unwrap());
            let (own, spans) = tracer.start();
            assert_eq!((own.is_sampled(), is_recorded(&spans)), (expected, expected));
            assert_eq!(is_recorded(&tracer.follow(None).1), expected);
        }
    }

    #[test]
    fn nothing_is_recorded_without_a_collector() {
        let tracer = Tracer::default();
        assert!(!is_recorded(&tracer.start().1));
        assert!(!tracer.start().0.is_sampled());
        let (own, spans) = tracer.follow(Some(peer("01")));
        assert_eq!((own, is_recorded(&spans)), (Some(peer("01")), false));
        assert_eq!(tracer.follow(None).0, None);
    }

    #[test]
    fn spans_beyond_the_queue_are_dropped_and_counted() {
        let party = Party::default();
        let durations =
            Durations { connect: None, first_byte: None, total: std::time::Duration::ZERO };
        let ended = Ended {
            direction: Direction::Outbound,
            source: &party,
            destination: &party,
            service: None,
            hbone: None,
            trace: None,
            durations,
            sent: 0,
            received: 0,
            error: Some(&ProxyError::Drained),
        };
        let (tracer, mut queue) = Tracer::new(Ratio::ALL);
        let metrics = crate::node::testing::metrics_after(|| {
            for _ in 0..MAX_QUEUED + 3 {
                let (_, spans) = tracer.start();
                let began = spans.begin();
                spans.end(StepKind::Policy, began, &Ok(()));
                spans.finish(Instant::now(), None, &ended);
            }
        });
        assert!(
            metrics.contains("underpass_telemetry_dropped_total{signal=\"traces\"} 3"),
            "{metrics}"
        );
        let first = queue.try_recv().unwrap();
        assert_eq!(first.failure.as_ref().map(|(code, _)| *code), Some("drained"));
        assert!(matches!(&first.steps[..], [Step { kind: StepKind::Policy, failure: None, .. }]));
    }
}
