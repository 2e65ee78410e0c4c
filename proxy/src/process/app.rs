//! `underpass run`: one proxy for the namespace that it stands in, from its settings to its end. The only wiring.
//!
//! Start: check → bind → mesh, certificate from files → rules → the proxy's own user → certificate from others → workers →
//! self-test → ready. Whatever fails before the rules leaves none behind; stop: unready → no more accepts, GOAWAY → drain →
//! rules removed or kept → end. Taking over from a process that runs has the same steps, with its listeners (`take_over.rs`).

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use underpass_config::{
    FileWatcher, InterceptionSettings, MeshSource, Settings, Sources, SpiffeId,
};
use underpass_interception::{
    BoundListener, Namespace, NamespaceAccess, NamespaceThread, raise_open_files,
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
use crate::process::take_over::{Claim, Gates, Handed, Offer, Offered};
use crate::rules::capture::{Capture, Probes, keep};
use crate::rules::retest::Retest;
use crate::rules::{kubelet_probes, retest};
use crate::traffic::listeners::{EndpointKind, Kind, Listeners, SplitListeners};

/// How long the workers may take to close the listeners of a pod.
const LISTENERS_CLOSE: Duration = Duration::from_secs(1);

/// How `underpass run` was started.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Start {
    /// Whether to stop when the parent ends.
    pub(crate) until_eof: bool,
    /// Whether to take over from the process that runs.
    pub(crate) take_over: bool,
}

/// Whose the rules are, and from whom they are to come to us.
#[derive(Debug)]
struct Tenure {
    /// The process that we are about to take over from.
    claim: Option<Claim>,
    /// Whether the rules are ours to remove.
    rules: bool,
}

