//! The proxy part of `underpass node` and `underpass run`: in this process, or in a process of its
//! own.

use std::sync::{Arc, OnceLock};

use futures_util::future::BoxFuture;
use serde_json::Value;
use tokio::sync::watch;
use underpass_config::{FileWatcher, MeshSource, Settings};
use underpass_interception::{KeptCapabilities, NamespaceAccess, ProxyUser, run_in_background};

use crate::admin::readiness::Readiness;
use crate::admin::state::RulesError;
use crate::broker::child::ProxyProcess;
use crate::broker::message::ToProxy;
use crate::broker::requests::{PodReports, Progress, RequestServer};
use crate::decide::snapshot::Snapshot;
use crate::error::chain;
use crate::mesh::follow::follow;
use crate::node::data_plane::DataPlane;
use crate::node::pod_error::PodError;
use crate::pods::kubernetes;
use crate::pods::registry::PodRegistry;
use crate::pods::source::SourceHealth;
use crate::pods::status::PodStatus;
use crate::process::command_error::CommandError;
use crate::process::instance::ReadinessReport;
use crate::process::logging;
use crate::process::node_proxy::{LoadedNode, RunningNode};
use crate::process::pause_gate::Pausable;
use crate::process::supervise::{Supervisor, Task};
use crate::rules::capture::Capture;
use crate::rules::health::RulesHealth;
use crate::traffic::listeners::BoundEndpoints;

/// The proxy part before this process drops its privileges.
pub(super) enum PreparedProxy {
    InProcess(Box<LoadedNode>),
    Process(Box<ProxyProcess>),
}

/// The proxy part.
pub(super) enum ProxyPart {
    InProcess(RunningNode),
    Process(ProxyProcess),
}

/// The resources for starting the proxy part.
pub(super) struct ProxyStart<'a> {
    pub(super) settings: &'a Arc<Settings>,
    /// The user of the proxy process; `None` for one process.
    pub(super) user: Option<ProxyUser>,
    pub(super) access: &'a NamespaceAccess,
    pub(super) endpoints: BoundEndpoints,
    pub(super) watcher: &'a FileWatcher,
    pub(super) supervisor: &'a Supervisor,
}

/// The rules of the pod of `underpass run`. Clones share them.
#[derive(Debug, Clone, Default)]
pub(super) struct FixedPodRules {
    pub(super) health: RulesHealth,
    /// Set when they are installed.
    pub(super) capture: Arc<OnceLock<Capture>>,
}

impl PodReports for FixedPodRules {
    fn status(&self) -> Vec<PodStatus> {
        Vec::new()
    }

    fn rules(&self, _: &str) -> BoxFuture<'static, Result<Value, RulesError>> {
        let capture = self.capture.get().cloned();
        Box::pin(async move {
            match capture {
                Some(capture) => Ok(capture.report().await),
                None => Err(RulesError::Unavailable("the rules are not installed yet".to_owned())),
            }
        })
    }
}

impl PreparedProxy {
    /// The proxy part of a node: starts the proxy process, or loads mesh and trust.
    pub(super) async fn of_node(start: ProxyStart<'_>) -> Result<Self, CommandError> {
        match start.user {
            Some(user) => Ok(Self::Process(Box::new(start.process(user).await?))),
            None => start.load(Readiness::for_node()).await,
        }
    }

    /// The proxy part of `underpass run`, whose only pod has these rules, with mesh and trust
    /// loaded.
    ///
    /// # Errors
    ///
    /// A file cannot be read, or is invalid; or the proxy process has ended.
    pub(super) async fn of_pod(
        start: ProxyStart<'_>,
        rules: &FixedPodRules,
    ) -> Result<Self, CommandError> {
        let (settings, supervisor) = (start.settings.clone(), start.supervisor.clone());
        let Some(user) = start.user else {
            let prepared = start.load(Readiness::for_pod(rules.health.clone())).await?;
            if let Self::InProcess(node) = &prepared {
                let rules = rules.clone();
                node.admin().report_rules(move |pod| rules.rules(pod));
            }
            return Ok(prepared);
        };
        let access = start.access.clone();
        let mut process = start.process(user).await?;
        let (data_plane, reports) = (process.data_plane.clone(), Arc::new(rules.clone()));
        let server = RequestServer::new(data_plane, reports, &settings, access);
        process.answer(server, &supervisor);
        process.follow_rules(rules.health.clone(), &supervisor);
        let required = process.require_identity(&settings.workload.spiffe_id).await;
        required.map_err(PodError::Identity)?;
        process.reached(Progress::Loaded).await?;
        Ok(Self::Process(Box::new(process)))
    }

