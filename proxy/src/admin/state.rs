//! The state of the proxy that administration reads and changes.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use futures_util::future::BoxFuture;
use http::StatusCode;
use serde_json::Value;
use thiserror::Error;
use tokio::sync::{Mutex, Semaphore, oneshot};
use underpass_config::Settings;

use crate::admin::answer::Refusal;
use crate::admin::liveness::Liveness;
use crate::admin::query::Query;
use crate::admin::readiness::Readiness;
use crate::node::Node;
use crate::node::identities::Identities;
use crate::node::inspection::Inspection;
use crate::observe::pod_name::PodName;
use crate::observe::record::TrackedConnection;

/// The maximum number of inspections at a time. Each visits every connection of the workers.
const MAX_INSPECTIONS: usize = 4;

/// The running proxy, as administration sees it.
#[derive(Debug)]
pub(crate) struct Admin {
    /// The settings at the start.
    pub(crate) settings: Arc<Settings>,
    pub(crate) node: Arc<Node>,
    pub(crate) started: SystemTime,
    pub(crate) readiness: Readiness,
    /// `None` without certificates: HBONE is off.
    pub(crate) identities: Option<Arc<Identities>>,
    pub(crate) liveness: Liveness,
    rules: OnceLock<RulesReport>,
    /// Locked while the rules of a pod are reported.
    rules_turn: Arc<Mutex<()>>,
    inspections: Semaphore,
}

/// Reports the rules of the pod with this name, `NAMESPACE/NAME`, or the reason why it cannot.
struct RulesReport(Box<dyn Fn(&str) -> RulesFuture + Send + Sync>);

type RulesFuture = BoxFuture<'static, Result<Value, RulesError>>;

/// Why the rules of a pod are not reported.
#[derive(Debug, Error)]
pub(crate) enum RulesError {
    #[error("no such pod is known to this proxy")]
    UnknownPod,
    /// Another request may succeed.
    #[error("{0}")]
    Unavailable(String),
}

impl fmt::Debug for RulesReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RulesReport")
    }
}

impl Admin {
    pub(crate) fn new(settings: &Arc<Settings>, node: &Arc<Node>) -> Self {
        let (settings, node, started) = (settings.clone(), node.clone(), SystemTime::now());
        let (readiness, liveness, rules, rules_turn) = Default::default();
        let (identities, inspections) = (None, Semaphore::new(MAX_INSPECTIONS));
        Self {
            settings,
            node,
            started,
            readiness,
            identities,
            liveness,
            rules,
            rules_turn,
            inspections,
        }
    }

    /// Shows the readiness and the certificates too.
    pub(crate) fn with(self, readiness: &Readiness, identities: Option<&Arc<Identities>>) -> Self {
        Self { readiness: readiness.clone(), identities: identities.cloned(), ..self }
    }

    /// The command that the process runs: `run` or `node`.
    pub(super) fn command(&self) -> &'static str {
        if self.node.has_many_pods { "node" } else { "run" }
    }

    /// The pod of `underpass run`.
    pub(super) fn own_pod(&self) -> PodName {
        PodName::from(&self.settings.workload)
    }

    /// The pod that the parameter `pod` names. `underpass run` has one pod, which is the default.
    ///
    /// # Errors
    ///
    /// The request for `path` names no pod, or another one.
    pub(super) fn pod_of(&self, query: &mut Query, path: &str) -> Result<String, Refusal> {
        let (given, own) = (query.take("pod")?, self.own_pod().to_string());
        match given {
            Some(pod) if self.node.has_many_pods || pod == own => Ok(pod),
            None if !self.node.has_many_pods => Ok(own),
            Some(pod) => {
                let reason = format!("no pod {pod}: this proxy has the pod {own}");
                Err(Refusal::new(StatusCode::NOT_FOUND, reason))
            }
            None => {
                let reason = format!("the parameter pod is needed: {path}?pod=NAMESPACE/NAME");
                Err(Refusal::bad_request(reason))
            }
        }
    }

    /// Sets the function that reports the rules of a pod. Must be called once.
    pub(crate) fn report_rules(
        &self,
        report: impl Fn(&str) -> RulesFuture + Send + Sync + 'static,
    ) {
        self.rules.set(RulesReport(Box::new(report))).ok();
    }

    /// The open connections of all pods. Those of a worker that does not answer are missing.
    pub(super) async fn open_connections(&self) -> Vec<Arc<TrackedConnection>> {
        let list = |connections| Inspection::Connections { connections, subscriber: None };
        self.inspect(list).await.into_iter().flatten().flat_map(|list| list.open).collect()
    }

    /// Inspects every worker. `None` for a worker that does not answer; empty before they run.
    pub(super) async fn inspect<T>(
        &self,
        inspection: impl Fn(oneshot::Sender<T>) -> Inspection,
    ) -> Vec<Option<T>> {
        let Some(workers) = self.liveness.workers() else { return Vec::new() };
        // Never closed.
        let _permit = self.inspections.acquire().await.ok();
        workers.inspect(inspection).await
    }

    /// The rules of the pod with this name. They are read for one request at a time, also if
    /// clients disconnect: a broker performs a limited number of requests, also for connections of
    /// pods.
    ///
    /// # Errors
    ///
    /// There is no such pod, or its rules cannot be read.
    pub(super) async fn rules(&self, pod: &str) -> Result<Value, RulesError> {
        let Some(report) = self.rules.get() else {
            return Err(RulesError::Unavailable("the rules are not installed yet".to_owned()));
        };
        let turn = self.rules_turn.clone().lock_owned().await;
        let reporting = (report.0)(pod);
        // A task, because this future is dropped when the client disconnects.
        let reported = tokio::spawn(async move {
            let _turn = turn;
            reporting.await
        });
        reported.await.unwrap_or_else(|error| Err(RulesError::Unavailable(error.to_string())))
    }
}
