//! `underpass node`: serves the pods of a node, from its start to its end.
//!
//! ```text
//! start  bind the endpoints, start the proxy part (`privileges.broker`), drop privileges
//! serve  the source of pods adds and removes pods in the registry
//! stop   report unready; drain and remove every pod; keep or remove its rules (`on_exit`)
//! ```
//!
//! After any other end of the process, every pod's rules stay: its traffic is refused.

mod proxy_part;

use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinSet;
use underpass_config::{FileWatcher, NodeProbes, PodSourceSettings, Settings};
use underpass_interception::{
    HostNamespaces, HostRules, Inotify, KeptCapabilities, Namespace, NamespaceAccess,
    NamespaceThread, confine_thread, raise_open_files,
};

use self::proxy_part::{PreparedProxy, ProxyPart};
use crate::decide::snapshot::Snapshot;
use crate::node::pod::pod_sockets;
use crate::pods::cni::CniSource;
use crate::pods::cni::facts::FactOrigin;
use crate::pods::directory::DirectorySource;
use crate::pods::kubernetes;
use crate::pods::kubernetes::api::Api;
use crate::pods::node_enroller::NodeEnroller;
use crate::pods::probes::{self, ProbeTranslation};
use crate::pods::registry::PodRegistry;
use crate::pods::source::PodSource;
use crate::pods::zds::ZdsSource;
use crate::process::app::run_until_failure;
use crate::process::command_error::CommandError;
use crate::process::node_proxy::workers;
use crate::process::notify;
use crate::process::pause_gate::Gates;
use crate::process::stop_signal::StopSignal;
use crate::process::supervise::{Supervisor, Task};
use crate::rules::health::RulesTotals;
use crate::traffic::dial::PlainDialer;
use crate::traffic::listeners::Listeners;

/// Serves the pods of this node until a stop signal.
///
/// # Errors
///
/// The daemon cannot start, or an essential task failed. The rules of pods stay installed.
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
    let start = Daemon::start(Arc::new(settings), &watcher, &supervisor, &mut stop);
    let Some((mut daemon, source)) = start.await? else { return Ok(()) };
    let why = daemon.serve(source, &mut stop).await?;
    daemon.stop(why, &mut stop).await
}

/// A running daemon.
struct Daemon {
    settings: Arc<Settings>,
    proxy: ProxyPart,
    registry: PodRegistry,
    /// Tasks that run until the last pod is removed.
    tasks: Vec<Task>,
    /// The rules for kubelet probes in the host's namespace, and the task that maintains them.
    probes: Option<(HostRules, Task)>,
}

impl Daemon {
    async fn start(
        settings: Arc<Settings>,
        watcher: &FileWatcher,
        supervisor: &Supervisor,
        stop: &mut StopSignal,
    ) -> Result<Option<(Self, Box<dyn PodSource>)>, CommandError> {
        let hosts = HostNamespaces::read()?;
        let thread = NamespaceThread::start().map_err(CommandError::start)?;
        let access = NamespaceAccess::new(Namespace::current()?, thread.clone());
        let sockets = pod_sockets(&settings);
        let endpoints = Listeners::bind(&access, &sockets, &settings, &mut Vec::new()).await?;
        let prepared = PreparedProxy::new(&settings, &access, endpoints, watcher, supervisor);
        let prepared = prepared.await?;
        confine(&thread, &settings, prepared.control_thread()).await?;
        // The wait holds no traffic: pods are enrolled afterwards.
        let mut proxy = tokio::select! {
            started = prepared.start(supervisor) => started?,
            why = stop.wait() => {
                tracing::info!(why, "stopped while waiting for the control plane");
                return Ok(None);
            }
        };
        let (mesh, following) = proxy.mesh(&settings, watcher, supervisor)?;
        let enroller = NodeEnroller {
            data_plane: proxy.data_plane(),
            gate: Gates::default().rules,
            settings: settings.clone(),
            thread: thread.clone(),
            rules: RulesTotals::default(),
            hosts,
        };
        let (registry, pods) = PodRegistry::new(Arc::new(enroller));
        let mut tasks = vec![
            supervisor.essential("namespaces thread", async move { thread.ended().await }),
            supervisor.essential("registry of pods", pods.run()),
        ];
        tasks.extend(following);
        tokio::select! {
            connected = proxy.connect(&registry, &settings, access.clone(), supervisor) => connected?,
            why = stop.wait() => {
                tracing::info!(why, "stopped while waiting for the proxy process");
                return Ok(None);
            }
        }
        // Open the source before rules are installed, so that a failure leaves no rules.
        let source = source(&settings, mesh, &access, watcher)?;
        let mut probes = None;
        if settings.node.probes == NodeProbes::Translate {
            let translation = ProbeTranslation::start(access, registry.served_addresses()).await?;
            let rules = translation.rules();
            let task = supervisor.essential("rules for kubelet probes", translation.run());
            probes = Some((rules, task));
        }
        Ok(Some((Self { settings, proxy, registry, tasks, probes }, source)))
    }

