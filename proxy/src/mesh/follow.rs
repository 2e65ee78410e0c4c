//! Follows the mesh in a process that serves no connection: a broker looks up facts about pods.

use std::sync::Arc;

use tokio::sync::watch;
use underpass_config::{Mesh, MeshSource, WorkloadSettings, retire_mesh};
use underpass_hbone::log_panic;
use underpass_interception::run_in_background;

use crate::decide::snapshot::Snapshot;

/// The current mesh, and the future that follows it for ever. The proxy process reports mistakes in
/// the mesh.
pub(crate) fn follow(
    mut source: MeshSource,
    first: Arc<Mesh>,
    own: &WorkloadSettings,
) -> (watch::Receiver<Arc<Snapshot>>, impl Future<Output = ()> + Send + use<>) {
    let own = own.clone();
    let current = watch::Sender::new(Arc::new(Snapshot::new(first, &own, 1)));
    let mesh = current.subscribe();
    let following = async move {
        loop {
            let Ok(mesh) = source.changed().await else { continue };
            let generation = current.borrow().generation + 1;
            let new = Arc::new(Snapshot::new(mesh, &own, generation));
            let old = current.send_replace(new).mesh.clone();
            let released = retire_mesh(old, run_in_background);
            tokio::spawn(log_panic("release of an old mesh", released));
        }
    };
    (mesh, following)
}
