//! The process with its sockets bound, and mesh and certificate files loaded.

use std::sync::Arc;

use underpass_config::{FileWatcher, Settings};
use underpass_interception::{Namespace, NamespaceAccess, NamespaceThread, ProxyUser};

use super::Core;
use super::endpoints::bind_admin_socket;
use super::guarded::Guarded;
use crate::node::phases::{BoundPod, PodSpec, RulesOwner};
use crate::node::pod::pod_sockets;
use crate::process::command_error::CommandError;
use crate::process::instance::{Instance, Status};
use crate::process::passed_sockets::PassedSockets;
use crate::process::pause_gate::PauseGate;
use crate::process::proxy_part::{FixedPodRules, PreparedProxy, ProxyStart};
use crate::process::reload::Reload;
use crate::process::supervise::{Supervisor, restarting};
use crate::process::take_over::{ReceivedSockets, TakeoverClient, TakeoverServer};
use crate::traffic::listeners::{BoundEndpoints, Listeners};

/// The process with its sockets bound. Dropping it leaves no trace.
pub(crate) struct Bound {
    core: Core,
    pod: BoundPod,
    rules: FixedPodRules,
    proxy: PreparedProxy,
    reload: Reload,
    takeovers: TakeoverServer,
    /// The connection to the process that is being taken over.
    client: Option<TakeoverClient>,
}

impl Bound {
    /// Binds the sockets that were not passed to this process, and loads the mesh and certificate
    /// files. `user` is that of the proxy process, if there is one.
    pub(crate) async fn bind(
        settings: Arc<Settings>,
        user: Option<ProxyUser>,
        (reload, watcher): (Reload, FileWatcher),
        passed: PassedSockets,
        supervisor: Supervisor,
    ) -> Result<Self, CommandError> {
        let PassedSockets { client, sockets: mut handed, store } = passed;
        let instance = Instance::claim(&settings, handed.instance.take()).await?;
        let thread = NamespaceThread::start().map_err(CommandError::start)?;
        let access = NamespaceAccess::new(Namespace::current()?, thread.clone());
        let (rules, sockets) = (FixedPodRules::default(), pod_sockets(&settings));
        let spec = PodSpec {
            uid: None,
            settings: settings.clone(),
            access: access.clone(),
            interception: reload.subscribe(),
            health: rules.health.clone(),
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
        // Otherwise the running process still accepts.
        let paused = client.is_some();
        let start = ProxyStart {
            settings: &settings,
            user,
            access: &access,
            endpoints: BoundEndpoints { listeners, admin_socket: socket, paused },
            watcher: &watcher,
            supervisor: &supervisor,
        };
        let proxy = PreparedProxy::of_pod(start, &rules).await?;
        let instance = instance.map(|instance| {
            let status = Status {
                settings: settings.clone(),
                interception: reload.subscribe(),
                rules: rules.health.clone(),
                readiness: proxy.readiness(),
            };
            restarting("instance socket", move || instance.clone().serve(status.clone()))
        });
        let privileged = thread.clone();
        let _privileged =
            supervisor.essential("namespaces thread", async move { privileged.ended().await });
        let rules_gate = PauseGate::default();
        let core = Core { settings, supervisor, thread, rules_gate, instance, store, _privileged };
        Ok(Self { core, pod, rules, proxy, reload, takeovers, client })
    }

    /// Installs the rules. Before that, a running process stops repairing its own.
    pub(crate) async fn guard(self) -> Result<Guarded, CommandError> {
        let Self { core, pod, rules, proxy, reload, takeovers, client } = self;
        let owner = match &client {
            Some(client) => {
                client.rules().await?;
                RulesOwner::OtherProcess
            }
            None => RulesOwner::ThisProcess,
        };
        let pod = pod.guard(owner).await?;
        // Set once only.
        rules.capture.set(pod.capture().clone()).ok();
        Ok(Guarded { core, pod, proxy, reload, takeovers, client })
    }
}
