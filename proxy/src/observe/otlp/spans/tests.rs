//! Tests of the relations, times and attributes of spans.

use underpass_config::Ratio;

use super::*;
use crate::error::ProxyError;
use crate::observe::ended::{Durations, Ended};
use crate::observe::trace::{Spans, Tracer};

const CONNECTED: Durations = Durations {
    connect: Some(Duration::from_millis(3)),
    first_byte: Some(Duration::from_millis(4)),
    total: Duration::from_millis(10),
};

fn party(address: &str) -> Party {
    Party::at_address(address.parse().unwrap())
}

/// The request for one connection with these spans.
fn exported(
    direction: Direction,
    spans: &Spans,
    mut queue: tokio::sync::mpsc::Receiver<ConnectionSpans>,
    error: Option<&ProxyError>,
) -> TracesRequest {
    let (source, destination) = (party("10.0.0.1:1000"), party("10.0.0.2:80"));
    let ended = Ended {
        direction,
        source: &source,
        destination: &destination,
        service: None,
        hbone: Some("10.0.0.2:15008".parse().unwrap()),
        trace: None,
        durations: CONNECTED,
        sent: 6,
        received: 7,
        error,
    };
    spans.finish(Instant::now() - CONNECTED.total, None, &ended);
    let own = OwnService { namespace: "default".to_owned(), name: "client".to_owned() };
    let body = encode(vec![queue.try_recv().unwrap()], &own);
    TracesRequest::decode(body).unwrap()
}

fn all(request: &TracesRequest) -> Vec<&Span> {
    request
        .resource_spans
        .iter()
        .flat_map(|one| &one.scope_spans)
        .flat_map(|one| &one.spans)
        .collect()
}

fn named<'a>(request: &'a TracesRequest, name: &str) -> &'a Span {
    all(request).into_iter().find(|span| span.name == name).unwrap()
}

fn value(attributes: &[KeyValue], key: &str) -> Option<Value> {
    let found = attributes.iter().find(|attribute| attribute.key == key)?;
    found.value.clone()?.value
}

#[test]
fn steps_are_children_of_the_outbound_connection() {
    let (tracer, queue) = Tracer::new(Ratio::ALL);
    let (own, spans) = tracer.start();
    let began = spans.begin();
    spans.end(StepKind::Policy, began, &Ok(()));
    spans.end(StepKind::Connect, began, &Ok(()));
    spans.handshake(None, [Instant::now(); 2]);
    let request = exported(Direction::Outbound, &spans, queue, None);
    let root = named(&request, "outbound connection");
    assert_eq!(root.trace_id, own.trace_id().get().to_be_bytes());
    assert_eq!((&*root.parent_span_id, &root.span_id), (&[][..], &id(own.parent_id())));
    assert_eq!(root.kind, i32::from(SpanKind::Client));
    assert_eq!(root.end_time_unix_nano - root.start_time_unix_nano, 10_000_000);
    for name in ["policy", "connect", "copy"] {
        assert_eq!(named(&request, name).parent_span_id, root.span_id, "{name}");
    }
    let handshake = named(&request, "handshake");
    assert_eq!(handshake.parent_span_id, named(&request, "connect").span_id);
    let copy = named(&request, "copy");
    assert_eq!(copy.end_time_unix_nano - copy.start_time_unix_nano, 7_000_000);
    assert!(
        all(&request).iter().all(|span| span.trace_id == root.trace_id && span.flags == SAMPLED)
    );
    let resource = request.resource_spans[0].resource.clone().unwrap();
    assert_eq!(value(&resource.attributes, "service.name"), Some("client".into()));
    for (key, expected) in [
        ("client.address", Value::from("10.0.0.1")),
        ("server.port", 80.into()),
        ("network.peer.port", 15008.into()),
        ("underpass.bytes_received", 7.into()),
        ("underpass.first_byte_ms", Value::Number(4.0)),
    ] {
        assert_eq!(value(&root.attributes, key), Some(expected), "{key}");
    }
    assert_eq!(value(&root.attributes, "error.type"), None);
}

#[test]
fn inbound_connection_and_handshake_are_children_of_the_peer() {
    let (tracer, queue) = Tracer::new(Ratio::ALL);
    let peer = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".parse().unwrap();
    let (_, spans) = tracer.follow(Some(peer));
    spans.handshake(None, [Instant::now(); 2]);
    let request = exported(Direction::Inbound, &spans, queue, None);
    for name in ["inbound connection", "handshake"] {
        let span = named(&request, name);
        assert_eq!(span.parent_span_id, peer.parent_id().get().to_be_bytes(), "{name}");
        assert_eq!(span.trace_id, peer.trace_id().get().to_be_bytes(), "{name}");
    }
    assert_eq!(named(&request, "inbound connection").kind, i32::from(SpanKind::Server));
}

#[test]
fn failure_has_status_and_reason_code() {
    let (tracer, queue) = Tracer::new(Ratio::ALL);
    let (_, spans) = tracer.start();
    let began = spans.begin();
    spans.end(StepKind::Connect, began, &Err::<(), _>(ProxyError::OutOfDescriptors));
    let request = exported(Direction::Outbound, &spans, queue, Some(&ProxyError::OutOfDescriptors));
    for name in ["outbound connection", "connect"] {
        let span = named(&request, name);
        assert_eq!(span.status.as_ref().unwrap().code, i32::from(StatusCode::Error), "{name}");
        assert_eq!(value(&span.attributes, "error.type"), Some("out_of_descriptors".into()));
    }
}
