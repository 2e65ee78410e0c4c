//! `underpass node`: serves the pods of a node, from its start to its end.
//!
//! ```text
//! start  bind the endpoints, start the proxy part (`privileges.broker`), drop privileges
//! adopt  take over the pods of a running daemon (`adoption.rs`), with `--take-over`
//! serve  the source of pods adds and removes pods in the registry
//! stop   report unready; drain and remove every pod; keep or remove its rules (`on_exit`),
//!        or leave them to the process that has taken over
//! ```
//!
//! After any other end of the process, every pod's rules stay: its traffic is refused.

mod adoption;
mod pod_source;

use std::sync::Arc;

use futures_util::poll;
use tokio::time::timeout;
use underpass_config::{FileWatcher, NodeProbes, PodSourceSettings, Settings, Sources};
use underpass_interception::{
    HostNamespaces, HostRules, Inotify, KeptCapabilities, Namespace, NamespaceAccess,
    NamespaceThread, confine_thread, raise_open_files,
};

use crate::broker::separation::Separation;
use crate::limits::PodDescriptors;
use crate::node::pod::pod_sockets;
use crate::pods::node_enroller::NodeEnroller;
use crate::pods::probes::{self, ProbeTranslation};
use crate::pods::registry::PodRegistry;
use crate::pods::source::{self, PodSource, SourceContext, SourceState};
use crate::pods::take_over::outgoing::OutgoingPods;
use crate::process::app::{Start, run_until_failure};
use crate::process::background;
use crate::process::command_error::CommandError;
use crate::process::node_proxy::workers;
use crate::process::notify;
use crate::process::passed_sockets::PassedSockets;
use crate::process::pause_gate::PauseGate;
use crate::process::phases::draining::StopReason;
use crate::process::phases::endpoints::bind_admin_socket;
use crate::process::proxy_part::{PreparedProxy, ProxyPart, ProxyStart};
use crate::process::reload::Reload;
use crate::process::stop_signal::StopSignal;
use crate::process::supervise::{Supervisor, Task};
use crate::process::take_over::{ReceivedSockets, TakeoverOutcome, TakeoverServer};
use crate::process::watchdog;
use crate::rules::health::RulesTotals;
use crate::traffic::listeners::{BoundEndpoints, Listeners};

/// Serves the pods of this node until a stop signal, or until another process has taken over.
///
/// # Errors
///
/// The daemon cannot start, or an essential task failed. The rules of pods stay installed.
pub(crate) async fn run(
    settings: Settings,
    sources: Sources,
    start: Start,
) -> Result<(), CommandError> {
    let (supervisor, failures) = Supervisor::new();
    let life = Box::pin(run_phases(settings, sources, start, supervisor));
    run_until_failure(life, failures).await
}

async fn run_phases(
    settings: Settings,
    sources: Sources,
    start: Start,
    supervisor: Supervisor,
) -> Result<(), CommandError> {
    let mut stop = StopSignal::new(start.until_eof)?;
    raise_open_files().map_err(CommandError::Start)?;
    let watcher = FileWatcher::new(Inotify::open);
    let reload = Reload::watch(&settings, sources, &watcher)?;
    let settings = Arc::new(settings);
    let passed = PassedSockets::receive(&settings, start.take_over, start.inherited).await?;
    let PassedSockets { client, sockets, mut store } = passed;
    let paused = client.is_some();
    let started = Daemon::start(settings, sockets, paused, &watcher, supervisor, &mut stop).await?;
    let Some((mut daemon, source)) = started else { return Ok(()) };
    // Pods keep the interception settings with which they were enrolled.
    let reloading = reload.start(false, daemon.proxy.log_changes());
    daemon.tasks.push(reloading);
    let mut inherited = None;
    match client {
        Some(client) => match daemon.adopt(client, &mut stop).await? {
            Some(adopted) => (daemon, inherited) = adopted,
            None => return Ok(()),
        },
        None => daemon.probes = daemon.pods.translate_probes().await?,
    }
    store.keep(daemon.takeovers.listeners());
    let watchdog = watchdog::start(daemon.proxy.liveness());
    let end = daemon.serve(source, inherited, &mut stop, start.report_ready).await?;
    match end {
        StopReason::Stopped(_) => {
            store.clear();
            daemon.tasks.extend(watchdog);
        }
        // The supervisor watches the process that has taken over.
        StopReason::HandedOver { .. } => drop(watchdog),
    }
    daemon.stop(end, &mut stop).await
}

