//! The conditions of readiness (`/healthz/ready`), and the status of a node's pods
//! (`/healthz/pods`).

use std::borrow::Cow;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::{Instant, sleep_until};

use crate::admin::answer::{Answer, text};
use crate::admin::api::status::Pod;
use crate::observe::mesh_health::MeshHealth;
use crate::rules::health::RulesHealth;

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
    /// The last report. Locked while a report is made.
    reported_pods: Arc<AsyncMutex<LastReport>>,
    mesh: MeshHealth,
    source: Arc<Mutex<SourceStatus>>,
    /// Whether the proxy's certificate has expired, so that every HBONE connection would fail.
    certificate_expired: Arc<AtomicBool>,
    /// Whether the process still waits for the first state of the control plane.
    mesh_awaited: Arc<AtomicBool>,
    /// Whether an operator drains the only pod of `underpass run`.
    drained_by_request: Arc<AtomicBool>,
    /// The pending steps of the start.
    steps: Arc<Mutex<Vec<&'static str>>>,
}

/// The last report of the pods, and when it began.
type LastReport = Option<(Instant, Vec<Pod>)>;

/// A pending step of the start, until it is dropped.
#[derive(Debug)]
pub(crate) struct PendingStep {
    steps: Arc<Mutex<Vec<&'static str>>>,
    step: &'static str,
}

impl Drop for PendingStep {
    fn drop(&mut self) {
        let mut steps = lock(&self.steps);
        if let Some(index) = steps.iter().position(|step| *step == self.step) {
            steps.remove(index);
        }
    }
}

/// No code panics while it holds a lock of this file.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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

/// Reports the status of each pod of a node.
struct PodReport(Box<dyn Fn() -> BoxFuture<'static, Vec<Pod>> + Send + Sync>);

impl fmt::Debug for PodReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PodReport")
    }
}

