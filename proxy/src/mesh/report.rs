//! Log lines about the mesh.

use underpass_config::{ConfigErrors, MeshSize};

use crate::observe::mesh_health::hint_of_file;
use crate::observe::metrics::mesh;

/// Counts and logs a mesh file that cannot be used.
pub(super) fn log_refused(errors: &ConfigErrors) {
    mesh::refused();
    tracing::error!(
        hint = &*hint_of_file(errors),
        "cannot read the mesh, the last valid one stays in effect: {errors}"
    );
}

/// Logs the numbers of items after an event.
pub(super) fn log_size(size: MeshSize, event: &str) {
    let MeshSize { workloads, services, policies } = size;
    tracing::info!(workloads, services, policies, "{event}");
}