    /// The capabilities that the control thread keeps: KILL for a proxy process, which has another
    /// user.
    pub(super) fn control_thread(&self) -> KeptCapabilities {
        match self {
            Self::InProcess(..) => KeptCapabilities::Nothing,
            Self::Process(_) => KeptCapabilities::Kill,
        }
    }

    pub(super) fn is_separate(&self) -> bool {
        matches!(self, Self::Process(_))
    }

    /// Reports the readiness on the instance socket.
    pub(super) fn readiness(&self) -> ReadinessReport {
        match self {
            Self::InProcess(node) => {
                let readiness = node.readiness().clone();
                ReadinessReport::new(move || {
                    let text = readiness.text();
                    Box::pin(async { text })
                })
            }
            Self::Process(process) => {
                let data_plane = process.data_plane.clone();
                ReadinessReport::new(move || {
                    let data_plane = data_plane.clone();
                    Box::pin(async move { data_plane.readiness().await })
                })
            }
        }
    }

    /// Starts the workers, if they are in this process, once a control plane has sent the mesh.
    pub(super) async fn start(self, supervisor: &Supervisor) -> Result<ProxyPart, CommandError> {
        Ok(match self {
            Self::InProcess(node) => ProxyPart::InProcess(node.serve(supervisor).await?),
            Self::Process(process) => ProxyPart::Process(*process),
        })
    }

    /// As [`start`](Self::start), and waits until the workers of a proxy process run.
    pub(super) async fn running(self, supervisor: &Supervisor) -> Result<ProxyPart, CommandError> {
        let mut proxy = self.start(supervisor).await?;
        if let ProxyPart::Process(process) = &mut proxy {
            process.running(supervisor).await?;
        }
        Ok(proxy)
    }
}

impl ProxyStart<'_> {
    async fn process(self, user: ProxyUser) -> Result<ProxyProcess, CommandError> {
        let Self { settings, endpoints, watcher, supervisor, .. } = self;
        ProxyProcess::start(user, settings, endpoints, watcher, supervisor).await
    }

    async fn load(self, readiness: Readiness) -> Result<PreparedProxy, CommandError> {
        let Self { settings, access, endpoints, watcher, supervisor, .. } = self;
        let node =
            LoadedNode::load(settings, access, None, readiness, endpoints, watcher, supervisor);
        Ok(PreparedProxy::InProcess(Box::new(node.await?)))
    }
}

impl ProxyPart {
    pub(super) fn data_plane(&self) -> Arc<dyn DataPlane> {
        match self {
            Self::InProcess(node) => Arc::new(node.data_plane().clone()),
            Self::Process(process) => Arc::new(process.data_plane.clone()),
        }
    }

    /// Connects the proxy part with the registry of pods. Waits until its workers run.
    pub(super) async fn connect(
        &mut self,
        registry: &PodRegistry,
        settings: &Settings,
        access: NamespaceAccess,
        supervisor: &Supervisor,
    ) -> Result<(), CommandError> {
        match self {
            Self::InProcess(node) => {
                let rules = registry.clone();
                node.admin().report_rules(move |pod| PodReports::rules(&rules, pod));
                let registry = registry.clone();
                node.readiness().report_pods(move || {
                    let report = registry.report();
                    Box::pin(async { report })
                });
                Ok(())
            }
            Self::Process(process) => {
                let (data_plane, registry) = (process.data_plane.clone(), registry.clone());
                let server = RequestServer::new(data_plane, Arc::new(registry), settings, access);
                process.answer(server, supervisor);
                process.running(supervisor).await
            }
        }
    }