/// A running daemon.
struct Daemon {
    proxy: ProxyPart,
    pods: NodePods,
    takeovers: TakeoverServer,
    /// Tasks that run until the last pod is removed.
    tasks: Vec<Task>,
    probes: Option<ProbeRules>,
}

/// The pods of the node, without their connections.
struct NodePods {
    settings: Arc<Settings>,
    supervisor: Supervisor,
    /// Operations in the namespace of the daemon.
    access: NamespaceAccess,
    registry: PodRegistry,
    /// Pauses the repair of the rules in the host's namespace.
    host_rules: PauseGate,
}

/// The rules for kubelet probes in the host's namespace, and the task that maintains them.
type ProbeRules = (HostRules, Task);

impl NodePods {
    /// Installs the rules in the host's namespace, and keeps them.
    async fn translate_probes(&self) -> Result<Option<ProbeRules>, CommandError> {
        if self.settings.node.probes != NodeProbes::Translate {
            return Ok(None);
        }
        let (pods, gate) = (self.registry.served_addresses(), self.host_rules.clone());
        let translation = ProbeTranslation::start(self.access.clone(), pods, gate).await?;
        let rules = translation.rules();
        let task = self.supervisor.essential("rules for kubelet probes", translation.run());
        Ok(Some((rules, task)))
    }
}

impl Daemon {
    /// Starts without pods, with the sockets that a running process or the supervisor has `handed`
    /// over. `paused`: a running process accepts on them. `None` if a stop signal came before.
    async fn start(
        settings: Arc<Settings>,
        mut handed: ReceivedSockets,
        paused: bool,
        watcher: &FileWatcher,
        supervisor: Supervisor,
        stop: &mut StopSignal,
    ) -> Result<Option<(Self, Box<dyn PodSource>)>, CommandError> {
        let hosts = HostNamespaces::read()?;
        let thread = NamespaceThread::start().map_err(CommandError::start)?;
        let access = NamespaceAccess::new(Namespace::current()?, thread.clone());
        let sockets = pod_sockets(&settings);
        let listeners =
            Listeners::bind(&access, &sockets, &settings, &mut handed.listeners).await?;
        let (offered, control_socket) = (listeners.duplicate(), handed.control_socket.take());
        let takeovers = TakeoverServer::listen(&settings, offered, control_socket).await?;
        let handed = handed.admin_socket.take();
        let (admin, socket) = bind_admin_socket(&settings, handed).await?;
        let takeovers = takeovers.with_admin_socket(admin);
        let endpoints = BoundEndpoints { listeners, admin_socket: socket, paused };
        let separation = Separation::of(&settings);
        separation.log();
        let start = ProxyStart {
            settings: &settings,
            user: separation.user(),
            access: &access,
            endpoints,
            watcher,
            supervisor: &supervisor,
        };
        let prepared = PreparedProxy::of_node(start).await?;
        confine(&thread, &settings, prepared.control_thread()).await?;
        // The wait holds no traffic: pods are enrolled afterwards.
        let mut proxy = tokio::select! {
            started = prepared.start(&supervisor) => started?,
            why = stop.wait() => {
                tracing::info!(why, "stopped while waiting for the control plane");
                return Ok(None);
            }
        };
        let (mesh, following) = proxy.mesh(&settings, watcher, &supervisor)?;
        let enroller = NodeEnroller {
            data_plane: proxy.data_plane(),
            settings: settings.clone(),
            thread: thread.clone(),
            rules: RulesTotals::default(),
            descriptors: PodDescriptors::new(workers(&settings)),
            hosts,
        };
        let (registry, pods) = PodRegistry::new(Arc::new(enroller));
        let mut tasks = vec![
            supervisor.essential("namespaces thread", async move { thread.ended().await }),
            supervisor.essential("registry of pods", pods.run()),
        ];
        tasks.extend(following);
        tokio::select! {
            connected = proxy.connect(&registry, &settings, access.clone(), &supervisor) => connected?,
            why = stop.wait() => {
                tracing::info!(why, "stopped while waiting for the proxy process");
                return Ok(None);
            }
        }
        // Open the source before rules are installed, so that a failure leaves no rules.
        let source = match pod_source::open(&settings, mesh, &access, watcher) {
            Ok(source) => source,
            Err(error) => {
                // The proxy process has the listeners, on which the next start listens.
                proxy.end().await;
                return Err(error);
            }
        };
        let host_rules = PauseGate::default();
        let pods = NodePods { settings, supervisor, access, registry, host_rules };
        Ok(Some((Self { proxy, pods, takeovers, tasks, probes: None }, source)))
    }

