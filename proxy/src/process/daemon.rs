//! `underpass node`: serves the pods of a node, from its start to its end.
//!
//! ```text
//! start  bind the endpoints, load mesh and trust, start the workers, drop privileges
//! serve  the source of pods adds and removes pods in the registry
//! stop   report unready; drain and remove every pod; keep or remove its rules (`on_exit`)
//! ```
//!
//! After any other end of the process, every pod's rules stay: its traffic is refused.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use underpass_config::{
    ClusterAccess, FileWatcher, KubernetesWatch, NodeProbes, PodSourceSettings, Settings,
};
use underpass_interception::{
    HostNamespaces, HostRules, Inotify, KeptCapabilities, Namespace, NamespaceAccess,
    NamespaceThread, confine_thread, raise_open_files,
};

use crate::admin::endpoints::Readiness;
use crate::mesh::feed::MeshFeed;
use crate::mesh::publish::Publisher;
use crate::node::certificates::Certificates;
use crate::node::in_process::InProcess;
use crate::node::pod::pod_sockets;
use crate::node::workers::{WorkerThreads, Workers};
use crate::node::{Node, certificates};
use crate::observe::metrics;
use crate::pods::cni::CniSource;
use crate::pods::cni::facts::FactOrigin;
use crate::pods::directory::DirectorySource;
use crate::pods::kubernetes;
use crate::pods::kubernetes::api::Api;
use crate::pods::node_enroller::NodeEnroller;
use crate::pods::probes::{self, ProbeTranslation};
use crate::pods::registry::PodRegistry;
use crate::pods::source::{PodSource, SourceHealth};
use crate::pods::zds::ZdsSource;
use crate::process::app::run_until_failure;
use crate::process::command_error::CommandError;
use crate::process::cpus::available_cpus;
use crate::process::notify;
use crate::process::pause_gate::Gates;
use crate::process::phases::endpoints::Endpoints;
use crate::process::stop_signal::StopSignal;
use crate::process::supervise::{Supervisor, Task, restarting};
use crate::rules::health::RulesTotals;
use crate::traffic::dial::PlainDialer;
use crate::traffic::listeners::Listeners;

/// A worker that has not stopped by then is abandoned: the end of the process frees its resources.
const WORKER_STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// Serves the pods of this node until a stop signal.
///
/// # Errors
///
/// The daemon cannot start, or an essential task failed. The rules of pods stay.
pub(crate) async fn run(settings: Settings, until_eof: bool) -> Result<(), CommandError> {
    let (supervisor, failures) = Supervisor::new();
    run_until_failure(Box::pin(run_phases(settings, until_eof, supervisor)), failures).await
}

async fn run_phases(
    settings: Settings,
    until_eof: bool,
    supervisor: Supervisor,
) -> Result<(), CommandError> {
    let mut stop = StopSignal::new(until_eof)?;
    raise_open_files().map_err(CommandError::Start)?;
    let watcher = FileWatcher::new(Inotify::open);
    let started = Daemon::start(Arc::new(settings), &watcher, supervisor, &mut stop).await?;
    let Some((daemon, source)) = started else { return Ok(()) };
    let why = daemon.serve(source, &mut stop).await?;
    daemon.stop(why, &mut stop).await;
    Ok(())
}

fn source(
    settings: &Arc<Settings>,
    node: &Node,
    access: &NamespaceAccess,
    watcher: &FileWatcher,
) -> Result<Box<dyn PodSource>, CommandError> {
    match &settings.node.pods {
        Some(PodSourceSettings::Zds(socket)) => Ok(Box::new(ZdsSource::new(socket.clone()))),
        Some(PodSourceSettings::Cni(socket)) => {
            let (origin, watches) = facts(settings, node, access)?;
            Ok(Box::new(CniSource::new(settings, socket.clone(), origin, watches, watcher)))
        }
        Some(PodSourceSettings::Directory(folder)) => {
            Ok(Box::new(DirectorySource::open(folder, watcher)?))
        }
        None => Err(CommandError::NoPodSource),
    }
}

/// The origin of the facts that the CNI plugin does not know, and the tasks that keep it current.
fn facts(
    settings: &Settings,
    node: &Node,
    access: &NamespaceAccess,
) -> Result<(FactOrigin, JoinSet<()>), CommandError> {
    let cluster = match (settings.node.kubernetes, &settings.node.kubeconfig) {
        (KubernetesWatch::Off, _) => None,
        (KubernetesWatch::Auto, Some(file)) => Some(ClusterAccess::of_kubeconfig(file)?),
        (KubernetesWatch::Auto, None) => ClusterAccess::of_service_account(),
    };
    let Some(cluster) = cluster else {
        return Ok((FactOrigin::Mesh(node.mesh.clone()), JoinSet::new()));
    };
    let name = settings.node.name.as_deref().ok_or(CommandError::NoNodeName)?;
    tracing::info!(
        server = cluster.server,
        node = name,
        "watching the pods of this node at the API server"
    );
    let dialer = PlainDialer { access: access.clone(), sockets: pod_sockets(settings) };
    let (view, watches) = kubernetes::watch::follow(Api::new(cluster, dialer), name);
    Ok((FactOrigin::Kubernetes(view), watches))
}

/// A running daemon.
struct Daemon {
    settings: Arc<Settings>,
    node: Arc<Node>,
    registry: PodRegistry,
    readiness: Readiness,
    threads: WorkerThreads,
    /// Tasks that run until the last pod is removed, such as the enforcement of policies.
    tasks: Vec<Task>,
    /// The rules for kubelet probes in the host's namespace, and the task that maintains them.
    probes: Option<(HostRules, Task)>,
    _endpoints: Endpoints,
}

