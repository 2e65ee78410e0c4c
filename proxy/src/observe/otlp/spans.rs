//! Makes OTLP spans of recorded connections, with the attribute names of OpenTelemetry's semantic
//! conventions. What these have no name for begins with `underpass.`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use prost::Message as _;
use tokio::time::Instant;

use super::OwnService;
use super::messages::{
    KeyValue, ResourceSpans, Scope, ScopeSpans, Span, SpanKind, Status, StatusCode, TracesRequest,
    Value, attribute, resource,
};
use crate::observe::party::{Direction, Party};
use crate::observe::trace::{ConnectionSpans, StepKind};

/// The trace flag `sampled`: all exported spans have it.
const SAMPLED: u32 = 1;

/// The wall clock at an instant, to convert others.
#[derive(Debug, Clone, Copy)]
struct Clock {
    instant: Instant,
    /// Since 1970.
    wall: Duration,
}

/// Encodes the request for these connections. Their spans are grouped by the workload of this side.
pub(super) fn encode(connections: Vec<ConnectionSpans>, own: &OwnService) -> Bytes {
    let clock = Clock::now();
    let mut by_service: BTreeMap<(String, String), Vec<Span>> = BTreeMap::new();
    for connection in connections {
        let service = service(&connection, own);
        by_service.entry(service).or_default().extend(spans(&connection, clock));
    }
    let resource_spans = by_service.into_iter().map(|((namespace, name), spans)| ResourceSpans {
        resource: Some(resource(&namespace, &name)),
        scope_spans: vec![ScopeSpans { scope: Some(Scope::own()), spans }],
    });
    TracesRequest { resource_spans: resource_spans.collect() }.encode_to_vec().into()
}

/// The proven namespace and name of the workload of this side.
fn service(connection: &ConnectionSpans, own: &OwnService) -> (String, String) {
    let (here, _) = ends(connection);
    let names = here.proven_names();
    let namespace = names.namespace.unwrap_or(&own.namespace);
    (namespace.to_owned(), names.workload.unwrap_or(&own.name).to_owned())
}

/// The party of this side, and the other one.
fn ends(connection: &ConnectionSpans) -> (&Party, &Party) {
    match connection.direction {
        Direction::Outbound => (&connection.source, &connection.destination),
        Direction::Inbound => (&connection.destination, &connection.source),
    }
}

/// The span of the connection, and those of its steps.
fn spans(connection: &ConnectionSpans, clock: Clock) -> Vec<Span> {
    let (accepted, own) = (connection.accepted, connection.own.parent_id());
    let ended = accepted + connection.durations.total;
    let (name, kind) = match connection.direction {
        Direction::Outbound => ("outbound connection", SpanKind::Client),
        Direction::Inbound => ("inbound connection", SpanKind::Server),
    };
    let mut spans = vec![Span {
        parent_span_id: connection.parent.map(id).unwrap_or_default(),
        name: name.to_owned(),
        kind: kind.into(),
        attributes: attributes(connection),
        status: connection.failure.as_ref().map(|(_, text)| failed(text.as_str())),
        ..span(connection, own, clock, [accepted, ended])
    }];
    let mut connect = own;
    for step in &connection.steps {
        let span_id = connection.own.child().parent_id();
        let (name, parent) = match (step.kind, connection.direction) {
            (StepKind::Policy, _) => ("policy", own),
            (StepKind::Connect, _) => {
                connect = span_id;
                ("connect", own)
            }
            (StepKind::Handshake, Direction::Outbound) => ("handshake", connect),
            // It precedes the request, and is a part of the span of the peer.
            (StepKind::Handshake, Direction::Inbound) => {
                ("handshake", connection.parent.unwrap_or(own))
            }
        };
        spans.push(Span {
            parent_span_id: id(parent),
            name: name.to_owned(),
            attributes: step.failure.map(error_type).into_iter().collect(),
            status: step.failure.map(failed),
            ..span(connection, span_id, clock, [step.began, step.ended])
        });
    }
    if let Some(opened) = connection.durations.connect {
        spans.push(Span {
            parent_span_id: id(own),
            name: "copy".to_owned(),
            ..span(
                connection,
                connection.own.child().parent_id(),
                clock,
                [accepted + opened, ended],
            )
        });
    }
    spans
}

/// An internal span without a name.
fn span(
    connection: &ConnectionSpans,
    span_id: NonZeroU64,
    clock: Clock,
    [began, ended]: [Instant; 2],
) -> Span {
    Span {
        trace_id: connection.own.trace_id().get().to_be_bytes().to_vec(),
        span_id: id(span_id),
        kind: SpanKind::Internal.into(),
        start_time_unix_nano: clock.nanoseconds(began),
        end_time_unix_nano: clock.nanoseconds(ended),
        flags: SAMPLED,
        ..Span::default()
    }
}

fn attributes(connection: &ConnectionSpans) -> Vec<KeyValue> {
    let ConnectionSpans { source, destination, durations, .. } = connection;
    let mut attributes = vec![
        attribute("network.transport", "tcp".into()),
        attribute("underpass.bytes_sent", connection.sent.into()),
        attribute("underpass.bytes_received", connection.received.into()),
    ];
    let mut address = |[ip, port]: [&str; 2], address: Option<SocketAddr>| {
        if let Some(address) = address {
            attributes.push(attribute(ip, address.ip().to_string().into()));
            attributes.push(attribute(port, u64::from(address.port()).into()));
        }
    };
    address(["client.address", "client.port"], source.address);
    address(["server.address", "server.port"], destination.address);
    if connection.direction == Direction::Outbound {
        address(["network.peer.address", "network.peer.port"], connection.hbone);
    }
    let (_, other) = ends(connection);
    let service = connection.service.as_ref().map(|service| &*service.hostname);
    let peer = match connection.direction {
        Direction::Outbound => service.or_else(|| other.proven_names().workload),
        Direction::Inbound => other.proven_names().workload,
    };
    let identity = |party: &Party| party.identity.as_ref().map(ToString::to_string);
    let texts = [
        ("peer.service", peer.map(str::to_owned)),
        ("underpass.source.identity", identity(source)),
        ("underpass.destination.identity", identity(destination)),
    ];
    let texts = texts.into_iter().filter_map(|(key, text)| Some((key, text?)));
    attributes.extend(texts.map(|(key, text)| attribute(key, text.into())));
    if let Some(first_byte) = durations.first_byte {
        attributes.push(attribute(
            "underpass.first_byte_ms",
            Value::Number(first_byte.as_secs_f64() * 1e3),
        ));
    }
    attributes.extend(connection.failure.as_ref().map(|(code, _)| error_type(code)));
    attributes
}

fn error_type(code: &str) -> KeyValue {
    attribute("error.type", code.into())
}

fn failed(message: &str) -> Status {
    Status { message: message.to_owned(), code: StatusCode::Error.into() }
}

fn id(id: NonZeroU64) -> Vec<u8> {
    id.get().to_be_bytes().to_vec()
}

impl Clock {
    fn now() -> Self {
        let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Self { instant: Instant::now(), wall: wall.unwrap_or_default() }
    }

    /// An earlier instant in nanoseconds since 1970.
    fn nanoseconds(self, instant: Instant) -> u64 {
        let wall = self.wall.saturating_sub(self.instant.saturating_duration_since(instant));
        u64::try_from(wall.as_nanos()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests;
