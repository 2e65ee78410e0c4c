//! Log lines about the mesh.

use underpass_config::{ConfigErrors, Hint as _, MeshSize};

use crate::observe::metrics::mesh;

/// Counts and logs a mesh file that cannot be used.
pub(super) fn log_refused(errors: &ConfigErrors) {
    mesh::refused();
    let hint = errors.hint();
    tracing::error!(
        hint = hint.as_deref(),
        "cannot read the mesh, the last valid one stays in effect: {errors}"
    );
}

/// Logs the numbers of items after an event.
pub(super) fn log_size(size: MeshSize, event: &str) {
    let MeshSize { workloads, services, policies } = size;
    tracing::info!(workloads, services, policies, "{event}");
}
