//! Tests of the exporter with a scripted collector in memory.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Mutex as StdMutex;

use metrics_exporter_prometheus::PrometheusBuilder;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use underpass_config::Sources;

use super::*;

/// Answers each connection by the next status; `None` refuses it.
#[derive(Debug, Clone)]
struct Script {
    answers: Arc<StdMutex<VecDeque<Option<&'static str>>>>,
    bodies: mpsc::UnboundedSender<String>,
}

impl Dial for Script {
    type Io = DuplexStream;

    async fn dial(&self, _: SocketAddr) -> io::Result<DuplexStream> {
        let answer = self.answers.lock().unwrap().pop_front().expect("a scripted answer");
        let status = answer.ok_or(io::ErrorKind::ConnectionRefused)?;
        let (ours, mut theirs) = duplex(4096);
        let bodies = self.bodies.clone();
        tokio::spawn(async move {
            let mut request = Vec::new();
            let end = loop {
                theirs.read_buf(&mut request).await.unwrap();
                let text = String::from_utf8_lossy(&request);
                let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
                let length = head.split("content-length: ").nth(1).unwrap();
                let length: usize = length.split("\r\n").next().unwrap().parse().unwrap();
                if body.len() >= length {
                    break body.to_owned();
                }
            };
            bodies.send(end).unwrap();
            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n");
            theirs.write_all(answer.as_bytes()).await.unwrap();
        });
        Ok(ours)
    }
}

/// Counts the events of the log by level.
#[derive(Debug, Clone, Default)]
struct Events(Arc<StdMutex<Vec<tracing::Level>>>);

impl<S: tracing::Subscriber> Layer<S> for Events {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        self.0.lock().unwrap().push(*event.metadata().level());
    }
}

type Encode = fn(Vec<u8>) -> Bytes;

/// An exporter of letters, and the bodies that arrive.
fn exporter(
    answers: &[Option<&'static str>],
    queue: mpsc::Receiver<u8>,
) -> (Exporter<u8, Encode, Script>, mpsc::UnboundedReceiver<String>) {
    let flags = vec!["tracing.otlp.endpoint=http://127.0.0.1:4318".to_owned()];
    let settings = Sources { file: None, environment: Vec::new(), flags }.load().unwrap();
    let collector = OtlpCollector::new(settings.otlp.as_ref().unwrap()).unwrap();
    let (bodies, arrived) = mpsc::unbounded_channel();
    let answers = Arc::new(StdMutex::new(answers.iter().copied().collect()));
    let encode: Encode = Bytes::from;
    let signal = Signal { name: "letters", path: "/v1/letters", queue, encode };
    let (dial, stop) = (Script { answers, bodies }, CancellationToken::new());
    let backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
    (Exporter { signal, collector, dial, backoff, stop, running: None }, arrived)
}

const OK: Option<&str> = Some("200 OK");

#[tokio::test(start_paused = true)]
async fn failed_request_is_repeated_and_logged_once_and_refused_one_is_dropped() {
    let (recorder, events) = (PrometheusBuilder::new().build_recorder(), Events::default());
    let _recording = ::metrics::set_default_local_recorder(&recorder);
    let subscriber = tracing_subscriber::registry().with(events.clone());
    let _logging = tracing::subscriber::set_default(subscriber);
    let (sender, queue) = mpsc::channel(8);
    let answers = [None, None, Some("503 Busy"), OK, Some("400 Bad Request"), OK];
    let (mut exporter, mut arrived) = exporter(&answers, queue);
    let running = tokio::spawn(async move { exporter.run().await });
    sender.send(b'a').await.unwrap();
    sender.send(b'b').await.unwrap();
    for _ in 0..2 {
        assert_eq!(arrived.recv().await.unwrap(), "ab");
    }
    for letter in *b"cd" {
        sender.send(letter).await.unwrap();
        assert_eq!(arrived.recv().await.unwrap().as_bytes(), [letter]);
    }
    drop(sender);
    running.await.unwrap();
    let count = |wanted| events.0.lock().unwrap().iter().filter(|level| **level == wanted).count();
    // One for the outage, one for the refusal.
    assert_eq!((count(tracing::Level::WARN), count(tracing::Level::INFO)), (2, 2));
    let metrics = recorder.handle().render();
    for line in [
        "underpass_telemetry_exported_total{signal=\"letters\"} 3",
        "underpass_telemetry_dropped_total{signal=\"letters\"} 1",
        "underpass_telemetry_failed_requests_total{signal=\"letters\"} 4",
    ] {
        assert!(metrics.contains(line), "{line}\n{metrics}");
    }
}

#[tokio::test(start_paused = true)]
async fn stop_exports_queued_items_and_abandons_failing_request() {
    for (answer, is_delivered) in [(OK, true), (None, false)] {
        let (sender, queue) = mpsc::channel(8);
        let (mut exporter, mut arrived) = exporter(&[answer], queue);
        let began = Instant::now();
        exporter.stop.cancel();
        sender.send(b'z').await.unwrap();
        exporter.run().await;
        assert_eq!(arrived.try_recv().is_ok(), is_delivered);
        assert_eq!(began.elapsed(), Duration::ZERO);
    }
}

#[tokio::test(start_paused = true)]
async fn queue_does_not_fill_while_items_are_collected() {
    let (sender, queue) = mpsc::channel(2);
    let (mut exporter, _arrived) = exporter(&[], queue);
    let sending = async {
        for letter in *b"abcdef" {
            sender.try_send(letter).unwrap();
            sleep(COLLECT_STEP).await;
        }
    };
    let (items, ()) = tokio::join!(exporter.collect(), sending);
    assert_eq!(items.unwrap(), b"abcdef");
}
