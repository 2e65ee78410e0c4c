//! The source of pods that the container runtime reports through a chained CNI plugin.
//!
//! ```text
//! runtime ─▶ underpass cni (plugin) ─ socket ─▶ server ─▶ ledger ─▶ PodRegistry
//!                                                           └─▶ store: for the next process
//! ```
//!
//! In reading order: `attachment` defines names, and `protocol` the messages between plugin and
//! daemon. `server` answers the plugin, `ledger` tracks the attachments, and `facts` looks pods up
//! at the API server or in the mesh. `unadded` and `results` find pods that bypass the plugin.
//! `store` keeps pods across restarts. `install` installs the plugin, `upkeep` keeps it installed,
//! and `report` says whether pods can be added.

pub(crate) mod attachment;
pub(crate) mod facts;
pub(crate) mod install;
mod ledger;
pub(crate) mod namespace_file;
pub(crate) mod protocol;
mod report;
mod results;
mod server;
mod store;
#[cfg(test)]
pub(crate) mod testing;
mod unadded;
mod upkeep;

use std::convert::Infallible;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use thiserror::Error;
use tokio::task::{JoinError, JoinSet};
use underpass_config::{FileWatcher, Settings};

use self::facts::{FactFinder, FactOrigin};
use self::install::Installation;
use self::ledger::Ledger;
use self::report::{Condition, Report};
use self::results::CniResults;
use self::store::{Store, StoreError};
use self::upkeep::Upkeep;
use crate::pods::source::{PodSource, SourceContext, SourceEnd, SourceRun, SourceState};
use crate::process::pause_gate::PauseGate;
use crate::process::take_over::control_socket::ControlSocket;

/// Receives pods from the CNI plugin.
#[derive(Debug)]
pub(crate) struct CniSource {
    socket: PathBuf,
    facts: FactFinder,
    results: CniResults,
    /// The tasks that follow the facts from Kubernetes.
    watches: JoinSet<()>,
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
    #[error("a task of the source of pods failed")]
    Task(#[source] JoinError),
}

impl CniSource {
    /// Serves the plugin on `socket`. `origin` provides the facts that the plugin does not know;
    /// `watches` keep it current.
    pub(crate) fn new(
        settings: &Settings,
        socket: PathBuf,
        origin: FactOrigin,
        watches: JoinSet<()>,
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
        let results = CniResults::new(settings.node.cni_results.clone());
        Self { socket, facts: FactFinder::new(settings, origin), results, watches, upkeep }
    }

    async fn serve(self, context: SourceContext) -> Result<Infallible, CniError> {
        let SourceContext { registry, health, pauses, inherited } = context;
        // Load the stored pods before the first call, which may be for one of them.
        let socket = self
            .listen(inherited)
            .map_err(|source| CniError::Listen { socket: self.socket.clone(), source })?;
        let store = Store::open(self.socket.with_extension("pods"))?;
        let ledger = Arc::new(Ledger::new(registry, self.facts, store, namespace_file::open));
        ledger.resume().map_err(CniError::Read)?;
        let report = Arc::new(Report::new(health));
        let not_ready = report.subscribe();
        // Dropping this future ends the tasks, including the watches.
        let mut tasks = self.watches;
        let facts_gate = PauseGate::default();
        let following =
            ledger.clone().follow_facts(self.results, report.clone(), facts_gate.clone());
        tasks.spawn(following);
        match self.upkeep {
            Some(upkeep) => drop(tasks.spawn(upkeep.run(report))),
            None => report.set(Condition::Installed, None),
        }
        // The tasks never return: only a panic ends one.
        tokio::select! {
            never = server::serve(socket, ledger, not_ready, pauses, &facts_gate) => Ok(never),
            Some(Err(panic)) = tasks.join_next() => Err(CniError::Task(panic)),
        }
    }

    /// Continues to listen on the socket of the process that was taken over, if there is one.
    fn listen(&self, inherited: Option<SourceState>) -> io::Result<ControlSocket> {
        match inherited.and_then(|state| state.descriptors.into_iter().next()) {
            Some(socket) => {
                let mut socket = ControlSocket::share(&self.socket, socket)?;
                socket.own(true);
                Ok(socket)
            }
            None => ControlSocket::bind(&self.socket, None),
        }
    }
}

impl PodSource for CniSource {
    fn run(self: Box<Self>, context: SourceContext) -> SourceRun {
        Box::pin(async move {
            match self.serve(context).await {
                Err(error) => SourceEnd { source_name: "node.pods.cni", error: error.into() },
                Ok(never) => match never {},
            }
        })
    }
}
