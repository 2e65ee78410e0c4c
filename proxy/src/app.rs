//! `underpass run`: one proxy for the namespace that it stands in, from its settings to its end. The only wiring.
//!
//! Start: check → bind → certificates and mesh → workers → rules → ready. The rules come last but one, so that whatever
//! fails before leaves none behind; stop: unready → no more accepts, GOAWAY → drain → rules removed or kept → end.

use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use underpass_config::{InterceptionSettings, MeshSource, OnExit, Settings};
use underpass_hbone::Identity;
use underpass_interception::{
    BoundListener, Interception, Ports, Sockets, ipv6_available, raise_open_files,
};

use crate::accept::Kind;
use crate::cli::CommandError;
use crate::drain::Drain;
use crate::endpoints::{Endpoint, Readiness};
use crate::notify;
use crate::parent::ParentGone;
use crate::worker::{self, Shared};
use crate::{metrics, processors};

/// Runs until a signal says stop, or the parent ends if `until_eof` asks for that.
pub(crate) async fn run(settings: Settings, until_eof: bool) -> Result<(), CommandError> {
    let mut stop = StopSignal::new(until_eof)?;
    let ports = ports(&settings);
    raise_open_files().map_err(CommandError::Start)?;
    let interception = Interception::prepare(&settings.interception, ports).await?;
    let sockets = Sockets::new(settings.interception.profile, ipv6_available());
    let listeners = bind_data_path(&sockets, ports)?;
    let readiness = Readiness::default();
    bind_endpoints(&sockets, &settings, &readiness)?;
    let shared = shared(&settings, sockets, ports)?;
    let workers = settings.proxy.workers.unwrap_or_else(processors);
    let threads = worker::start(&shared, workers, listeners)?;
    install(interception.as_ref()).await?;
    readiness.ready();
    notify::ready();
    tracing::info!(
        workload = %settings.workload.name, workers, outbound = ports.outbound, inbound = ports.inbound,
        hbone = ports.hbone, profile = ?settings.interception.profile, "ready"
    );

    let why = stop.wait().await;
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
    leave(&settings.interception, interception.as_ref()).await?;
    // A worker that does not end holds nothing that the end of the process would not free.
    tokio::time::timeout(Duration::from_secs(1), tokio::task::spawn_blocking(|| join(threads)))
        .await
        .ok();
    tracing::info!("stopped");
    Ok(())
}

fn join(threads: Vec<std::thread::JoinHandle<()>>) {
    for thread in threads {
        if thread.join().is_err() {
            tracing::error!("a worker panicked");
        }
    }
}

fn ports(settings: &Settings) -> Ports {
    Ports {
        outbound: settings.proxy.outbound_port,
        inbound: settings.proxy.inbound_port,
        hbone: settings.proxy.hbone_port,
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

fn shared(settings: &Settings, sockets: Sockets, ports: Ports) -> Result<Shared, CommandError> {
    let identity = settings.identity.as_ref().map(Identity::from_files).transpose();
    let identity = identity.map_err(CommandError::Identity)?;
    match &identity {
        None => tracing::warn!("no certificate (identity.*): HBONE is off, inbound and outbound"),
        Some(own) if *own.spiffe_id() != settings.workload.spiffe_id => tracing::warn!(
            certificate = %own.spiffe_id(), workload = %settings.workload.spiffe_id,
            "the certificate is for another workload than the settings name; peers see the certificate"
        ),
        Some(own) => tracing::info!(identity = %own.spiffe_id(), "certificate loaded"),
    }
    let mesh = MeshSource::open(settings.mesh_file.as_deref())?;
    tracing::info!(workloads = mesh.subscribe().borrow().len(), "mesh loaded");
    Ok(Shared {
        sockets,
        ports,
        timeouts: settings.timeouts.clone(),
        mesh: mesh.subscribe(),
        identity,
        drain: Drain::default(),
    })
}

async fn install(interception: Option<&Interception>) -> Result<(), CommandError> {
    let Some(interception) = interception else {
        tracing::info!("profile none: whatever catches traffic here is not ours");
        return Ok(());
    };
    if interception.ipv6_absent() {
        tracing::info!("the kernel has no IPv6 here: there is none to catch");
    }
    interception.install().await?;
    tracing::info!(rules = interception.plan().rules().len(), "rules installed");
    Ok(())
}

async fn leave(
    settings: &InterceptionSettings,
    interception: Option<&Interception>,
) -> Result<(), CommandError> {
    let Some(interception) = interception else {
        return Ok(());
    };
    match settings.on_exit {
        OnExit::Keep => tracing::info!(
            "the rules stay, so nothing leaves in plain; `underpass rules remove` removes them"
        ),
        OnExit::Remove => {
            interception.remove().await?;
            tracing::info!("rules removed: traffic is direct and plain from now on");
        }
    }
    Ok(())
}

/// Whatever tells the proxy to stop.
struct StopSignal {
    terminate: Signal,
    interrupt: Signal,
    parent: Option<ParentGone>,
}

impl StopSignal {
    fn new(until_eof: bool) -> Result<Self, CommandError> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).map_err(CommandError::Start)?,
            interrupt: signal(SignalKind::interrupt()).map_err(CommandError::Start)?,
            parent: until_eof.then(ParentGone::watch).transpose().map_err(CommandError::Start)?,
        })
    }

    async fn wait(&mut self) -> &'static str {
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
