//! `underpass run`: builds, runs and stops the proxy of the current network namespace.
//!
//! ```text
//! start: check, bind, load mesh and certificate files, install rules, become the proxy's user,
//!        request certificate, start workers, self-test, ready
//! stop:  unready, stop accepting, GOAWAY, drain, remove or keep rules
//! ```
//!
//! A failure before the rules are installed leaves none behind. A take-over has the same steps with
//! the running process's listeners (`take_over.rs`).

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use underpass_config::{
    FileWatcher, InterceptionSettings, MeshSource, Settings, Sources, SpiffeId,
};
use underpass_interception::{
    BoundListener, Inotify, Namespace, NamespaceAccess, NamespaceThread, raise_open_files,
    run_in_background,
};

use crate::admin::endpoints::{Endpoint, Readiness};
use crate::mesh::publish::Publisher;
use crate::node::certificates::Certificates;
use crate::node::identities::CredentialLease;
use crate::node::pod::{Pod, pod_sockets};
use crate::node::workers::Workers;
use crate::node::{Node, certificates};
use crate::observe::metrics;
use crate::observe::metrics::Exporter;
use crate::process::command_error::CommandError;
use crate::process::cpus::processors;
use crate::process::instance::{Instance, Status};
use crate::process::notify;
use crate::process::pause_gate::PauseGate;
use crate::process::reload::Reload;
use crate::process::stop_signal::StopSignal;
use crate::process::take_over::{
    Gates, HandedOver, TakeoverClient, TakeoverOutcome, TakeoverServer,
};
use crate::rules::capture::{Capture, Probes, reconcile};
use crate::rules::retest::Retest;
use crate::rules::{kubelet_probes, retest};
use crate::traffic::listeners::{EndpointKind, Kind, Listeners, SplitListeners};

/// Timeout for the workers to close the listeners of a pod.
const LISTENERS_CLOSE: Duration = Duration::from_secs(1);

/// How `underpass run` was started.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Start {
    /// Whether to stop when the parent ends.
    pub(crate) until_eof: bool,
    /// Whether to take over from the running process.
    pub(crate) take_over: bool,
}

/// Whether this process owns the rules, or takes them over from another one.
#[derive(Debug)]
struct RuleOwnership {
    /// The connection to the process that this one takes over from.
    client: Option<TakeoverClient>,
    /// Whether this process removes or keeps the rules at its end.
    owned: bool,
}