impl Daemon {
    async fn start(
        settings: Arc<Settings>,
        watcher: &FileWatcher,
        supervisor: Supervisor,
        stop: &mut StopSignal,
    ) -> Result<Option<(Self, Box<dyn PodSource>)>, CommandError> {
        let hosts = HostNamespaces::read()?;
        let thread = NamespaceThread::start().map_err(CommandError::start)?;
        let access = NamespaceAccess::new(Namespace::current()?, thread.clone());
        let sockets = pod_sockets(&settings);
        let (readiness, gates) = (Readiness::for_node(), Gates::default());
        let exporter = metrics::install(settings.series).map_err(CommandError::Metrics)?;
        let identities =
            Certificates::identities(&settings, &access, &sockets, None, watcher, &supervisor)?;
        let dialer = PlainDialer { access: access.clone(), sockets: sockets.clone() };
        let (feed, mesh) = MeshFeed::open(&settings, watcher, dialer, &readiness, &supervisor)?;
        let mut publisher = Publisher::new(feed, mesh, &settings.workload);
        let (mesh, series) = (publisher.subscribe(), exporter.series.clone());
        let count = settings.proxy.workers.unwrap_or_else(available_cpus);
        let node = Node::new(&settings, count, mesh, gates.clone(), series);
        let (node, identities) = (Arc::new(node), identities.map(Arc::new));
        let listeners = Listeners::bind(&access, &sockets, &settings, &mut Vec::new()).await?;
        let _endpoints = Endpoints::serve(listeners, readiness.clone(), &exporter, &gates.accept);
        confine(&thread, &settings).await?;
        certificates::warn_if_unreadable(&settings);
        // Without a pod no traffic is waiting. Pods are enrolled afterwards.
        tokio::select! {
            () = publisher.first_state() => {}
            why = stop.wait() => {
                tracing::info!(why, "stopped while waiting for the control plane");
                return Ok(None);
            }
        }
        let (workers, threads, reports) =
            Workers::start(&node, count, &supervisor).map_err(CommandError::start)?;
        let enroller = NodeEnroller {
            data_plane: Arc::new(InProcess { node: node.clone(), workers, identities }),
            gate: gates.rules,
            settings: settings.clone(),
            thread: thread.clone(),
            rules: RulesTotals::default(),
            hosts,
            mesh: node.mesh.clone(),
        };
        let (registry, pods) = PodRegistry::new(Arc::new(enroller));
        let reported = registry.clone();
        readiness.report_pods(move || reported.report());
        let (limits, reported) = (node.limits.clone(), readiness.clone());
        let limits = restarting("report of limits", move || {
            let (limits, readiness) = (limits.clone(), reported.clone());
            async move { limits.report(readiness).await }
        });
        let tasks = vec![
            supervisor.essential("namespaces thread", async move { thread.ended().await }),
            supervisor.essential("publisher of the mesh", publisher.follow(reports)),
            supervisor.essential("registry of pods", pods.run()),
            limits,
        ];
        // Open the source before rules are installed, so that a failure leaves no rules.
        let pod_source = source(&settings, &node, &access, watcher)?;
        let mut probes = None;
        if settings.node.probes == NodeProbes::Translate {
            let translation = ProbeTranslation::start(access, registry.served_addresses()).await?;
            let rules = translation.rules();
            let task = supervisor.essential("rules for kubelet probes", translation.run());
            probes = Some((rules, task));
        }
        let daemon =
            Self { settings, node, registry, readiness, threads, tasks, probes, _endpoints };
        Ok(Some((daemon, pod_source)))
    }

    /// Serves until a stop signal, and returns the signal's name.
    async fn serve(
        &self,
        source: Box<dyn PodSource>,
        stop: &mut StopSignal,
    ) -> Result<&'static str, CommandError> {
        self.readiness.ready();
        notify::ready();
        let (name, pods) = (self.settings.node.name.as_deref(), self.settings.node.pods.as_ref());
        tracing::info!(
            node = name,
            source = pods.map(PodSourceSettings::name),
            path = pods.map(|pods| tracing::field::display(pods.path().display())),
            workers = self.node.workers,
            "serving the pods of this node"
        );
        tokio::select! {
            end = source.run(self.registry.clone(), SourceHealth::new(self.readiness.clone())) => {
                Err(end.into())
            }
            why = stop.wait() => Ok(why),
        }
    }

    /// Removes every pod and stops the workers. A second stop signal ends the drain.
    async fn stop(self, why: &'static str, stop: &mut StopSignal) {
        self.readiness.draining();
        notify::stopping();
        let pods = self.registry.status().len();
        tracing::info!(why, pods, deadline = ?self.settings.timeouts.drain, "stopping");
        self.node.drain.close();
        tokio::select! {
            () = self.registry.stop().gone() => {}
            why = stop.wait() => {
                tracing::warn!(why, "second stop signal: ending the drain and keeping the rules of pods that still drain");
            }
        }
        if let Some((rules, task)) = self.probes {
            drop(task);
            probes::leave(&rules, self.settings.interception.on_exit).await;
        }
        self.node.drain.end();
        tokio::time::timeout(WORKER_STOP_TIMEOUT, self.threads.join()).await.ok();
        // The tasks publish the mesh, which a worker enforces until it ends.
        drop(self.tasks);
        tracing::info!("stopped");
    }
}

/// Drops all capabilities of the control thread, and so of the workers that it starts. The
/// namespaces thread keeps those for entering pods' namespaces and installing rules.
async fn confine(thread: &NamespaceThread, settings: &Settings) -> Result<(), CommandError> {
    confine_thread(KeptCapabilities::Nothing).map_err(CommandError::Start)?;
    let programs = settings.interception.install
        && settings.interception.backend != underpass_config::Backend::Nftables;
    Ok(thread.confine(KeptCapabilities::Namespaces { programs }).await?)
}
