//! Log lines about the mesh.

use std::borrow::Cow;

use underpass_config::{ConfigErrors, Hint as _, MeshSize};

use crate::observe::metrics::mesh;

/// Counts and logs a mesh file that cannot be used.
pub(super) fn log_refused(errors: &ConfigErrors) {
    mesh::refused();
    tracing::error!(
        hint = &*hint(errors),
        "cannot read the mesh, the last valid one stays in effect: {errors}"
    );
}

/// The hint for a mesh file that cannot be used.
pub(super) fn hint(errors: &ConfigErrors) -> Cow<'static, str> {
    let general = "correct the mesh file: `underpass config check` lists all mistakes";
    errors.hint().unwrap_or(Cow::Borrowed(general))
}

/// Logs the numbers of items after an event.
pub(super) fn log_size(size: MeshSize, event: &str) {
    let MeshSize { workloads, services, policies } = size;
    tracing::info!(workloads, services, policies, "{event}");
}
