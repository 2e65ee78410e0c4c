//! Exports traces and log events to an OpenTelemetry collector (`tracing.otlp`).
//!
//! ```text
//! worker ─ bounded queue ─▶ task of the control thread: collect for 1 s ─▶ request ─▶ collector
//!               └ full: dropped and counted                     └ failed: back-off, then again
//! ```
//!
//! No worker waits. While the collector does not answer, its queue fills, and further items are
//! dropped.

pub(crate) mod logs;
mod messages;
mod spans;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Mutex, mpsc};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use underpass_config::{Hint as _, Quoted, Settings};
use underpass_hbone::{CollectorError, Dial, OtlpCollector};

use crate::backoff::Backoff;
use crate::observe::metrics;
use crate::observe::trace::Tracer;
use crate::process::supervise::{Task, restarting};

/// The time for which items are collected in one request.
const COLLECT: Duration = Duration::from_secs(1);
/// The interval of taking items from the queue meanwhile, so that it does not fill.
const COLLECT_STEP: Duration = Duration::from_millis(100);
/// The maximum number of items in one request.
const MAX_BATCH: usize = 2048;
/// Timeout of a request.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// The bounds of the back-off after a failed request.
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// The time for the last request when the process stops.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// The workload that this process serves, for connections whose own workload is not proven.
#[derive(Debug, Clone)]
struct OwnService {
    namespace: String,
    name: String,
}

impl OwnService {
    fn new(settings: &Settings) -> Self {
        let own = &settings.workload;
        match settings.node.pods {
            // A node has no workload of its own.
            Some(_) => Self { namespace: String::new(), name: "underpass".to_owned() },
            None => Self { namespace: own.namespace.clone(), name: own.name.clone() },
        }
    }
}

/// The running export.
#[derive(Debug)]
pub(crate) struct Telemetry {
    stop: CancellationToken,
    /// Counts the exporters until their last request has ended.
    running: TaskTracker,
    tasks: Vec<Task>,
}

impl Telemetry {
    /// Starts the export of the spans of the returned tracer, if there is a collector, and of the
    /// log if the settings say so.
    ///
    /// # Errors
    /// The endpoint is not a URL.
    pub(crate) fn start(
        settings: &Settings,
        dial: impl Dial + Clone,
    ) -> Result<(Tracer, Option<Self>), CollectorError> {
        let Some(otlp) = &settings.otlp else { return Ok((Tracer::default(), None)) };
        let own = OwnService::new(settings);
        let (stop, running) = (CancellationToken::new(), TaskTracker::new());
        let mut telemetry = Self { stop, running, tasks: Vec::new() };
        let (tracer, queue) = Tracer::new(otlp.sample_ratio);
        let of_spans = own.clone();
        let encode = move |items| spans::encode(items, &of_spans);
        let signal = Signal { name: "traces", path: "/v1/traces", queue, encode };
        telemetry.export("export of traces", signal, OtlpCollector::new(otlp)?, dial.clone());
        if otlp.logs {
            let encode = move |items| logs::encode(items, &own);
            let signal = Signal { name: "logs", path: "/v1/logs", queue: logs::start(), encode };
            telemetry.export("export of logs", signal, OtlpCollector::new(otlp)?, dial);
        }
        Ok((tracer, Some(telemetry)))
    }

    fn export<T: Send + 'static>(
        &mut self,
        task: &'static str,
        signal: Signal<T, impl Fn(Vec<T>) -> Bytes + Send + Sync + 'static>,
        collector: OtlpCollector,
        dial: impl Dial,
    ) {
        metrics::telemetry_started(signal.name);
        let (backoff, stop) = (Backoff::new(FIRST_WAIT, LONGEST_WAIT), self.stop.clone());
        let running = Some(self.running.token());
        let exporter = Exporter { signal, collector, dial, backoff, stop, running };
        let exporter = Arc::new(Mutex::new(exporter));
        self.tasks.push(restarting(task, move || {
            let exporter = exporter.clone();
            async move {
                exporter.lock().await.run().await;
                std::future::pending::<()>().await;
            }
        }));
    }

    /// Sends the queued items, for a limited time, and ends the export.
    pub(crate) async fn flush(&self) {
        self.stop.cancel();
        self.running.close();
        timeout(FLUSH_TIMEOUT, self.running.wait()).await.ok();
    }
}

