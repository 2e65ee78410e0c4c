//! `underpass run`: one proxy for the namespace that it stands in, from its settings to its end. The only wiring.
//!
//! Start: check → bind → mesh, certificate from files → rules → the proxy's own user → certificate from others → workers →
//! self-test → ready. Whatever fails before the rules leaves none behind; stop: unready → no more accepts, GOAWAY → drain →
//! rules removed or kept → end.

use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use underpass_config::{MeshSource, Profile, Settings, Sources};
use underpass_hbone::HandshakeLimit;
use underpass_interception::{BoundListener, Ports, Sockets, ipv6_available, raise_open_files};

use crate::accept::Kind;
use crate::capture::{Capture, keep};
use crate::certificates::{self, Certificate};
use crate::cli::CommandError;
use crate::drain::Drain;
use crate::endpoints::{Endpoint, Readiness};
use crate::gate::Gate;
use crate::notify;
use crate::parent::ParentGone;
use crate::policy::Rules;
use crate::publish::Publisher;
use crate::reload::Reload;
use crate::resolve::Resolver;
use crate::self_test::SelfTest;
use crate::snapshot::Snapshot;
use crate::worker::{self, Shared, Workers};
use crate::{metrics, processors};

/// Runs until a signal says stop, or the parent ends if `until_eof` asks for that. `sources` are where the settings came
/// from, and are read again when they change.
pub(crate) async fn run(
    settings: Settings,
    sources: Sources,
    until_eof: bool,
) -> Result<(), CommandError> {
    let stop = StopSignal::new(until_eof)?;
    raise_open_files().map_err(CommandError::Start)?;
    let capture = Capture::prepare(&settings).await?;
    let proxy = Proxy::prepare(&settings, &capture).await?;
    let reload = Reload::watch(&settings, sources)?;
    capture.install().await?;
    let outcome = serve(&settings, &capture, proxy, reload, stop).await;
    let left = capture.leave(&settings.interception).await;
    outcome.and(left)
}

/// From the installed rules to the end of the last connection.
async fn serve(
    settings: &Settings,
    capture: &Capture,
    proxy: Proxy,
    reload: Reload,
    mut stop: StopSignal,
) -> Result<(), CommandError> {
    let Proxy { mut shared, publisher, certificate, listeners, readiness } = proxy;
    // Made while the process may still be another user than the proxy, whose connections are not caught.
    let probes = capture.probes(&settings.interception)?;
    if capture.become_proxy(&settings.interception)? {
        certificates::warn_if_unreadable(settings);
    }
    let certificate = tokio::select! {
        certificate = certificate.hold() => certificate?,
        why = stop.wait() => {
            tracing::info!(why, "stopped before there was a certificate");
            return Ok(());
        }
    };
    let renewal = match certificate {
        Certificate::Held(keeper, credentials) => {
            shared.credentials = Some(credentials);
            Some(tokio::spawn(keeper.run()))
        }
        Certificate::Off | Certificate::Wanted(_) => None,
    };
    let workers = settings.proxy.workers.unwrap_or_else(processors);
    let Workers { threads, applied } = worker::start(&shared, workers, listeners)?;
    let publishing = tokio::spawn(publisher.follow(applied));
    capture.test(&shared.self_test, probes).await?;
    readiness.ready();
    notify::ready();
    let ports = shared.rules.ports;
    tracing::info!(
        workload = %settings.workload.name, workers, outbound = ports.outbound, inbound = ports.inbound,
        hbone = ports.hbone, profile = %settings.interception.profile, "ready"
    );
    let keeper =
        tokio::spawn(keep(capture.guard(&settings.interception)?, reload, readiness.clone()));

    let why = stop.wait().await;
    keeper.abort();
    readiness.draining();
    notify::stopping();
    let deadline = settings.timeouts.drain;
    tracing::info!(why, connections = shared.drain.open(), ?deadline, "stopping");
    let aborted = tokio::select! {
        aborted = shared.drain.drain(deadline) => aborted,
        why = stop.wait() => {
            tracing::warn!(why, "told to stop again: not draining any longer");
            shared.drain.drain(Duration::ZERO).await
        }
    };
    tracing::info!(aborted, "drained");
    // Until here: what drains may outlive a certificate, or be forbidden.
    publishing.abort();
    if let Some(renewal) = renewal {
        renewal.abort();
    }
    // A worker that does not end holds nothing that the end of the process would not free.
    tokio::time::timeout(Duration::from_secs(1), tokio::task::spawn_blocking(|| join(threads)))
        .await
        .ok();
    tracing::info!("stopped");
    Ok(())
}

