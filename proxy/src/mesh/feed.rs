//! The source of the mesh: a file, a control plane, or both.

use std::sync::Arc;

use thiserror::Error;
use tokio::sync::watch;
use underpass_config::{ConfigErrors, FileWatcher, Mesh, MeshSource, Settings};
use underpass_hbone::{ControlPlaneClient, ControlPlaneError, Dial};
use underpass_interception::run_in_background;

use super::control_plane::ControlPlaneFollower;
use super::on_demand::Lookups;
use crate::admin::readiness::Readiness;
use crate::observe::mesh_health::MeshHealth;
use crate::process::supervise::{Supervisor, Task};

/// The source of the snapshots that the publisher publishes.
#[derive(Debug)]
pub(crate) enum MeshFeed {
    /// A file or a folder, or an empty mesh.
    File(Box<MeshSource>, MeshHealth),
    /// The snapshots of a control plane; `None` until its first state is complete.
    ControlPlane {
        snapshots: watch::Receiver<Option<Arc<Mesh>>>,
        lookups: Lookups,
        _follower: Task,
    },
}

/// The reason why the source could not be opened.
#[derive(Debug, Error)]
pub(crate) enum MeshFeedError {
    #[error(transparent)]
    File(#[from] ConfigErrors),
    #[error(transparent)]
    ControlPlane(#[from] ControlPlaneError),
}

impl MeshFeed {
    /// Opens the sources in the settings. Returns the first mesh: that of the file, or an empty one
    /// until [`first`](Self::first) returns.
    pub(crate) fn open(
        settings: &Settings,
        watcher: &FileWatcher,
        dialer: impl Dial,
        readiness: &Readiness,
        supervisor: &Supervisor,
    ) -> Result<(Self, Arc<Mesh>), MeshFeedError> {
        let file = settings.mesh_file.as_deref();
        let (source, mesh) = MeshSource::open(file, watcher, run_in_background)?;
        let health = readiness.mesh().clone();
        let Some(xds) = &settings.xds else {
            return Ok((Self::File(Box::new(source), health), mesh));
        };
        health.tolerate(xds.unready_after);
        let client = ControlPlaneClient::new(xds.clone(), dialer)?;
        let file = file.map(|_| mesh);
        let lookups = if xds.on_demand { Lookups::on_demand() } else { Lookups::default() };
        let (follower, snapshots) =
            ControlPlaneFollower::new(settings, xds, source, file, lookups.clone(), health);
        let following = follower.run(client, readiness.clone());
        let _follower = supervisor.essential("control plane", following);
        Ok((Self::ControlPlane { snapshots, lookups, _follower }, Arc::default()))
    }

    /// The lookups on demand of this source.
    pub(crate) fn lookups(&self) -> Lookups {
        match self {
            Self::File(..) => Lookups::default(),
            Self::ControlPlane { lookups, .. } => lookups.clone(),
        }
    }

    /// The first complete state of a control plane; `None` for a file. Has no timeout.
    pub(crate) async fn first(&mut self) -> Option<Arc<Mesh>> {
        match self {
            Self::File(..) => None,
            Self::ControlPlane { snapshots, .. } => {
                let first = snapshots.wait_for(Option::is_some).await;
                // The follower ends only with the process.
                first.ok()?.clone()
            }
        }
    }

    /// Waits for a change. Cancel-safe.
    ///
    /// # Errors
    /// All mistakes in a file.
    pub(crate) async fn changed(&mut self) -> Result<Arc<Mesh>, ConfigErrors> {
        match self {
            Self::File(source, health) => {
                let changed = source.changed().await;
                health.file_read(changed.as_ref().err());
                changed
            }
            Self::ControlPlane { snapshots, .. } => loop {
                if snapshots.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
                if let Some(mesh) = &*snapshots.borrow_and_update() {
                    return Ok(mesh.clone());
                }
            },
        }
    }
}
