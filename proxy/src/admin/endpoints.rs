//! Serves readiness (`/healthz/ready`), the status of a node's pods (`/healthz/pods`) and metrics
//! (`/metrics`) over HTTP/1.

use std::borrow::Cow;
use std::convert::Infallible;
use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::time::timeout;
use underpass_hbone::{ConnectionSlot, ConnectionSlots, log_panic};
use underpass_interception::{BoundListener, Listener};

use crate::observe::metrics::Exporter;
use crate::process::pause_gate::PauseGate;
use crate::rules::health::RulesHealth;

/// The maximum number of connections. A new one evicts the oldest idle one, so that a flood does
/// not lock out probes and scrapers.
const MAX_CONNECTIONS: usize = 64;
/// The maximum number of connections from one source address.
const MAX_CONNECTIONS_PER_SOURCE: usize = 16;
/// Timeout for the request headers.
const HEADER_TIMEOUT: Duration = Duration::from_secs(2);
/// Timeout for a whole connection.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(5);
/// Prometheus' text format, version 0.0.4.
const PROMETHEUS_TEXT: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4");

/// The conditions of readiness.
#[derive(Debug, Clone, Default)]
pub(crate) struct Readiness {
    phase: Arc<AtomicU8>,
    /// The rules of the only pod of `underpass run`. The pods of a node daemon have their own
    /// status.
    rules: RulesHealth,
    out_of_descriptors: Arc<AtomicBool>,
    /// Reports the status of a node's pods.
    pods: Arc<OnceLock<PodReport>>,
    source: Arc<Mutex<SourceStatus>>,
    /// Whether the proxy's certificate has expired, so that every HBONE connection would fail.
    certificate_expired: Arc<AtomicBool>,
    /// Whether the process still waits for the first state of the control plane.
    mesh_awaited: Arc<AtomicBool>,
}

/// A report of a source for the node's readiness.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) enum SourceReport {
    /// Whether the source is connected and has sent all pods, or has read its folder.
    Ready(bool),
    /// The reason why the source delivers no pods, or a problem with its pods; `None` without one.
    Problem(Option<String>),
    /// Information that the readiness endpoint shows; it does not affect readiness.
    Notice(Option<String>),
}

/// The status of the source of a node's pods.
#[derive(Debug, Default)]
struct SourceStatus {
    /// The reason why the node is not ready.
    problem: Option<Cow<'static, str>>,
    /// Information that does not affect readiness.
    notice: Option<String>,
}

/// Writes the status of each pod of a node on one line.
struct PodReport(Box<dyn Fn() -> BoxFuture<'static, String> + Send + Sync>);

impl fmt::Debug for PodReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PodReport")
    }
}

const STARTING: u8 = 0;
const READY: u8 = 1;
const DRAINING: u8 = 2;
const NO_SOURCE: &str =
    "the source of pods (node.pods) is not connected, or its folder is not read yet";

impl Readiness {
    /// The readiness of `underpass run`, whose only pod has these rules.
    pub(crate) fn for_pod(rules: RulesHealth) -> Self {
        Self { rules, ..Self::default() }
    }

    /// The readiness of a node daemon, initially without a ready source of pods. The problems of a
    /// pod do not affect it.
    pub(crate) fn for_node() -> Self {
        let readiness = Self::default();
        readiness.source_reports(SourceReport::Ready(false));
        readiness
    }

    /// Sets the function that reports the status of a node's pods. Must be called once.
    pub(crate) fn report_pods(
        &self,
        report: impl Fn() -> BoxFuture<'static, String> + Send + Sync + 'static,
    ) {
        self.pods.set(PodReport(Box::new(report))).ok();
    }

    /// Records a report of the source of a node's pods.
    pub(crate) fn source_reports(&self, report: SourceReport) {
        let mut source = self.source();
        match report {
            SourceReport::Ready(ready) => {
                source.problem = (!ready).then_some(Cow::Borrowed(NO_SOURCE));
            }
            SourceReport::Problem(problem) => source.problem = problem.map(Cow::Owned),
            SourceReport::Notice(notice) => source.notice = notice,
        }
    }

    fn source(&self) -> MutexGuard<'_, SourceStatus> {
        // No code panics while it holds the lock.
        self.source.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The rules of the only pod of `underpass run`.
    pub(crate) fn rules(&self) -> &RulesHealth {
        &self.rules
    }

    pub(crate) fn ready(&self) {
        self.phase.store(READY, Relaxed);
    }

    pub(crate) fn draining(&self) {
        self.phase.store(DRAINING, Relaxed);
    }

    pub(crate) fn out_of_descriptors(&self, are_out: bool) {
        self.out_of_descriptors.store(are_out, Relaxed);
    }

    /// Records whether the control plane has sent a mesh. An outage of the control plane does not
    /// change this.
    pub(crate) fn mesh_known(&self, is_known: bool) {
        self.mesh_awaited.store(!is_known, Relaxed);
    }

    pub(crate) fn certificate_expired(&self, has_expired: bool) {
        self.certificate_expired.store(has_expired, Relaxed);
    }

