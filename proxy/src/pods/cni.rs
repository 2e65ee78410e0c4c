//! The source of pods that the container runtime reports through a chained CNI plugin.
//!
//! ```text
//! runtime ─▶ underpass cni (plugin) ─ socket ─▶ server ─▶ ledger ─▶ PodRegistry
//!                                                           └─▶ store: for the next process
//! ```
//!
//! In reading order: `attachment` defines names, and `protocol` the messages between plugin and
//! daemon. `server` answers the plugin, `ledger` tracks the attachments, and `facts` looks pods up
//! in the mesh. `store` keeps pods across restarts. `install` installs the plugin, and `upkeep`
//! keeps it installed.

pub(crate) mod attachment;
mod facts;
pub(crate) mod install;
mod ledger;
pub(crate) mod namespace_file;
pub(crate) mod protocol;
mod server;
mod store;
#[cfg(test)]
pub(crate) mod testing;
mod upkeep;

use std::convert::Infallible;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use thiserror::Error;
use tokio::sync::watch;
use tokio::task::JoinSet;
use underpass_config::{FileWatcher, Settings};

use self::facts::FactFinder;
use self::install::Installation;
use self::ledger::Ledger;
use self::store::{Store, StoreError};
use self::upkeep::{Report, Upkeep};
use crate::decide::snapshot::Snapshot;
use crate::pods::registry::PodRegistry;
use crate::pods::source::{PodSource, SourceEnd, SourceHealth, SourceRun};
use crate::process::take_over::control_socket::ControlSocket;

/// Receives pods from the CNI plugin.
#[derive(Debug)]
pub(crate) struct CniSource {
    socket: PathBuf,
    facts: FactFinder,
    /// Keeps the plugin installed; `None` if the operator installs it.
    upkeep: Option<Upkeep>,
}

/// Why the daemon cannot serve the plugin.
#[derive(Debug, Error)]
enum CniError {
    #[error("cannot listen on {socket}", socket = socket.display())]
    Listen { socket: PathBuf, source: io::Error },
    #[error("cannot use the stored pods")]
    Store(#[from] StoreError),
    #[error("cannot read the stored pods")]
    Read(#[source] io::Error),
}

impl CniSource {
    /// Serves the plugin on `socket`. `mesh` provides the service accounts of pods.
    pub(crate) fn new(
        settings: &Settings,
        socket: PathBuf,
        mesh: watch::Receiver<Arc<Snapshot>>,
        watcher: &FileWatcher,
    ) -> Self {
        let upkeep = settings.node.cni_install.as_ref().map(|folders| {
            let installation = Installation {
                network_folder: folders.net_dir.clone(),
                program_folder: folders.bin_dir.clone(),
                socket: socket.clone(),
                drop_in: false,
            };
            Upkeep::new(installation, watcher.clone())
        });
        Self { socket, facts: FactFinder::new(settings, mesh), upkeep }
    }

    async fn serve(
        self,
        registry: PodRegistry,
        health: SourceHealth,
    ) -> Result<Infallible, CniError> {
        // Load the stored pods before the first call, which may be for one of them.
        let socket = ControlSocket::bind(&self.socket, None)
            .map_err(|source| CniError::Listen { socket: self.socket.clone(), source })?;
        let store = Store::open(self.socket.with_extension("pods"))?;
        let ledger = Arc::new(Ledger::new(registry, self.facts, store, namespace_file::open));
        // Dropping this future ends the tasks.
        let mut tasks = JoinSet::new();
        for pod in ledger.resume().map_err(CniError::Read)? {
            let ledger = ledger.clone();
            tasks.spawn(async move { ledger.resume_late(pod).await });
        }
        let report = Report::new(health);
        let not_ready = report.subscribe();
        match self.upkeep {
            Some(upkeep) => drop(tasks.spawn(upkeep.run(report))),
            None => report.set(None),
        }
        Ok(server::serve(socket, ledger, not_ready).await)
    }
}

impl PodSource for CniSource {
    fn run(self: Box<Self>, registry: PodRegistry, health: SourceHealth) -> SourceRun {
        Box::pin(async move {
            match self.serve(registry, health).await {
                Err(error) => SourceEnd { source_name: "node.pods.cni", error: error.into() },
                Ok(never) => match never {},
            }
        })
    }
}