/// Why a proxy serves no longer.
#[derive(Debug, Clone, Copy)]
enum End {
    Stopped(&'static str),
    /// Another process serves instead.
    HandedOver {
        pid: Option<i32>,
    },
}

/// Runs until it is told to stop, or another process has taken over. `sources` are where the settings came from, and are read
/// again when they change.
pub(crate) async fn run(
    settings: Settings,
    sources: Sources,
    start: Start,
) -> Result<(), CommandError> {
    let stop = StopSignal::new(start.until_eof)?;
    raise_open_files().map_err(CommandError::Start)?;
    let (claim, handed) = claim(&settings, start.take_over).await?.unzip();
    let mut tenure = Tenure { rules: claim.is_none(), claim };
    let mut handed = handed.unwrap_or_default();
    let instance = Instance::claim(&settings, handed.instance.take()).await?;
    let thread = NamespaceThread::start().map_err(CommandError::start)?;
    let capture = Capture::prepare(&settings, Namespace::current()?, thread).await?;
    let watcher = FileWatcher::default();
    let reload = Reload::watch(&settings, sources, &watcher)?;
    let mut proxy =
        Proxy::prepare(&settings, handed, capture.access(), reload.subscribe(), &watcher).await?;
    proxy.offer = proxy.offer.with_instance(instance.clone());
    if let Some(instance) = instance {
        let (settings, interception) = (settings.clone(), reload.subscribe());
        let readiness = proxy.endpoints.readiness.clone();
        let answering = instance.serve(Status { settings, interception, readiness });
        proxy.endpoints.serving.push(tokio::spawn(answering));
    }
    if let Some(claim) = &tenure.claim {
        claim.rules().await?;
    }
    capture.install().await?;
    let serving = serve(&settings, &capture, proxy, reload, stop, &mut tenure);
    let outcome = Box::pin(serving).await;
    if !tenure.rules {
        tracing::info!("the rules are another process's");
        return outcome;
    }
    let left = capture.leave(&settings.interception).await;
    outcome.and(left)
}

/// The process to take over from, if there is to be one and there is, and what it has handed over.
async fn claim(
    settings: &Settings,
    take_over: bool,
) -> Result<Option<(Claim, Handed)>, CommandError> {
    if !take_over {
        return Ok(None);
    }
    let claim = Claim::make(settings).await?;
    if claim.is_none() {
        tracing::info!("there is no process to take over from: starting as ever");
    }
    Ok(claim)
}

/// From the installed rules to the end of the last connection.
async fn serve(
    settings: &Settings,
    capture: &Capture,
    proxy: Proxy,
    reload: Reload,
    mut stop: StopSignal,
    tenure: &mut Tenure,
) -> Result<(), CommandError> {
    let Proxy { node, mut pod, publisher, listeners, mut offer, gates, endpoints } = proxy;
    let readiness = &endpoints.readiness;
    // Made while the process may still be another user than the proxy, whose connections are not caught.
    let probes = capture.probes(&settings.interception).await?;
    capture.warn_of_bypassing().await;
    capture.confine(&settings.interception).await?;
    certificates::warn_if_unreadable(settings);
    if pod.credentials.is_none() {
        pod.credentials = tokio::select! {
            lease = lease(&node, &settings.workload.spiffe_id) => lease?,
            why = stop.wait() => {
                tracing::info!(why, "stopped before there was a certificate");
                return Ok(());
            }
        };
    }
    if let Some(claim) = &tenure.claim {
        claim.accept().await?;
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
    // Before the test, so that no change is missed that follows it.
    let changes = retest::subscribe(capture.access()).await;
    if let Err(error) = prove(settings, capture, pod, &probes, tenure).await {
        // Who goes on accepting instead goes first; what came meanwhile is served.
        gates.accept.close().await;
        tenure.claim = None;
        node.drain.drain(&pod.connections, settings.timeouts.drain).await;
        return Err(error);
    }
    // Whatever can fail, and be it for want of a descriptor, comes before `ready`.
    let guard = capture.guard(&settings.interception).await?;
    offer.own();
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
    let keeper = tokio::spawn(keep(guard, reload, readiness.clone(), gates.rules));

    let end = tokio::select! {
        end = until_end(settings, capture, offer, &mut stop) => end,
        end = retest.run() => match end {},
    };
    keeper.abort();
    end_orderly(end, settings, &running, &endpoints, &mut stop, tenure).await;
    // Policy enforcement runs until the drain completes, and so does certificate renewal: the pod
    // holds it.
    publishing.abort();
    // A worker that does not end holds nothing that the end of the process would not free.
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

/// Drains, as the end asks for.
async fn end_orderly(
    end: End,
    settings: &Settings,
    Running { node, pod, workers }: &Running,
    endpoints: &Endpoints,
    stop: &mut StopSignal,
    tenure: &mut Tenure,
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
            tenure.rules = false;
            endpoints.close();
            notify::succeeded_by(pid);
            tracing::info!(pid, connections, deadline = ?timeouts.handover_drain, "another process has taken over");
            [timeouts.handover_drain, timeouts.drain, Duration::ZERO]
        }
    };
    // A worker that does not answer delays the drain no longer than that.
    tokio::time::timeout(LISTENERS_CLOSE, workers.remove_listeners(pod.id)).await.ok();
    let aborted = drain(node, pod, stop, deadlines).await;
    tracing::info!(aborted, "drained");
}

/// Tests the rules with connections that come to us; then whoever served before needs to no longer.
async fn prove(
    settings: &Settings,
    capture: &Capture,
    pod: &Pod,
    probes: &Probes,
    tenure: &mut Tenure,
) -> Result<(), CommandError> {
    capture.test_at_start(&pod.self_test, probes, &settings.interception).await?;
    if let Some(claim) = &tenure.claim {
        claim.ready().await?;
    }
    *tenure = Tenure { claim: None, rules: true };
    Ok(())
}

/// Waits until it is told to stop, or another process has taken over. While one tries, a signal has to wait.
async fn until_end(
    settings: &Settings,
    capture: &Capture,
    mut offer: Offer,
    stop: &mut StopSignal,
) -> End {
    loop {
        let conversation = tokio::select! {
            why = stop.wait() => return End::Stopped(why),
            conversation = offer.asked() => conversation,
        };
        match offer.answer(conversation).await {
            Offered::Taken { pid } => return End::HandedOver { pid },
            // Who keeps the rules looks at them now; else it is done here.
            Offered::TakenBack if settings.interception.repair => {}
            Offered::TakenBack => {
                if let Err(error) = capture.install().await {
                    let error = crate::error::chain(&error);
                    tracing::error!(error, "the rules may be other than they should");
                }
            }
        }
    }
}

/// Drains until the first deadline; each further stop signal shortens that to the next one.
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

/// What serves connections, bound and loaded but not yet running.
struct Proxy {
    node: Arc<Node>,
    /// The only pod: its credentials come later.
    pod: Pod,
    publisher: Publisher,
    listeners: Vec<(Kind, BoundListener)>,
    offer: Offer,
    gates: Gates,
    endpoints: Endpoints,
}

impl Proxy {
    async fn prepare(
        settings: &Settings,
        handed: Handed,
        access: &NamespaceAccess,
        interception: watch::Receiver<InterceptionSettings>,
        watcher: &FileWatcher,
    ) -> Result<Self, CommandError> {
        let sockets = pod_sockets(settings);
        let gates = Gates::default();
        if handed.is_something() {
            // It is still another process that answers.
            gates.accept.close().await;
        }
        let Handed { listeners, place, instance: _ } = handed;
        let listeners = Listeners::bind(access, &sockets, settings, listeners).await?;
        let offered = listeners.try_clone().map_err(CommandError::Start)?;
        let offer = Offer::make(settings, offered, gates.clone(), place)?;
        let SplitListeners { traffic: listeners, endpoints } = listeners.split();
        let exporter = metrics::install(settings.series).map_err(CommandError::Metrics)?;
        let series = exporter.series.clone();
        let endpoints = Endpoints::serve(endpoints, exporter, &gates.accept);
        let readiness = &endpoints.readiness;
        let identities = Certificates::identities(settings, access, &sockets, readiness, watcher)?;
        let (source, mesh) = MeshSource::open(settings.mesh_file.as_deref(), watcher)?;
        let publisher = Publisher::new(source, mesh, &settings.workload);
        let (mesh, accept) = (publisher.subscribe(), gates.accept.clone());
        let node = Node::new(settings, workers(settings), mesh, accept, series);
        let node = Arc::new(Node { identities, ..node });
        let mut pod = Pod::open(&node, settings, access, sockets, interception).await?;
        if certificates::is_local(settings) {
            pod.credentials = lease(&node, &settings.workload.spiffe_id).await?;
        }
        Ok(Self { node, pod, publisher, listeners, offer, gates, endpoints })
    }
}

/// Readiness, metrics and the answers to those that ask for this proxy, served on the control
/// thread from now on.
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
                    tracing::error!(endpoint = ?kind, %error, "an endpoint ended");
                }
            })
        };
        let serving = listeners.into_iter().map(serve).collect();
        Self { readiness, serving }
    }

    /// Closes their listeners: another process has them too.
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