    /// Serves until a stop signal, and returns the signal's name.
    async fn serve(
        &mut self,
        source: Box<dyn PodSource>,
        stop: &mut StopSignal,
    ) -> Result<&'static str, CommandError> {
        self.proxy.ready();
        notify::ready();
        let (name, pods) = (self.settings.node.name.as_deref(), self.settings.node.pods.as_ref());
        tracing::info!(
            node = name,
            source = pods.map(PodSourceSettings::name),
            path = pods.map(|pods| tracing::field::display(pods.path().display())),
            workers = workers(&self.settings),
            "serving the pods of this node"
        );
        tokio::select! {
            end = source.run(self.registry.clone(), self.proxy.source_health()) => Err(end.into()),
            why = stop.wait() => Ok(why),
            error = self.proxy.failed() => Err(error),
        }
    }

    /// Removes every pod and stops the workers. A second stop signal ends the drain.
    async fn stop(mut self, why: &'static str, stop: &mut StopSignal) -> Result<(), CommandError> {
        notify::stopping();
        let pods = self.registry.status().len();
        tracing::info!(why, pods, deadline = ?self.settings.timeouts.drain, "stopping");
        self.proxy.drain();
        tokio::select! {
            () = self.registry.stop().gone() => {}
            why = stop.wait() => {
                tracing::warn!(why, "second stop signal: ending the drain and keeping the rules of pods that still drain");
            }
            error = self.proxy.failed() => return Err(error),
        }
        if let Some((rules, task)) = self.probes {
            drop(task);
            probes::leave(&rules, self.settings.interception.on_exit).await;
        }
        self.proxy.end().await;
        drop(self.tasks);
        tracing::info!("stopped");
        Ok(())
    }
}

/// The source of pods that the settings name.
fn source(
    settings: &Arc<Settings>,
    mesh: watch::Receiver<Arc<Snapshot>>,
    access: &NamespaceAccess,
    watcher: &FileWatcher,
) -> Result<Box<dyn PodSource>, CommandError> {
    match &settings.node.pods {
        Some(PodSourceSettings::Zds(socket)) => Ok(Box::new(ZdsSource::new(socket.clone()))),
        Some(PodSourceSettings::Cni(socket)) => {
            let (origin, watches) = facts(settings, mesh, access)?;
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
    mesh: watch::Receiver<Arc<Snapshot>>,
    access: &NamespaceAccess,
) -> Result<(FactOrigin, JoinSet<()>), CommandError> {
    let Some(cluster) = kubernetes::cluster(settings)? else {
        return Ok((FactOrigin::Mesh(mesh), JoinSet::new()));
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

/// Reduces the capabilities of the control thread to `control`. Its workers, if it starts any, drop
/// them too. The namespaces thread keeps those for entering pods' namespaces and installing rules.
async fn confine(
    thread: &NamespaceThread,
    settings: &Settings,
    control: KeptCapabilities,
) -> Result<(), CommandError> {
    confine_thread(control).map_err(CommandError::Start)?;
    let programs = settings.interception.install
        && settings.interception.backend != underpass_config::Backend::Nftables;
    Ok(thread.confine(KeptCapabilities::Namespaces { programs }).await?)
}
