//! The subject of the doctor: the host, the settings, and the running proxy. Everything that
//! several checks need is determined once.

use std::sync::Arc;
use std::time::Duration;

use http::Method;
use tokio::sync::OnceCell;
use tokio::time::timeout;
use underpass_config::{
    FileWatcher, IdentitySettings, Mesh, Profile, Protocol, Settings, Sources, SpiffeId,
};
use underpass_hbone::{Credentials, HboneError, Identity, IssuerProblem, Trust};
use underpass_interception::{
    HostFacts, Inotify, Interception, InterceptionError, ListeningSocket, Namespace,
    NamespaceAccess, NamespaceThread, Ports, ProxyUser, RunningProcess, Sockets, listening_sockets,
};

use crate::admin::api::status::Status;
use crate::admin::client::AdminClient;
use crate::cli::config::check::ConfigCheck;
use crate::mesh::first_state::{FirstState, FirstStateError, first_state};
use crate::node::certificates::{first_identity, origin};
use crate::node::pod::pod_sockets;
use crate::process::command_error::CommandError;
use crate::process::instance::{self, InstanceError, Running};
use crate::process::take_over::control_socket::{self, ADMIN};
use crate::traffic::dial::PlainDialer;
use crate::traffic::listeners::addresses;

/// Timeout for a certificate of a CA or an agent.
const ISSUE_TIMEOUT: Duration = Duration::from_secs(20);
/// Timeout for the first state of a control plane.
const STATE_TIMEOUT: Duration = Duration::from_secs(20);

/// The subject of all checks.
pub(super) struct Subject {
    /// Whether only the host is checked, before the installation or without settings.
    pub(super) is_host_only: bool,
    /// The settings, or the defaults if there are none without a mistake.
    pub(super) settings: Settings,
    pub(super) configuration: ConfigCheck,
    pub(super) facts: HostFacts,
    pub(super) running: Result<Option<Running>, InstanceError>,
    /// The running proxy as /proc shows it: the process that serves connections.
    pub(super) process: Option<RunningProcess>,
    /// The sockets that listen on the ports of the settings.
    pub(super) listening: Vec<ListeningSocket>,
    /// The thread for operations on rules.
    pub(super) thread: NamespaceThread,
    /// Access for operations on rules.
    pub(super) access: NamespaceAccess,
    /// Access for connections, which the rules do not capture.
    pub(super) network: NamespaceAccess,
    interception: OnceCell<Result<Option<Interception>, InterceptionError>>,
    credentials: OnceCell<Result<Option<Credentials>, HboneError>>,
    state: OnceCell<Option<Result<FirstState, FirstStateError>>>,
    /// See [`status`](Self::status).
    status: Option<Status>,
}

impl Subject {
    /// Reads the facts and the settings: the given ones, otherwise those of the running proxy.
    pub(super) async fn new(
        sources: Option<Sources>,
        is_host_only: bool,
    ) -> Result<Self, CommandError> {
        let start = || NamespaceThread::start().map_err(CommandError::start);
        let (namespace, thread, network) = (Namespace::current()?, start()?, start()?);
        let facts = thread.call(&namespace, HostFacts::read).await?;
        let running = instance::running().await;
        let known = running.as_ref().ok().and_then(Option::as_ref);
        let read = async |pid: Option<u32>| match pid {
            Some(pid) => {
                thread.call(&namespace, move |inside| RunningProcess::read(inside, pid)).await
            }
            None => Ok(None),
        };
        let mut process = read(known.map(|running| running.pid)).await?;
        let configuration = match (&sources, known) {
            (Some(sources), _) => ConfigCheck::of(sources),
            (None, Some(running)) => {
                if process.is_some() {
                    // Relative paths in its settings refer to its working directory. Without the
                    // permission to enter it, they refer to that of this process.
                    std::env::set_current_dir(format!("/proc/{}/cwd", running.pid)).ok();
                }
                ConfigCheck::of_settings(running.settings.clone())
            }
            (None, None) => ConfigCheck::default(),
        };
        let settings = match &configuration.settings {
            Some(settings) => settings.clone(),
            None => Sources::default().load()?,
        };
        let is_host_only = is_host_only || (sources.is_none() && known.is_none());
        let status = if is_host_only { None } else { reported(&settings).await };
        if process.is_none() {
            process = read(status.as_ref().map(|status| status.pid)).await?;
        }
        let ports: Vec<_> = addresses(&settings).iter().map(|one| one.address.port()).collect();
        let listening =
            thread.call(&namespace, move |inside| listening_sockets(inside, &ports)).await?;
        // Without the required capabilities, the proxy's user is unknown, and a check reports it.
        if let Ok(Some(user)) = ProxyUser::required(&settings.interception) {
            network.open_files_as(user).await?;
        }
        let access =
            |thread: &NamespaceThread| NamespaceAccess::new(namespace.clone(), thread.clone());
        let (access, network) = (access(&thread), access(&network));
        let (interception, credentials, state) =
            (OnceCell::new(), OnceCell::new(), OnceCell::new());
        Ok(Self {
            is_host_only,
            settings,
            configuration,
            facts,
            running,
            process,
            listening,
            thread,
            access,
            network,
            interception,
            credentials,
            state,
            status,
        })
    }