/// What serves connections, bound and loaded but not yet running.
struct Proxy {
    shared: Shared,
    publisher: Publisher,
    certificate: Certificate,
    listeners: Vec<(Kind, BoundListener)>,
    readiness: Readiness,
}

impl Proxy {
    async fn prepare(settings: &Settings, capture: &Capture) -> Result<Self, CommandError> {
        let (ports, ipv6) = (Ports::of(&settings.proxy), ipv6_available());
        let sockets =
            Sockets::new(&settings.interception, ipv6).with_keepalive(settings.timeouts.keepalive);
        let listeners = bind_data_path(&sockets, ports)?;
        let readiness = Readiness::default();
        bind_endpoints(&sockets, settings, &readiness)?;
        let unprivileged = capture.is_by_user() && !sockets.need_net_admin();
        let certificate = Certificate::prepare(settings, &sockets).await?;
        let (source, mesh) = MeshSource::open(settings.mesh_file.as_deref())?;
        let publisher = Publisher::new(source, mesh, &settings.workload);
        let shared = shared(settings, sockets, ports, unprivileged, publisher.subscribe());
        Ok(Self { shared, publisher, certificate, listeners, readiness })
    }
}

fn join(threads: Vec<std::thread::JoinHandle<()>>) {
    for thread in threads {
        if thread.join().is_err() {
            tracing::error!("a worker panicked");
        }
    }
}

fn bind_data_path(
    sockets: &Sockets,
    ports: Ports,
) -> Result<Vec<(Kind, BoundListener)>, CommandError> {
    Ok(vec![
        (
            Kind::Outbound,
            sockets.listen(ports.outbound, "caught outbound connections", "proxy.outbound_port")?,
        ),
        (Kind::Hbone, sockets.listen(ports.hbone, "tunnels", "proxy.hbone_port")?),
        (
            Kind::Plaintext,
            sockets.listen(ports.inbound, "caught inbound connections", "proxy.inbound_port")?,
        ),
    ])
}

/// Binds the readiness and metrics endpoints and serves them on the control thread from now on.
fn bind_endpoints(
    sockets: &Sockets,
    settings: &Settings,
    readiness: &Readiness,
) -> Result<(), CommandError> {
    let handle = metrics::install().map_err(CommandError::Metrics)?;
    let endpoints = [
        (
            Endpoint::Readiness(readiness.clone()),
            settings.readiness,
            "readiness",
            "readiness.address",
        ),
        (Endpoint::Metrics(handle), settings.metrics, "metrics", "metrics.address"),
    ];
    for (endpoint, address, purpose, setting) in endpoints {
        let listener = sockets.listen_on(address, purpose, setting)?;
        tokio::spawn(async move {
            if let Err(error) = endpoint.serve(listener).await {
                tracing::error!(purpose, %error, "an endpoint ended");
            }
        });
    }
    Ok(())
}

fn shared(
    settings: &Settings,
    sockets: Sockets,
    ports: Ports,
    unprivileged: bool,
    mesh: watch::Receiver<Arc<Snapshot>>,
) -> Shared {
    let rules = Rules {
        ports,
        own: settings.workload.clone(),
        egress: settings.egress.clone(),
        mtls: settings.proxy.mtls.clone(),
        // Only there does kubelet come from an address that nobody else has.
        probes: settings.interception.profile == Profile::Ambient,
    };
    Shared {
        sockets,
        rules: Arc::new(rules),
        timeouts: settings.timeouts.clone(),
        tunnels: settings.tunnels.clone(),
        mesh,
        endpoints: Arc::default(),
        resolver: Arc::new(Resolver::system()),
        credentials: None,
        handshakes: HandshakeLimit::new(settings.limits.handshakes_per_source),
        drain: Drain::default(),
        gate: Gate::default(),
        self_test: SelfTest::default(),
        unprivileged,
    }
}

/// Whatever tells the proxy to stop.
pub(crate) struct StopSignal {
    terminate: Signal,
    interrupt: Signal,
    parent: Option<ParentGone>,
}

impl StopSignal {
    pub(crate) fn new(until_eof: bool) -> Result<Self, CommandError> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).map_err(CommandError::Start)?,
            interrupt: signal(SignalKind::interrupt()).map_err(CommandError::Start)?,
            parent: until_eof.then(ParentGone::watch).transpose().map_err(CommandError::Start)?,
        })
    }

    pub(crate) async fn wait(&mut self) -> &'static str {
        let parent = async {
            match &mut self.parent {
                Some(parent) => parent.wait().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
            () = parent => "standard input ended",
        }
    }
}