/// Why the proxy stops serving.
#[derive(Debug, Clone, Copy)]
enum End {
    Stopped(&'static str),
    /// Another process has taken over.
    HandedOver {
        pid: Option<i32>,
    },
}

/// Runs until a stop signal, or until another process takes over. Reloads the settings from
/// `sources` when they change.
pub(crate) async fn run(
    settings: Settings,
    sources: Sources,
    start: Start,
) -> Result<(), CommandError> {
    let stop = StopSignal::new(start.until_eof)?;
    raise_open_files().map_err(CommandError::Start)?;
    let (client, handed) = connect_to_running(&settings, start.take_over).await?.unzip();
    let mut ownership = RuleOwnership { owned: client.is_none(), client };
    let mut handed = handed.unwrap_or_default();
    let instance = Instance::claim(&settings, handed.instance.take()).await?;
    let thread = NamespaceThread::start().map_err(CommandError::start)?;
    let capture = Capture::prepare(&settings, Namespace::current()?, thread).await?;
    let watcher = FileWatcher::new(Inotify::open);
    let reload = Reload::watch(&settings, sources, &watcher)?;
    let mut proxy =
        Proxy::prepare(&settings, handed, capture.access(), reload.subscribe(), &watcher).await?;
    proxy.takeovers = proxy.takeovers.with_instance(instance.clone());
    if let Some(instance) = instance {
        let (settings, interception) = (settings.clone(), reload.subscribe());
        let readiness = proxy.endpoints.readiness.clone();
        let answering = instance.serve(Status { settings, interception, readiness });
        proxy.endpoints.serving.push(tokio::spawn(answering));
    }
    if let Some(client) = &ownership.client {
        client.rules().await?;
    }
    capture.install().await?;
    let serving = serve(&settings, &capture, proxy, reload, stop, &mut ownership);
    let outcome = Box::pin(serving).await;
    if !ownership.owned {
        tracing::info!("the rules belong to the process that has taken over, and stay");
        return outcome;
    }
    let left = capture.leave(&settings.interception).await;
    outcome.and(left)
}

/// The connection to the running process and its sockets; `None` without `--take-over` or without
/// a running process.
async fn connect_to_running(
    settings: &Settings,
    take_over: bool,
) -> Result<Option<(TakeoverClient, HandedOver)>, CommandError> {
    if !take_over {
        return Ok(None);
    }
    let client = TakeoverClient::connect(settings).await?;
    if client.is_none() {
        tracing::info!("no running process to take over from: starting without one");
    }
    Ok(client)
}

/// Serves, from the installed rules to the end of the drain.
async fn serve(
    settings: &Settings,
    capture: &Capture,
    proxy: Proxy,
    reload: Reload,
    mut stop: StopSignal,
    ownership: &mut RuleOwnership,
) -> Result<(), CommandError> {
    let Proxy { node, mut pod, publisher, listeners, mut takeovers, gates, endpoints } = proxy;
    let readiness = &endpoints.readiness;
    // Opened before the process becomes the proxy's user, whose connections are not caught.
    let probes = capture.probes(&settings.interception).await?;
    capture.warn_of_bypassing().await;
    capture.confine(&settings.interception).await?;
    certificates::warn_if_unreadable(settings);
    if pod.credentials.is_none() {
        pod.credentials = tokio::select! {
            lease = lease(&node, &settings.workload.spiffe_id) => lease?,
            why = stop.wait() => {
                tracing::info!(why, "stopped while waiting for the certificate");
                return Ok(());
            }
        };
    }
    if let Some(client) = &ownership.client {
        client.accept().await?;
        gates.accept.open();
    }
    let started = Workers::start(&node, workers(settings)).map_err(CommandError::start)?;
    let (workers, reports) = started;
    let running = Running { node, pod: Arc::new(pod), workers };
    let Running { node, pod, .. } = &running;
    running.workers.add_listeners(pod, listeners).await;
    tokio::spawn({
        let (limits, readiness) = (node.limits.clone(), readiness.clone());
        async move { limits.report(readiness).await }
    });
    let publishing = tokio::spawn(publisher.follow(reports));
    // Subscribes before the self-test, so that no change after the test is missed.
    let changes = retest::subscribe(capture.access()).await;
    if let Err(error) = test_rules(settings, capture, pod, &probes, ownership).await {
        // Stop accepting before the other process resumes, then drain the accepted connections.
        gates.accept.close().await;
        ownership.client = None;
        node.drain.drain(&pod.connections, settings.timeouts.drain).await;
        return Err(error);
    }
    // Everything that can fail comes before `ready`.
    let reconciler = capture.reconciler(&settings.interception).await?;
    takeovers.own();
    announce(settings, pod, readiness);
    let retest = Retest {
        capture: capture.clone(),
        self_test: pod.self_test.clone(),
        probes,
        settings: reload.subscribe(),
        readiness: readiness.clone(),
        gate: gates.rules.clone(),
        changes,
    };
    let _probes = kubelet_probes::observe(&pod.context.probes, capture.exempting_probes());
    let reconciling = tokio::spawn(reconcile(reconciler, reload, readiness.clone(), gates.rules));

    let end = tokio::select! {
        end = until_end(settings, capture, takeovers, &mut stop) => end,
        end = retest.run() => match end {},
    };
    reconciling.abort();
    shut_down(end, settings, &running, &endpoints, &mut stop, ownership).await;
    // Policy enforcement runs until the drain completes, and so does certificate renewal: the pod
    // holds it.
    publishing.abort();
    // The end of the process frees the resources of a worker that does not stop in time.
    tokio::time::timeout(Duration::from_secs(1), running.workers.join()).await.ok();
    tracing::info!("stopped");
    Ok(())
}

/// Reports that the proxy is ready.
fn announce(settings: &Settings, pod: &Pod, readiness: &Readiness) {
    readiness.ready();
    notify::ready();
    let (ports, workers) = (pod.context.ports, workers(settings));
    tracing::info!(
        workload = %settings.workload.name, workers, outbound = ports.outbound, inbound = ports.inbound,
        hbone = ports.hbone, profile = %settings.interception.profile, "ready"
    );
}

/// A node that serves one pod.
struct Running {
    node: Arc<Node>,
    pod: Arc<Pod>,
    workers: Workers,
}

/// Drains; the deadline depends on the reason for the end.
async fn shut_down(
    end: End,
    settings: &Settings,
    Running { node, pod, workers }: &Running,
    endpoints: &Endpoints,
    stop: &mut StopSignal,
    ownership: &mut RuleOwnership,
) {
    endpoints.readiness.draining();
    let timeouts = &settings.timeouts;
    let connections = pod.connections.open();
    let deadlines = match end {
        End::Stopped(why) => {
            notify::stopping();
            tracing::info!(why, connections, deadline = ?timeouts.drain, "stopping");
            [timeouts.drain, Duration::ZERO, Duration::ZERO]
        }
        End::HandedOver { pid } => {
            ownership.owned = false;
            endpoints.close();
            notify::succeeded_by(pid);
            tracing::info!(pid, connections, deadline = ?timeouts.handover_drain, "another process has taken over");
            [timeouts.handover_drain, timeouts.drain, Duration::ZERO]
        }
    };
    // A worker that does not answer must not delay the drain.
    tokio::time::timeout(LISTENERS_CLOSE, workers.remove_listeners(pod.id)).await.ok();
    let aborted = drain(node, pod, stop, deadlines).await;
    tracing::info!(aborted, "drained");
}

/// Runs the self-test of the rules, then completes a take-over.
async fn test_rules(
    settings: &Settings,
    capture: &Capture,
    pod: &Pod,
    probes: &Probes,
    ownership: &mut RuleOwnership,
) -> Result<(), CommandError> {
    capture.test_at_start(&pod.self_test, probes, &settings.interception).await?;
    if let Some(client) = &ownership.client {
        client.ready().await?;
    }
    *ownership = RuleOwnership { client: None, owned: true };
    Ok(())
}

/// Waits for a stop signal or a take-over. Stop signals wait while a take-over is in progress.
async fn until_end(
    settings: &Settings,
    capture: &Capture,
    mut takeovers: TakeoverServer,
    stop: &mut StopSignal,
) -> End {
    loop {
        let conversation = tokio::select! {
            why = stop.wait() => return End::Stopped(why),
            conversation = takeovers.accept() => conversation,
        };
        match takeovers.answer(conversation).await {
            TakeoverOutcome::Completed { pid } => return End::HandedOver { pid },
            // The reconciler verifies the rules now; without one they are installed here.
            TakeoverOutcome::Abandoned if settings.interception.repair => {}
            TakeoverOutcome::Abandoned => {
                if let Err(error) = capture.install().await {
                    let error = crate::error::chain(&error);
                    tracing::error!(error, "cannot restore the rules after a failed take-over");
                }
            }
        }
    }
}

/// Drains until the first deadline; each further stop signal selects the next, shorter one.
async fn drain(node: &Node, pod: &Pod, stop: &mut StopSignal, deadlines: [Duration; 3]) -> usize {
    let [first, second, last] = deadlines;
    for deadline in [first, second] {
        tokio::select! {
            aborted = node.drain.drain(&pod.connections, deadline) => return aborted,
            why = stop.wait() => tracing::warn!(why, "second stop signal: shortening the drain"),
        }
    }
    node.drain.drain(&pod.connections, last).await
}

/// The parts of a proxy, bound and loaded but not yet serving.
struct Proxy {
    node: Arc<Node>,
    /// The only pod. Its credentials may still be missing.
    pod: Pod,
    publisher: Publisher,
    listeners: Vec<(Kind, BoundListener)>,
    takeovers: TakeoverServer,
    gates: Gates,
    endpoints: Endpoints,
}

impl Proxy {
    async fn prepare(
        settings: &Settings,
        handed: HandedOver,
        access: &NamespaceAccess,
        interception: watch::Receiver<InterceptionSettings>,
        watcher: &FileWatcher,
    ) -> Result<Self, CommandError> {
        let sockets = pod_sockets(settings);
        let gates = Gates::default();
        if handed.is_take_over() {
            // The running process still accepts.
            gates.accept.close().await;
        }
        let HandedOver { listeners, control_socket, instance: _ } = handed;
        let listeners = Listeners::bind(access, &sockets, settings, listeners).await?;
        let offered = listeners.try_clone().map_err(CommandError::Start)?;
        let takeovers = TakeoverServer::listen(settings, offered, gates.clone(), control_socket)?;
        let SplitListeners { traffic: listeners, endpoints } = listeners.split();
        let exporter = metrics::install(settings.series).map_err(CommandError::Metrics)?;
        let series = exporter.series.clone();
        let endpoints = Endpoints::serve(endpoints, exporter, &gates.accept);
        let readiness = &endpoints.readiness;
        let identities = Certificates::identities(settings, access, &sockets, readiness, watcher)?;
        let (source, mesh) =
            MeshSource::open(settings.mesh_file.as_deref(), watcher, run_in_background)?;
        let publisher = Publisher::new(source, mesh, &settings.workload);
        let (mesh, accept) = (publisher.subscribe(), gates.accept.clone());
        let node = Node::new(settings, workers(settings), mesh, accept, series);
        let node = Arc::new(Node { identities, ..node });
        let mut pod = Pod::open(&node, settings, access, sockets, interception).await?;
        if certificates::is_local(settings) {
            pod.credentials = lease(&node, &settings.workload.spiffe_id).await?;
        }
        Ok(Self { node, pod, publisher, listeners, takeovers, gates, endpoints })
    }
}

/// The tasks that serve readiness, metrics and the instance socket on the control thread.
struct Endpoints {
    readiness: Readiness,
    serving: Vec<JoinHandle<()>>,
}

impl Endpoints {
    fn serve(
        listeners: Vec<(EndpointKind, BoundListener)>,
        exporter: Exporter,
        gate: &PauseGate,
    ) -> Self {
        let readiness = Readiness::default();
        let serve = |(kind, listener)| {
            let endpoint = match kind {
                EndpointKind::Readiness => Endpoint::Readiness(readiness.clone()),
                EndpointKind::Metrics => Endpoint::Metrics(exporter.clone()),
            };
            let gate = gate.clone();
            tokio::spawn(async move {
                if let Err(error) = endpoint.serve(listener, gate).await {
                    tracing::error!(endpoint = ?kind, %error, "cannot serve an endpoint any longer");
                }
            })
        };
        let serving = listeners.into_iter().map(serve).collect();
        Self { readiness, serving }
    }

    /// Closes the listeners, which the process that has taken over shares.
    fn close(&self) {
        self.serving.iter().for_each(JoinHandle::abort);
    }
}

/// The credentials of `id`; `None` without certificates. Waits until one is issued.
async fn lease(node: &Node, id: &SpiffeId) -> Result<Option<CredentialLease>, CommandError> {
    match &node.identities {
        Some(identities) => identities.lease(id).await.map(Some).map_err(CommandError::Identity),
        None => Ok(None),
    }
}

fn workers(settings: &Settings) -> usize {
    settings.proxy.workers.unwrap_or_else(processors)
}