    /// The mesh, for the facts about pods. A broker follows the mesh file itself if the file has
    /// them.
    pub(super) fn mesh(
        &self,
        settings: &Settings,
        watcher: &FileWatcher,
        supervisor: &Supervisor,
    ) -> Result<(watch::Receiver<Arc<Snapshot>>, Option<Task>), CommandError> {
        match self {
            Self::InProcess(node) => Ok((node.mesh(), None)),
            Self::Process(_) => {
                let is_needed = kubernetes::facts_are_in_mesh(settings);
                let file = settings.mesh_file.as_deref().filter(|_| is_needed);
                let (source, mesh) = MeshSource::open(file, watcher, run_in_background)?;
                let (mesh, following) = follow(source, mesh, &settings.workload);
                let task = supervisor.essential("mesh of the broker", following);
                Ok((mesh, Some(task)))
            }
        }
    }

    /// Passes the reports of the source of pods to the node's readiness.
    pub(super) fn source_health(&self) -> SourceHealth {
        match self {
            Self::InProcess(node) => {
                let readiness = node.readiness().clone();
                SourceHealth::new(move |report| readiness.source_reports(report))
            }
            Self::Process(process) => {
                let sender = process.sender().clone();
                SourceHealth::new(move |report| {
                    // Fails if the proxy process has ended.
                    sender.post(&ToProxy::Source(report)).ok();
                })
            }
        }
    }

    /// Applies changed settings of the log, here and in a proxy process.
    pub(super) fn log_changes(&self) -> Box<dyn Fn(&Settings) + Send + Sync> {
        let sender = match self {
            Self::InProcess(_) => None,
            Self::Process(process) => Some(process.sender().clone()),
        };
        Box::new(move |settings| {
            logging::apply(&settings.logging);
            if let Some(sender) = &sender {
                let settings = settings.to_string();
                // Fails if the proxy process has ended.
                sender.post(&ToProxy::Logging { settings }).ok();
            }
        })
    }

    /// Reports that the process serves its pods, and waits until the endpoints show it. They accept
    /// from now on.
    pub(super) async fn ready(&mut self) {
        match self {
            Self::InProcess(node) => node.ready(),
            Self::Process(process) => {
                process.post(&ToProxy::Serving);
                // Answered after the message before it.
                process.data_plane.readiness().await;
            }
        }
    }

    /// Accepting that pauses while another process takes over: on the endpoints, and on the
    /// listeners of a fixed pod.
    pub(super) fn accepting(&self) -> Arc<dyn Pausable> {
        match self {
            Self::InProcess(node) => Arc::new(node.accepting().clone()),
            Self::Process(process) => Arc::new(process.data_plane.clone()),
        }
    }

    /// The number of open connections of all pods, if they are in this process.
    pub(super) fn connections(&self) -> Option<usize> {
        match self {
            Self::InProcess(node) => Some(node.data_plane().node.pods.connections()),
            Self::Process(_) => None,
        }
    }

    /// Leaves the endpoints to the process that has taken over. Pods take no new connections.
    pub(super) fn hand_over(&mut self) {
        match self {
            Self::InProcess(node) => node.hand_over(),
            Self::Process(process) => process.post(&ToProxy::HandedOver),
        }
    }

    /// Reports that the process is not ready any longer. Pods take no new connections.
    pub(super) fn drain(&self) {
        match self {
            Self::InProcess(node) => node.drain(),
            Self::Process(process) => process.post(&ToProxy::Draining),
        }
    }

    /// A check that the workers answer, and the control thread of a proxy process.
    pub(super) fn liveness(
        &self,
    ) -> Box<dyn Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync> {
        match self {
            Self::InProcess(node) => {
                let workers = node.data_plane().workers.clone();
                Box::new(move || {
                    let workers = workers.clone();
                    Box::pin(async move { workers.ping().await.map_err(|error| error.to_string()) })
                })
            }
            Self::Process(process) => {
                let data_plane = process.data_plane.clone();
                Box::new(move || {
                    let data_plane = data_plane.clone();
                    Box::pin(async move { data_plane.check().await.map_err(|error| chain(&error)) })
                })
            }
        }
    }

    /// Waits until it fails. Cancel-safe.
    pub(super) async fn failed(&mut self) -> CommandError {
        match self {
            Self::InProcess(_) => std::future::pending().await,
            Self::Process(process) => process.ended().await,
        }
    }

    /// Ends the workers.
    pub(super) async fn end(self) {
        match self {
            Self::InProcess(node) => node.end().await,
            Self::Process(mut process) => {
                process.post(&ToProxy::End);
                process.end().await;
            }
        }
    }
}
