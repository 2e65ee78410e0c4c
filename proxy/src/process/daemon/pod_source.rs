//! Opens the source of pods that the settings name.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinSet;
use underpass_config::{FileWatcher, PodSourceSettings, Settings};
use underpass_interception::NamespaceAccess;

use crate::decide::snapshot::Snapshot;
use crate::node::pod::pod_sockets;
use crate::pods::cni::CniSource;
use crate::pods::cni::facts::FactOrigin;
use crate::pods::directory::DirectorySource;
use crate::pods::kubernetes;
use crate::pods::kubernetes::api::Api;
use crate::pods::source::PodSource;
use crate::pods::zds::ZdsSource;
use crate::process::command_error::CommandError;
use crate::traffic::dial::PlainDialer;

/// The source of pods that the settings name.
pub(super) fn open(
    settings: &Arc<Settings>,
    mesh: watch::Receiver<Arc<Snapshot>>,
    access: &NamespaceAccess,
    watcher: &FileWatcher,
) -> Result<Box<dyn PodSource>, CommandError> {
    match &settings.node.pods {
        Some(PodSourceSettings::Zds(socket)) => Ok(Box::new(ZdsSource::new(socket.clone()))),
        Some(PodSourceSettings::Cni(socket)) => {
            let (origin, watches) = facts(settings, mesh, access)?;
            Ok(Box::new(CniSource::new(settings, socket.clone(), origin, watches, watcher)))
        }
        Some(PodSourceSettings::Directory(folder)) => {
            Ok(Box::new(DirectorySource::open(folder, watcher)?))
        }
        None => Err(CommandError::NoPodSource),
    }
}

/// The origin of the facts that the CNI plugin does not know, and the tasks that keep it current.
fn facts(
    settings: &Settings,
    mesh: watch::Receiver<Arc<Snapshot>>,
    access: &NamespaceAccess,
) -> Result<(FactOrigin, JoinSet<()>), CommandError> {
    let Some(cluster) = kubernetes::cluster(settings)? else {
        return Ok((FactOrigin::Mesh(mesh), JoinSet::new()));
    };
    let name = settings.node.name.as_deref().ok_or(CommandError::NoNodeName)?;
    tracing::info!(
        server = cluster.server,
        node = name,
        "watching the pods of this node at the API server"
    );
    let dialer = PlainDialer { access: access.clone(), sockets: pod_sockets(settings) };
    let (view, watches) = kubernetes::watch::follow(Api::new(cluster, dialer), name);
    Ok((FactOrigin::Kubernetes(view), watches))
}