    /// Whether the settings are those of a node daemon.
    pub(super) fn is_node(&self) -> bool {
        self.settings.node.pods.is_some()
    }

    /// The running proxy of this network namespace.
    pub(super) fn running(&self) -> Option<&Running> {
        self.running.as_ref().ok()?.as_ref()
    }

    /// The status that the running proxy reports on its socket of administration; `None` without a
    /// proxy or without permission.
    pub(super) fn status(&self) -> Option<&Status> {
        self.status.as_ref()
    }

    /// The processes of the running proxy; empty if none runs.
    pub(super) fn processes(&self) -> Vec<u32> {
        let running = self.running().map(|running| running.pid);
        let reported = self.status().map(|status| status.pid);
        // The broker of a node has the listeners too.
        let broker = self.process.and_then(|process| process.parent).filter(|_| self.is_node());
        running.into_iter().chain(reported).chain(broker).collect()
    }

    /// Access to the rules; `None` if the subject has none here: those of a node are in its pods.
    pub(super) async fn interception(&self) -> &Result<Option<Interception>, InterceptionError> {
        let interception = self.interception.get_or_init(async || {
            if self.is_node() {
                return Ok(None);
            }
            let ports = Ports::of(&self.settings);
            Interception::prepare(&self.access, &self.settings.interception, ports).await
        });
        interception.await
    }

    /// A dialer whose connections the rules do not capture.
    pub(super) fn dialer(&self) -> PlainDialer {
        PlainDialer { access: self.network.clone(), sockets: self.sockets() }
    }

    /// The options of sockets for connections. Without NET_ADMIN they have no mark, so the rules
    /// may capture them.
    pub(super) fn sockets(&self) -> Sockets {
        let sockets = pod_sockets(&self.settings);
        if !sockets.need_net_admin() || self.facts.has("NET_ADMIN") {
            return sockets;
        }
        let mut unmarked = self.settings.clone();
        unmarked.interception.profile = Profile::None;
        pod_sockets(&unmarked)
    }

    /// The credentials of the workload; `None` without a source of certificates. On a node, those
    /// of one of its workloads.
    pub(super) async fn credentials(&self) -> &Result<Option<Credentials>, HboneError> {
        self.credentials.get_or_init(|| self.get_credentials()).await
    }

    async fn get_credentials(&self) -> Result<Option<Credentials>, HboneError> {
        let Some(source) = &self.settings.identity else { return Ok(None) };
        let identity = match self.configuration.identity.clone().filter(|_| !self.is_node()) {
            Some(identity) => identity,
            None => self.issued(source).await?,
        };
        let trust = Trust::read(&self.settings.trust)?;
        Credentials::new(identity, trust).map(Some)
    }

    async fn issued(&self, source: &IdentitySettings) -> Result<Identity, HboneError> {
        let id = self.identity_to_issue().await;
        let (dialer, watcher) = (self.dialer(), FileWatcher::new(Inotify::open));
        let issued = timeout(ISSUE_TIMEOUT, first_identity(source, &id, dialer, &watcher)).await;
        issued.unwrap_or_else(|_| {
            let what = IssuerProblem::ReplyTimeout(ISSUE_TIMEOUT);
            Err(HboneError::Issuer { issuer: origin(source), what, source: None })
        })
    }

    /// The identity of the workload. On a node, that of a workload of the node in the mesh.
    async fn identity_to_issue(&self) -> SpiffeId {
        let own = self.settings.workload.spiffe_id.clone();
        if !self.is_node() {
            return own;
        }
        let mesh = self.mesh().await;
        let node = self.settings.node.name.as_deref().unwrap_or_default();
        let workloads = mesh.workloads();
        let local = workloads.iter().find(|workload| &*workload.node == node);
        let other = workloads.iter().find(|workload| workload.protocol == Protocol::Hbone);
        local.or(other).map_or(own, |workload| workload.identity.clone())
    }

    /// The first state of the control plane; `None` if there is no control plane.
    pub(super) async fn state(&self) -> Option<&Result<FirstState, FirstStateError>> {
        let state = self.state.get_or_init(async || {
            let xds = self.settings.xds.as_ref()?;
            let state = timeout(STATE_TIMEOUT, first_state(&self.settings, xds, self.dialer()));
            Some(state.await.unwrap_or(Err(FirstStateError::Timeout(STATE_TIMEOUT))))
        });
        state.await.as_ref()
    }

    /// The mesh of the control plane, otherwise that of the file.
    pub(super) async fn mesh(&self) -> Arc<Mesh> {
        match self.state().await {
            Some(Ok(state)) => state.mesh.clone(),
            _ => Arc::new(self.configuration.mesh.clone()),
        }
    }
}

/// The status of the proxy with these settings.
async fn reported(settings: &Settings) -> Option<Status> {
    let socket = control_socket::path(&settings.admin.socket, ADMIN).ok()??;
    let mut client = AdminClient::connect(socket).await.ok()?;
    client.json(Method::GET, "/status").await.ok()
}
