//! Queues the events of the log for the collector, and makes OTLP log records of them.

use std::fmt;
use std::num::NonZeroU128;
use std::sync::OnceLock;
use std::time::SystemTime;

use bytes::Bytes;
use prost::Message as _;
use tokio::sync::mpsc;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer};

use super::OwnService;
use super::messages::{
    KeyValue, LogRecord, LogsRequest, ResourceLogs, Scope, ScopeLogs, Value, attribute, resource,
};
use crate::observe::metrics;

/// The maximum number of events that wait for the exporter.
const MAX_QUEUED: usize = 2048;
/// The maximum length of a text in bytes, above that of any legitimate one.
const MAX_TEXT: usize = 4096;

/// The queue of the exporter, if it runs. Global like the subscriber of the process.
static QUEUE: OnceLock<mpsc::Sender<LogEvent>> = OnceLock::new();

/// An event of the log.
#[derive(Debug)]
pub(super) struct LogEvent {
    time: SystemTime,
    level: Level,
    message: String,
    trace_id: Option<NonZeroU128>,
    attributes: Vec<KeyValue>,
}

/// The layer that queues events while the exporter runs.
#[derive(Debug)]
pub(crate) struct ExportLayer;

/// Starts to queue events.
pub(super) fn start() -> mpsc::Receiver<LogEvent> {
    let (sender, events) = mpsc::channel(MAX_QUEUED);
    // A second exporter gets no events: a process starts one.
    QUEUE.set(sender).ok();
    events
}

/// Encodes the request for these events.
pub(super) fn encode(events: Vec<LogEvent>, own: &OwnService) -> Bytes {
    let log_records = events.into_iter().map(LogRecord::from).collect();
    let request = LogsRequest {
        resource_logs: vec![ResourceLogs {
            resource: Some(resource(&own.namespace, &own.name)),
            scope_logs: vec![ScopeLogs { scope: Some(Scope::own()), log_records }],
        }],
    };
    request.encode_to_vec().into()
}

impl<S: Subscriber> Layer<S> for ExportLayer {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let Some(queue) = QUEUE.get() else { return };
        if queue.try_send(LogEvent::new(event)).is_err() {
            metrics::telemetry_dropped("logs", 1);
        }
    }
}

impl LogEvent {
    fn new(event: &Event<'_>) -> Self {
        let (time, metadata) = (SystemTime::now(), event.metadata());
        let attributes = vec![attribute("target", metadata.target().into())];
        let message = String::new();
        let mut new = Self { time, level: *metadata.level(), message, trace_id: None, attributes };
        event.record(&mut new);
        new
    }

    fn text(&mut self, field: &Field, mut text: String) {
        text.truncate(text.floor_char_boundary(MAX_TEXT));
        match field.name() {
            "message" => self.message = text,
            name => {
                if name == "trace_id" {
                    self.trace_id = u128::from_str_radix(&text, 16).ok().and_then(NonZeroU128::new);
                }
                self.attributes.push(attribute(name, text.into()));
            }
        }
    }

    fn value(&mut self, field: &Field, value: Value) {
        self.attributes.push(attribute(field.name(), value));
    }
}

impl Visit for LogEvent {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.text(field, format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, text: &str) {
        self.text(field, text.to_owned());
    }

    fn record_bool(&mut self, field: &Field, flag: bool) {
        self.value(field, Value::Flag(flag));
    }

    fn record_u64(&mut self, field: &Field, number: u64) {
        self.value(field, number.into());
    }

    fn record_i64(&mut self, field: &Field, number: i64) {
        self.value(field, Value::Integer(number));
    }

    fn record_f64(&mut self, field: &Field, number: f64) {
        self.value(field, Value::Number(number));
    }
}

impl From<LogEvent> for LogRecord {
    fn from(event: LogEvent) -> Self {
        let since_1970 = event.time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self {
            time_unix_nano: u64::try_from(since_1970.as_nanos()).unwrap_or(u64::MAX),
            severity_number: severity(event.level),
            severity_text: event.level.to_string(),
            body: Some(Value::Text(event.message).into()),
            attributes: event.attributes,
            trace_id: event.trace_id.map(|id| id.get().to_be_bytes().to_vec()).unwrap_or_default(),
        }
    }
}

/// The number of a level in OTLP.
fn severity(level: Level) -> i32 {
    match level {
        Level::TRACE => 1,
        Level::DEBUG => 5,
        Level::INFO => 9,
        Level::WARN => 13,
        Level::ERROR => 17,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    #[derive(Debug, Clone, Default)]
    struct Collect(Arc<Mutex<Vec<LogEvent>>>);

    impl<S: Subscriber> Layer<S> for Collect {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            self.0.lock().unwrap().push(LogEvent::new(event));
        }
    }

    #[test]
    fn record_has_level_fields_and_trace_of_event() {
        let collected = Collect::default();
        let subscriber = tracing_subscriber::registry().with(collected.clone());
        tracing::subscriber::with_default(subscriber, || {
            let id = format!("{:032x}", 0xab);
            tracing::warn!(target: "access", trace_id = id, sent = 7_u64, ms = 1.5, "done {}", 1);
            tracing::info!("{}", "é".repeat(MAX_TEXT));
        });
        let events = std::mem::take(&mut *collected.0.lock().unwrap());
        let own = OwnService { namespace: "shop".to_owned(), name: "web".to_owned() };
        let request = LogsRequest::decode(encode(events, &own)).unwrap();
        let [record, long] = &request.resource_logs[0].scope_logs[0].log_records[..] else {
            panic!("two records: {request:?}")
        };
        assert_eq!((record.severity_number, &*record.severity_text), (13, "WARN"));
        assert_eq!(record.body, Some(Value::from("done 1").into()));
        assert_eq!(record.trace_id, 0xab_u128.to_be_bytes());
        for expected in [
            attribute("target", "access".into()),
            attribute("sent", 7.into()),
            attribute("ms", Value::Number(1.5)),
        ] {
            assert!(record.attributes.contains(&expected), "{record:?}");
        }
        assert!(long.trace_id.is_empty());
        assert_eq!(long.body, Some(Value::from("é".repeat(MAX_TEXT / 2)).into()));
    }
}
