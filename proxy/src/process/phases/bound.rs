//! The process with its sockets bound, and mesh and certificate files loaded.

use std::sync::Arc;

use underpass_config::{FileWatcher, Settings, Sources};
use underpass_interception::{Inotify, Namespace, NamespaceAccess, NamespaceThread};

use super::endpoints::{Endpoints, Reports, bind_admin_socket};
use super::guarded::{Guarded, lease};
use super::{Core, workers};
use crate::admin::readiness::Readiness;
use crate::admin::state::Admin;
use crate::mesh::feed::MeshFeed;
use crate::mesh::publish::Publisher;
use crate::node::certificates::Certificates;
use crate::node::identities::CredentialLease;
use crate::node::phases::{BoundPod, PodSpec, RulesOwner};
use crate::node::pod::pod_sockets;
use crate::node::{Node, certificates};
use crate::observe::metrics;
use crate::observe::otlp::Telemetry;
use crate::process::command_error::CommandError;
use crate::process::instance::{Instance, Status};
use crate::process::pause_gate::Gates;
use crate::process::reload::Reload;
use crate::process::supervise::Supervisor;
use crate::process::take_over::{ReceivedSockets, TakeoverClient, TakeoverServer};
use crate::rules::health::RulesHealth;
use crate::traffic::dial::PlainDialer;
use crate::traffic::listeners::{BoundEndpoints, Listeners};

/// The process with its sockets bound. Dropping it leaves no trace.
pub(crate) struct Bound {
    core: Core,
    pod: BoundPod,
    /// The credentials of the workload, if they are issued without a connection.
    credentials: Option<CredentialLease>,
    publisher: Publisher,
    reload: Reload,
    takeovers: TakeoverServer,
    /// The connection to the process that is being taken over.
    client: Option<TakeoverClient>,
}

impl Bound {
    /// Binds the sockets, or receives those of a running process, and loads the mesh and
    /// certificate files. Reloads the settings from `sources` when they change.
    pub(crate) async fn bind(
        settings: Settings,
        sources: Sources,
        take_over: bool,
        supervisor: Supervisor,
    ) -> Result<Self, CommandError> {
        let (client, handed) = TakeoverClient::connect_if(take_over, &settings).await?.unzip();
        let mut handed = handed.unwrap_or_default();
        let instance = Instance::claim(&settings, handed.instance.take()).await?;
        let thread = NamespaceThread::start().map_err(CommandError::start)?;
        let access = NamespaceAccess::new(Namespace::current()?, thread.clone());
        let (watcher, settings) = (FileWatcher::new(Inotify::open), Arc::new(settings));
        let reload = Reload::watch(&settings, sources, &watcher)?;
        let gates = Gates::default();
        if client.is_some() {
            // The running process still accepts.
            gates.accept.close().await;
        }
        let (health, sockets) = (RulesHealth::default(), pod_sockets(&settings));
        let readiness = Readiness::for_pod(health.clone());
        let exporter = metrics::install(settings.series.clone()).map_err(CommandError::Metrics)?;
        let identities = Certificates::identities(
            &settings,
            &access,
            &sockets,
            None,
            Some(&readiness),
            &watcher,
            &supervisor,
        )?;
        let dialer = PlainDialer { access: access.clone(), sockets: sockets.clone() };
        let (tracer, telemetry) = Telemetry::start(&settings, dialer.clone())?;
        let (feed, mesh) = MeshFeed::open(&settings, &watcher, dialer, &readiness, &supervisor)?;
        let publisher = Publisher::new(feed, mesh, &settings.workload);
        let lookups = publisher.lookups();
        let (mesh, series) = (publisher.subscribe(), exporter.series.clone());
        let node =
            Node::new(&settings, &access, workers(&settings), mesh, lookups, gates.clone(), series);
        let (node, identities) = (Arc::new(Node { tracer, ..node }), identities.map(Arc::new));
        let spec = PodSpec {
            uid: None,
            settings: settings.clone(),
            access: access.clone(),
            interception: reload.subscribe(),
            health,
        };
        let ReceivedSockets { listeners: handed, control_socket, admin_socket, .. } = &mut handed;
        let pod = BoundPod::bind(spec, handed).await?;
        let listeners = Listeners::bind(&access, &sockets, &settings, handed).await?;
        let mut offered = pod.duplicate_listeners();
        offered.extend(listeners.duplicate());
        let (control_socket, handed_admin_socket) = (control_socket.take(), admin_socket.take());
        let takeovers = TakeoverServer::listen(&settings, offered, control_socket).await?;
        let (admin_socket, socket) = bind_admin_socket(&settings, handed_admin_socket).await?;
        let takeovers = takeovers.with_instance(instance.clone()).with_admin_socket(admin_socket);
        let bound = BoundEndpoints { listeners, admin_socket: socket, paused: client.is_some() };
        let admin = Admin::new(&settings, &node).with(&readiness, identities.as_ref());
        let admin = Arc::new(admin);
        let reports = Reports { readiness, exporter, admin };
        let mut endpoints =
            Endpoints::serve(bound, reports, &gates.accept).map_err(CommandError::Start)?;
        let mut credentials = None;
        if certificates::is_local(&settings) {
            credentials = lease(identities.as_deref(), &settings).await?;
        }
        if let Some(instance) = instance {
            let readiness = endpoints.readiness.clone();
            let interception = reload.subscribe();
            let settings = settings.clone();
            endpoints.answer(instance, Status { settings, interception, readiness });
        }
        let privileged = thread.clone();
        let _privileged =
            supervisor.essential("namespaces thread", async move { privileged.ended().await });
        let core = Core {
            settings,
            supervisor,
            node,
            identities,
            thread,
            endpoints,
            telemetry,
            _privileged,
        };
        Ok(Self { core, pod, credentials, publisher, reload, takeovers, client })
    }

    /// Installs the rules. Before that, a running process stops repairing its own.
    pub(crate) async fn guard(self) -> Result<Guarded, CommandError> {
        let Self { core, pod, credentials, publisher, reload, takeovers, client } = self;
        let owner = match &client {
            Some(client) => {
                client.rules().await?;
                RulesOwner::OtherProcess
            }
            None => RulesOwner::ThisProcess,
        };
        let pod = pod.guard(owner).await?;
        let capture = pod.capture().clone();
        core.endpoints.admin.report_rules(move |_| {
            let capture = capture.clone();
            Box::pin(async move { Ok(capture.report().await) })
        });
        Ok(Guarded { core, pod, credentials, publisher, reload, takeovers, client })
    }
}