    #[cfg(test)]
    pub(crate) fn is_out_of_descriptors(&self) -> bool {
        self.out_of_descriptors.load(Relaxed)
    }

    /// `ready` and the notice of the source, or the reason why the process is not ready.
    pub(crate) fn text(&self) -> String {
        match self.not_ready() {
            Some(reason) => format!("not ready: {reason}\n"),
            None => {
                let notice = self.source().notice.clone();
                let notice = notice.map(|notice| format!("{notice}\n")).unwrap_or_default();
                format!("ready\n{notice}")
            }
        }
    }

    /// The reason why the process is not ready.
    fn not_ready(&self) -> Option<Cow<'static, str>> {
        let reason = match self.phase.load(Relaxed) {
            // Checked first, because it can cause failures to read the rules.
            READY if self.out_of_descriptors.load(Relaxed) => "out of file descriptors",
            READY if self.rules.are_lost() => "another program changes the rules",
            READY if self.rules.has_self_test_failed() => "the self-test of the rules failed",
            READY => {
                let expired = self.certificate_expired.load(Relaxed);
                let certificate = expired.then_some(Cow::Borrowed("the certificate has expired"));
                return self.source().problem.clone().or(certificate);
            }
            STARTING if self.mesh_awaited.load(Relaxed) => {
                "waiting for the control plane (mesh.xds)"
            }
            STARTING => "starting",
            _ => "draining",
        };
        Some(Cow::Borrowed(reason))
    }

    async fn answer_pods(&self) -> Response<Full<Bytes>> {
        let report = match self.pods.get() {
            Some(report) => (report.0)().await,
            None => String::new(),
        };
        Response::new(Full::from(report))
    }

    fn answer(&self) -> Response<Full<Bytes>> {
        let status = match self.not_ready() {
            None => StatusCode::OK,
            Some(_) => StatusCode::SERVICE_UNAVAILABLE,
        };
        text(status, self.text())
    }
}

/// An HTTP endpoint. Each has a separate listener.
#[derive(Clone)]
pub(crate) enum Endpoint {
    Readiness(Readiness),
    Metrics(Exporter),
}

impl Endpoint {
    async fn answer(&self, method: &Method, path: &str) -> Response<Full<Bytes>> {
        if method != Method::GET {
            return text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
        }
        match (self, path) {
            (Self::Readiness(readiness), "/healthz/ready") => readiness.answer(),
            (Self::Metrics(metrics), "/metrics" | "/stats/prometheus") => {
                let mut response = Response::new(Full::from(metrics.render()));
                response.headers_mut().insert(header::CONTENT_TYPE, PROMETHEUS_TEXT);
                response
            }
            (Self::Readiness(readiness), "/healthz/pods") if readiness.pods.get().is_some() => {
                readiness.answer_pods().await
            }
            (Self::Readiness(_), _) => {
                text(StatusCode::NOT_FOUND, "not found: this endpoint serves /healthz/ready\n")
            }
            (Self::Metrics(_), _) => {
                text(StatusCode::NOT_FOUND, "not found: this endpoint serves /metrics\n")
            }
        }
    }

    /// Serves while the gate is open. Never returns.
    pub(crate) async fn serve(
        self,
        listener: BoundListener,
        gate: PauseGate,
    ) -> std::io::Result<()> {
        let listener = listener.register()?;
        let slots = ConnectionSlots::new(MAX_CONNECTIONS, MAX_CONNECTIONS_PER_SOURCE);
        loop {
            let Some(Some((stream, client))) = gate.pass(accept(&listener)).await else {
                continue;
            };
            // Every connection may be evicted, because a request is answered as soon as it is read.
            if let Some(slot) = slots.take(client) {
                let serving = self.clone().serve_connection(stream, slot);
                tokio::spawn(log_panic("connection to an endpoint", serving));
            }
        }
    }

    /// Serves one connection until it ends, its deadline passes, or it is evicted.
    async fn serve_connection(self, stream: TcpStream, slot: ConnectionSlot) {
        let endpoint = &self;
        let answer = service_fn(move |request: Request<Incoming>| {
            let (method, path) = (request.method().clone(), request.uri().path().to_owned());
            async move { Ok::<_, Infallible>(endpoint.answer(&method, &path).await) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .serve_connection(TokioIo::new(stream), answer);
        tokio::select! {
            ended = timeout(CONNECTION_TIMEOUT, connection) => match ended {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "connection of the readiness or metrics endpoint failed"),
                Err(_) => tracing::debug!("connection of the readiness or metrics endpoint timed out"),
            },
            () = slot.displaced() => {
                tracing::debug!("connection of the readiness or metrics endpoint evicted by a newer one");
            }
        }
    }
}

async fn accept(listener: &Listener) -> Option<(TcpStream, IpAddr)> {
    match listener.accept().await {
        Ok((stream, client)) => Some((TcpStream::from_std(stream).ok()?, client.ip())),
        Err(error) => {
            tracing::debug!(%error, "cannot accept a connection of the readiness or metrics endpoint");
            tokio::time::sleep(Duration::from_millis(100)).await;
            None
        }
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response
}