    /// Serves until a stop signal, or until another process has taken over. Stop signals wait while
    /// a take-over is in progress.
    async fn serve(
        &mut self,
        source: Box<dyn PodSource>,
        inherited: Option<SourceState>,
        stop: &mut StopSignal,
        report_ready: bool,
    ) -> Result<StopReason, CommandError> {
        let Self { proxy, pods: NodePods { registry, host_rules, .. }, takeovers, .. } = self;
        let (handle, pauses) = source::pauses();
        let (health, registry) = (proxy.source_health(), registry.clone());
        let context = SourceContext { registry: registry.clone(), health, pauses, inherited };
        let mut source = source.run(context);
        // Runs before the node reports readiness, so that an inherited source counts at once.
        if let std::task::Poll::Ready(end) = poll!(&mut source) {
            return Err(end.into());
        }
        proxy.ready().await;
        notify::ready();
        if report_ready {
            background::report_ready();
        }
        log_start(&self.pods.settings);
        loop {
            let conversation = tokio::select! {
                end = &mut source => return Err(end.into()),
                why = stop.wait() => return Ok(StopReason::Stopped(why)),
                error = proxy.failed() => return Err(error),
                conversation = takeovers.accept() => conversation,
            };
            let (registry, handle) = (registry.clone(), handle.clone());
            let mut pods =
                OutgoingPods::new(registry, handle, proxy.accepting(), host_rules.clone());
            let outcome = tokio::select! {
                end = &mut source => return Err(end.into()),
                error = proxy.failed() => return Err(error),
                outcome = takeovers.answer(conversation, &mut pods) => outcome,
            };
            match outcome {
                TakeoverOutcome::Completed { pid } => return Ok(StopReason::HandedOver { pid }),
                TakeoverOutcome::Abandoned => {}
            }
        }
    }

    /// Removes every pod and stops the workers. A second stop signal ends the drain.
    async fn stop(mut self, end: StopReason, stop: &mut StopSignal) -> Result<(), CommandError> {
        let NodePods { settings, registry, .. } = &self.pods;
        let (pods, timeouts) = (registry.status().len(), &settings.timeouts);
        match end {
            StopReason::Stopped(why) => {
                notify::stopping();
                tracing::info!(why, pods, deadline = ?timeouts.drain, "stopping");
                self.proxy.drain();
            }
            StopReason::HandedOver { pid } => {
                self.proxy.hand_over();
                let deadline = timeouts.handover_drain;
                tracing::info!(pid, pods, ?deadline, "another process has taken over");
            }
        }
        tokio::select! {
            () = self.pods.drain(end, stop) => {}
            error = self.proxy.failed() => return Err(error),
        }
        if let Some((rules, task)) = self.probes {
            drop(task);
            if let StopReason::Stopped(_) = end {
                probes::leave(&rules, self.pods.settings.interception.on_exit).await;
            }
        }
        self.proxy.end().await;
        drop(self.tasks);
        tracing::info!("stopped");
        Ok(())
    }
}

impl NodePods {
    /// Removes every pod. A stop signal ends the drain; after a take-over, the first one only
    /// shortens it.
    async fn drain(&self, end: StopReason, stop: &mut StopSignal) {
        let StopReason::HandedOver { .. } = end else {
            return end_of(self.registry.stop().gone(), stop).await;
        };
        let mut gone = std::pin::pin!(self.registry.hand_over().gone());
        tokio::select! {
            () = &mut gone => {}
            why = stop.wait() => {
                let deadline = self.settings.timeouts.drain;
                tracing::warn!(why, ?deadline, "stop signal during the drain: shortening it");
                end_of(async { timeout(deadline, gone).await.unwrap_or_default() }, stop).await;
            }
        }
    }
}

/// Waits for the end of the drain, or for a stop signal.
async fn end_of(drain: impl Future<Output = ()>, stop: &mut StopSignal) {
    tokio::select! {
        () = drain => {}
        why = stop.wait() => {
            tracing::warn!(why, "second stop signal: ending the drain and keeping the rules of pods that still drain");
        }
    }
}

fn log_start(settings: &Settings) {
    let (name, pods) = (settings.node.name.as_deref(), settings.node.pods.as_ref());
    tracing::info!(
        node = name,
        source = pods.map(PodSourceSettings::name),
        path = pods.map(|pods| tracing::field::display(pods.path().display())),
        workers = workers(settings),
        "serving the pods of this node"
    );
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
