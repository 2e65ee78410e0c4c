//! The proxy part of the daemon: in this process, or a process of its own.

use std::sync::Arc;

use tokio::sync::watch;
use underpass_config::{FileWatcher, MeshSource, Settings};
use underpass_interception::{KeptCapabilities, NamespaceAccess, run_in_background};

use crate::broker::child::{self, ProxyProcess};
use crate::broker::message::ToProxy;
use crate::broker::requests::RequestServer;
use crate::decide::snapshot::Snapshot;
use crate::error::chain;
use crate::mesh::follow::follow;
use crate::node::data_plane::DataPlane;
use crate::pods::kubernetes;
use crate::pods::registry::PodRegistry;
use crate::pods::source::SourceHealth;
use crate::process::command_error::CommandError;
use crate::process::logging;
use crate::process::node_proxy::{LoadedNode, RunningNode};
use crate::process::pause_gate::Pausable;
use crate::process::supervise::{Supervisor, Task};
use crate::traffic::listeners::BoundEndpoints;

/// The proxy part before this process drops its privileges.
pub(super) enum PreparedProxy {
    InProcess(Box<LoadedNode>, BoundEndpoints),
    Process(Box<ProxyProcess>),
}

/// The proxy part.
pub(super) enum ProxyPart {
    InProcess(RunningNode),
    Process(ProxyProcess),
}

impl PreparedProxy {
    /// Starts the proxy process, or loads mesh and trust.
    pub(super) async fn new(
        settings: &Arc<Settings>,
        access: &NamespaceAccess,
        endpoints: BoundEndpoints,
        watcher: &FileWatcher,
        supervisor: &Supervisor,
    ) -> Result<Self, CommandError> {
        if let Some(user) = child::user(settings) {
            let started = ProxyProcess::start(user, settings, endpoints, supervisor).await;
            return started.map(|process| Self::Process(Box::new(process)));
        }
        let node = LoadedNode::load(settings, access, None, watcher, supervisor)?;
        Ok(Self::InProcess(Box::new(node), endpoints))
    }

    /// The capabilities that the control thread keeps: KILL for a proxy process, which has another
    /// user.
    pub(super) fn control_thread(&self) -> KeptCapabilities {
        match self {
            Self::InProcess(..) => KeptCapabilities::Nothing,
            Self::Process(_) => KeptCapabilities::Kill,
        }
    }

    /// Starts the workers, if they are in this process, once a control plane has sent the mesh.
    pub(super) async fn start(self, supervisor: &Supervisor) -> Result<ProxyPart, CommandError> {
        Ok(match self {
            Self::InProcess(node, endpoints) => {
                ProxyPart::InProcess(node.serve(endpoints, supervisor).await?)
            }
            Self::Process(process) => ProxyPart::Process(*process),
        })
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
                node.admin().report_rules(move |pod| {
                    let (registry, pod) = (rules.clone(), pod.to_owned());
                    Box::pin(
                        async move { registry.rules(&pod).await.map_err(|error| chain(&error)) },
                    )
                });
                let registry = registry.clone();
                node.readiness().report_pods(move || {
                    let report = registry.report();
                    Box::pin(async { report })
                });
                Ok(())
            }
            Self::Process(process) => {
                let (data_plane, registry) = (process.data_plane.clone(), registry.clone());
                let server = RequestServer::new(data_plane, registry, settings, access);
                process.serve(server, supervisor).await
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

    /// Reports that the node serves its pods. The endpoints accept from now on.
    pub(super) fn ready(&self) {
        match self {
            Self::InProcess(node) => node.ready(),
            Self::Process(process) => process.post(&ToProxy::Serving),
        }
    }

    /// The endpoints, which pause accepting while another process takes over.
    pub(super) fn endpoints(&self) -> Arc<dyn Pausable> {
        match self {
            Self::InProcess(node) => Arc::new(node.endpoints().clone()),
            Self::Process(process) => Arc::new(process.data_plane.clone()),
        }
    }

    /// Leaves the endpoints to the process that has taken over. Pods take no new connections.
    pub(super) fn hand_over(&mut self) {
        match self {
            Self::InProcess(node) => node.hand_over(),
            Self::Process(process) => process.post(&ToProxy::HandedOver),
        }
    }

    /// Reports that the node is not ready any longer. Pods take no new connections.
    pub(super) fn drain(&self) {
        match self {
            Self::InProcess(node) => node.drain(),
            Self::Process(process) => process.post(&ToProxy::Draining),
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