const STARTING: u8 = 0;
const READY: u8 = 1;
const DRAINING: u8 = 2;
/// The minimum interval of reports of the pods.
const REPORT_INTERVAL: Duration = Duration::from_millis(20);
/// The reason why the process is not ready, while an operator drains its only pod.
pub(super) const DRAINED_BY_REQUEST: &str = "an operator drains the pod";
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
        report: impl Fn() -> BoxFuture<'static, Vec<Pod>> + Send + Sync + 'static,
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
        lock(&self.source)
    }

    /// The health of the mesh's sources.
    pub(crate) fn mesh(&self) -> &MeshHealth {
        &self.mesh
    }

    /// The status of the pods of a node. Concurrent requests share one report, which begins after
    /// them. Reports are at least 20 ms apart, because a broker limits the requests of the proxy
    /// process, which also open connections of pods.
    pub(crate) async fn pods(&self) -> Vec<Pod> {
        let Some(report) = self.pods.get() else { return Vec::new() };
        let asked = Instant::now();
        let mut last = self.reported_pods.clone().lock_owned().await;
        if let Some((began, pods)) = &*last {
            if *began >= asked {
                return pods.clone();
            }
            sleep_until(*began + REPORT_INTERVAL).await;
        }
        let (began, reporting) = (Instant::now(), (report.0)());
        // A task, because this future is dropped when the client disconnects.
        let reported = tokio::spawn(async move {
            let pods = reporting.await;
            *last = Some((began, pods.clone()));
            pods
        });
        reported.await.unwrap_or_default()
    }

    /// Whether the process has become ready, and does not drain.
    pub(crate) fn has_started(&self) -> bool {
        self.phase.load(Relaxed) == READY
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

    /// Records whether the control plane has sent a mesh. A later outage of the control plane does
    /// not change this.
    pub(crate) fn mesh_known(&self, is_known: bool) {
        self.mesh_awaited.store(!is_known, Relaxed);
    }

    pub(crate) fn certificate_expired(&self, has_expired: bool) {
        self.certificate_expired.store(has_expired, Relaxed);
    }

    /// Records whether an operator drains the only pod of `underpass run`.
    pub(super) fn drained_by_request(&self, is_drained: bool) {
        self.drained_by_request.store(is_drained, Relaxed);
    }

    #[cfg(test)]
    pub(crate) fn is_out_of_descriptors(&self) -> bool {
        self.out_of_descriptors.load(Relaxed)
    }

    /// Names a step of the start as pending while the returned value lives.
    pub(crate) fn pending(&self, step: &'static str) -> PendingStep {
        let steps = self.steps.clone();
        lock(&steps).push(step);
        PendingStep { steps, step }
    }

    /// `ready` and the notice of the source, or every reason why the process is not ready.
    pub(crate) fn text(&self) -> String {
        let reasons = self.reasons();
        if !reasons.is_empty() {
            return format!("not ready: {}\n", reasons.join("; "));
        }
        let notice = self.source().notice.clone();
        let notice = notice.map(|notice| format!("{notice}\n")).unwrap_or_default();
        format!("ready\n{notice}")
    }

    /// Every reason why the process is not ready.
    pub(super) fn reasons(&self) -> Vec<Cow<'static, str>> {
        let source = self.source().problem.clone();
        let out_of_descriptors = self.out_of_descriptors.load(Relaxed);
        let conditions: Vec<(bool, &'static str)> = match self.phase.load(Relaxed) {
            READY => vec![
                (out_of_descriptors, "out of file descriptors"),
                // Without descriptors the rules cannot be read.
                (self.rules.are_lost() && !out_of_descriptors, "another program changes the rules"),
                (self.rules.has_self_test_failed(), "the self-test of the rules failed"),
                (self.certificate_expired.load(Relaxed), "the certificate has expired"),
                (self.drained_by_request.load(Relaxed), DRAINED_BY_REQUEST),
                (self.mesh.is_lost_too_long(), "the control plane is lost (mesh.xds)"),
            ],
            STARTING => {
                let mesh = self.mesh_awaited.load(Relaxed);
                let steps = lock(&self.steps).clone();
                let is_other = !mesh && steps.is_empty();
                let mut all = vec![(mesh, "waiting for the control plane (mesh.xds)")];
                all.extend(steps.into_iter().map(|step| (true, step)));
                all.push((is_other, "starting"));
                all
            }
            _ => return vec![Cow::Borrowed("draining")],
        };
        let given = conditions.into_iter().filter(|(applies, _)| *applies);
        given.map(|(_, reason)| Cow::Borrowed(reason)).chain(source).collect()
    }

    /// The status of a node's pods; `None` without a node.
    pub(super) async fn answer_pods(&self) -> Option<Answer> {
        self.pods.get()?;
        let lines: String = self.pods().await.iter().map(|pod| format!("{pod}\n")).collect();
        Some(text(StatusCode::OK, lines))
    }

    pub(super) fn answer(&self) -> Answer {
        let is_ready = self.reasons().is_empty();
        let status = if is_ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        text(status, self.text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::health::RulesTotals;

    #[test]
    fn readiness_names_every_reason() {
        let rules = RulesTotals::default().pod();
        let readiness = Readiness::for_pod(rules.clone());
        assert_eq!(readiness.text(), "not ready: starting\n");
        readiness.mesh_known(false);
        let certificate = readiness.pending("waiting for the certificate");
        let expected =
            "not ready: waiting for the control plane (mesh.xds); waiting for the certificate\n";
        assert_eq!(readiness.text(), expected);
        readiness.mesh_known(true);
        drop(certificate);
        readiness.ready();
        assert_eq!(readiness.text(), "ready\n");
        rules.set_intact(false);
        readiness.certificate_expired(true);
        readiness.drained_by_request(true);
        let expected = "not ready: another program changes the rules; the certificate has expired; \
                        an operator drains the pod\n";
        assert_eq!(readiness.text(), expected);
        readiness.draining();
        assert_eq!(readiness.text(), "not ready: draining\n");
    }

    #[tokio::test(start_paused = true)]
    async fn requests_at_the_same_time_share_one_report_of_pods() {
        let (readiness, reports) = (Readiness::for_node(), Arc::new(AtomicU8::new(0)));
        let count = reports.clone();
        readiness.report_pods(move || {
            count.fetch_add(1, Relaxed);
            Box::pin(async { vec![Pod::default()] })
        });
        let ask = || readiness.pods();
        let (one, other, third) = tokio::join!(ask(), ask(), ask());
        assert_eq!([one.len(), other.len(), third.len()], [1, 1, 1]);
        assert_eq!(reports.load(Relaxed), 1);
        let first = Instant::now();
        tokio::time::advance(Duration::from_millis(1)).await;
        readiness.pods().await;
        assert_eq!((reports.load(Relaxed), first.elapsed()), (2, REPORT_INTERVAL));
    }

    #[test]
    fn notice_of_the_source_does_not_affect_readiness() {
        let readiness = Readiness::for_node();
        readiness.ready();
        assert_eq!(readiness.text(), format!("not ready: {NO_SOURCE}\n"));
        readiness.source_reports(SourceReport::Ready(true));
        readiness.source_reports(SourceReport::Notice(Some("no connection".to_owned())));
        assert_eq!(readiness.text(), "ready\nno connection\n");
    }
}