/// One kind of telemetry.
struct Signal<T, E> {
    /// The name in the log and in metrics.
    name: &'static str,
    path: &'static str,
    queue: mpsc::Receiver<T>,
    encode: E,
}

struct Exporter<T, E, D> {
    signal: Signal<T, E>,
    collector: OtlpCollector,
    dial: D,
    backoff: Backoff,
    stop: CancellationToken,
    /// `None` after the last request.
    running: Option<TaskTrackerToken>,
}

impl<T, E: Fn(Vec<T>) -> Bytes, D: Dial> Exporter<T, E, D> {
    /// Exports until the process stops or no sender remains.
    async fn run(&mut self) {
        let mut has_failed = false;
        while let Some(items) = self.collect().await {
            self.export(items, &mut has_failed).await;
        }
        self.running = None;
    }

    /// Collects the items of one request; `None` at the end.
    async fn collect(&mut self) -> Option<Vec<T>> {
        let Self { signal, stop, .. } = self;
        let mut items = Vec::new();
        tokio::select! {
            biased;
            count = signal.queue.recv_many(&mut items, MAX_BATCH) => if count == 0 { return None },
            () = stop.cancelled() => return None,
        }
        let until = Instant::now() + COLLECT;
        loop {
            while items.len() < MAX_BATCH
                && let Ok(item) = signal.queue.try_recv()
            {
                items.push(item);
            }
            if items.len() >= MAX_BATCH || stop.is_cancelled() || Instant::now() >= until {
                return Some(items);
            }
            timeout(COLLECT_STEP, stop.cancelled()).await.ok();
        }
    }

    /// Sends items until the collector has taken or refused them.
    async fn export(&mut self, items: Vec<T>, has_failed: &mut bool) {
        let (count, signal) = (items.len(), self.signal.name);
        let message = (self.signal.encode)(items);
        loop {
            let error = match self.send(message.clone()).await {
                Ok(()) => {
                    if std::mem::take(has_failed) {
                        self.backoff.reset();
                        tracing::info!(signal, "the collector takes telemetry again");
                    }
                    return metrics::telemetry_exported(signal, count);
                }
                Err(error) => error,
            };
            metrics::telemetry_failed(signal);
            let is_temporary = error.as_ref().is_none_or(CollectorError::is_temporary);
            if !std::mem::replace(has_failed, true) {
                self.log(error);
            }
            let wait = sleep(self.backoff.next());
            let is_stopped = tokio::select! {
                () = wait => false,
                () = self.stop.cancelled() => true,
            };
            if is_stopped || !is_temporary {
                return metrics::telemetry_dropped(signal, count);
            }
        }
    }

    /// Sends one request.
    ///
    /// # Errors
    /// The collector did not take it; `None` after the timeout.
    async fn send(&self, message: Bytes) -> Result<(), Option<CollectorError>> {
        let sending = self.collector.send(&self.dial, self.signal.path, message);
        timeout(SEND_TIMEOUT, sending).await.map_err(|_| None)?.map_err(Some)
    }

    /// Logs the first of consecutive failures.
    fn log(&self, error: Option<CollectorError>) {
        let (signal, endpoint) = (self.signal.name, self.collector.endpoint());
        let hint = error.as_ref().and_then(CollectorError::hint);
        let hint = hint.as_deref().unwrap_or("check that the collector runs and is not overloaded");
        let error = error.as_ref().map(|error| Quoted::chain(error).to_string());
        let error = error.unwrap_or_else(|| format!("no answer within {SEND_TIMEOUT:?}"));
        tracing::warn!(
            signal,
            endpoint,
            error,
            hint,
            "cannot export telemetry, trying again with a back-off"
        );
    }
}

#[cfg(test)]
mod tests;
