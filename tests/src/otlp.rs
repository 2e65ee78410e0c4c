//! A scripted OpenTelemetry collector (OTLP over HTTP). It uses no code of underpass: it decodes
//! the messages by their definition in opentelemetry-proto.

use std::sync::{Arc, Mutex};

use prost::Message;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::Notify;

use crate::or_fail::OrFail;
use crate::peers::{Server, within};
use crate::pods::Pod;

/// A running collector.
#[derive(Debug)]
pub struct ScriptedCollector {
    received: Arc<Received>,
    _server: Server,
}

#[derive(Debug, Default)]
struct Received {
    items: Mutex<Vec<CollectedItem>>,
    arrived: Notify,
}

/// A span or a log record.
#[derive(Debug, Clone)]
pub struct CollectedItem {
    /// The attribute `service.name` of the sender.
    pub service: String,
    /// The name of a span, or the body of a log record.
    pub name: String,
    /// The trace.
    pub trace_id: Vec<u8>,
    /// The span.
    pub span_id: Vec<u8>,
    /// The parent of a span; empty for a root.
    pub parent_span_id: Vec<u8>,
    /// The attributes, as text.
    pub attributes: Vec<(String, String)>,
}

impl CollectedItem {
    /// The value of an attribute.
    #[must_use]
    pub fn attribute(&self, key: &str) -> Option<&str> {
        self.attributes.iter().find(|(name, _)| name == key).map(|(_, value)| &**value)
    }
}

impl ScriptedCollector {
    /// Listens in `pod`, and accepts every request.
    #[must_use]
    pub fn start(pod: &Pod, port: u16) -> Self {
        let received = Arc::<Received>::default();
        let shared = received.clone();
        let serve = move |stream, _| {
            let received = shared.clone();
            async move { receive(stream, &received).await }
        };
        Self { received, _server: Server::start(pod, port, serve) }
    }

    /// Waits for a span or a log record of `service` with this name, the first one.
    pub async fn item(&self, service: &str, name: &str) -> CollectedItem {
        let is_wanted = |item: &&CollectedItem| item.service == service && item.name == name;
        within(&format!("{name} of {service} arrives"), async {
            loop {
                let arrived = self.received.arrived.notified();
                if let Some(found) = self.received.all().iter().find(is_wanted) {
                    return found.clone();
                }
                arrived.await;
            }
        })
        .await
    }
}

impl Received {
    fn all(&self) -> Vec<CollectedItem> {
        self.items.lock().expect("no holder panics").clone()
    }
}

/// Receives one request and answers it.
async fn receive(mut stream: TcpStream, received: &Received) -> std::io::Result<()> {
    let mut request = Vec::new();
    let (head, body) = loop {
        if stream.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
        let end = request.windows(4).position(|bytes| bytes == b"\r\n\r\n");
        let Some((head, body)) = end.and_then(|end| request.split_at_checked(end + 4)) else {
            continue;
        };
        let head = String::from_utf8_lossy(head).to_ascii_lowercase();
        let length = head.split("content-length: ").nth(1).and_then(|rest| rest.lines().next());
        if length.and_then(|length| length.parse().ok()) == Some(body.len()) {
            break (head, body);
        }
    };
    assert!(head.contains("content-type: application/x-protobuf"), "{head}");
    let items = match head.split(' ').nth(1) {
        Some("/v1/traces") => items(body, span),
        Some("/v1/logs") => items(body, record),
        path => unreachable!("a request to {path:?}"),
    };
    received.items.lock().expect("no holder panics").extend(items);
    received.arrived.notify_waiters();
    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await
}

/// Decodes the items of a request. Requests for traces and for logs differ only in their items.
fn items(body: &[u8], decode: impl Fn(&[u8]) -> CollectedItem) -> Vec<CollectedItem> {
    let request = Request::decode(body).or_fail("decode a request");
    let mut collected = Vec::new();
    for Signals { resource, scopes } in request.resources {
        let attributes = texts(resource.unwrap_or_default().attributes);
        let service = attributes.into_iter().find(|(key, _)| key == "service.name");
        let (_, service) = service.unwrap_or_default();
        for item in scopes.iter().flat_map(|scope| &scope.items) {
            collected.push(CollectedItem { service: service.clone(), ..decode(item) });
        }
    }
    collected
}

fn span(item: &[u8]) -> CollectedItem {
    let span = Span::decode(item).or_fail("decode a span");
    assert!(span.start > 0 && span.end >= span.start, "{span:?}");
    CollectedItem {
        service: String::new(),
        name: span.name,
        trace_id: span.trace_id,
        span_id: span.span_id,
        parent_span_id: span.parent_span_id,
        attributes: texts(span.attributes),
    }
}

fn record(item: &[u8]) -> CollectedItem {
    let record = LogRecord::decode(item).or_fail("decode a log record");
    CollectedItem {
        service: String::new(),
        name: record.body.map(text).unwrap_or_default(),
        trace_id: record.trace_id,
        span_id: record.span_id,
        parent_span_id: Vec::new(),
        attributes: texts(record.attributes),
    }
}

fn texts(attributes: Vec<KeyValue>) -> Vec<(String, String)> {
    let pair = |KeyValue { key, value }| (key, value.map(text).unwrap_or_default());
    attributes.into_iter().map(pair).collect()
}

fn text(value: AnyValue) -> String {
    match value.value {
        Some(Value::Text(text)) => text,
        Some(Value::Flag(flag)) => flag.to_string(),
        Some(Value::Integer(number)) => number.to_string(),
        Some(Value::Number(number)) => number.to_string(),
        None => String::new(),
    }
}

#[derive(Clone, PartialEq, Message)]
struct Request {
    #[prost(message, repeated, tag = "1")]
    resources: Vec<Signals>,
}

/// `ResourceSpans` or `ResourceLogs`.
#[derive(Clone, PartialEq, Message)]
struct Signals {
    #[prost(message, optional, tag = "1")]
    resource: Option<Resource>,
    #[prost(message, repeated, tag = "2")]
    scopes: Vec<Items>,
}

/// `ScopeSpans` or `ScopeLogs`.
#[derive(Clone, PartialEq, Message)]
struct Items {
    #[prost(bytes = "vec", repeated, tag = "2")]
    items: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct Resource {
    #[prost(message, repeated, tag = "1")]
    attributes: Vec<KeyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct Span {
    #[prost(bytes = "vec", tag = "1")]
    trace_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    span_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    parent_span_id: Vec<u8>,
    #[prost(string, tag = "5")]
    name: String,
    #[prost(fixed64, tag = "7")]
    start: u64,
    #[prost(fixed64, tag = "8")]
    end: u64,
    #[prost(message, repeated, tag = "9")]
    attributes: Vec<KeyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct LogRecord {
    #[prost(message, optional, tag = "5")]
    body: Option<AnyValue>,
    #[prost(message, repeated, tag = "6")]
    attributes: Vec<KeyValue>,
    #[prost(bytes = "vec", tag = "9")]
    trace_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "10")]
    span_id: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct KeyValue {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(message, optional, tag = "2")]
    value: Option<AnyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct AnyValue {
    #[prost(oneof = "Value", tags = "1, 2, 3, 4")]
    value: Option<Value>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Value {
    #[prost(string, tag = "1")]
    Text(String),
    #[prost(bool, tag = "2")]
    Flag(bool),
    #[prost(int64, tag = "3")]
    Integer(i64),
    #[prost(double, tag = "4")]
    Number(f64),
}
