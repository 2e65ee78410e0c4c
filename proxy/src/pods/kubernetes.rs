//! Kubernetes' facts about the pods of this node and their namespaces (`node.kubernetes`).
//!
//! ```text
//! API server ─ list, watch ─▶ watch ─▶ reflector (the protocol without I/O) ─▶ view ─▶ cni/facts
//! ```
//!
//! The last facts stay while there is no connection. The daemon only reads, and only the pods of
//! this node. In reading order: `objects`, `view`, `reflector`, `api` (requests), `watch`.

pub(crate) mod api;
pub(crate) mod objects;
mod reflector;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod view;
pub(crate) mod watch;

use underpass_config::{ClusterAccess, ConfigErrors, KubernetesWatch, PodSourceSettings, Settings};

/// The API server that has the facts about pods; `None` if the mesh has them.
///
/// # Errors
///
/// All mistakes in `node.kubeconfig`.
pub(crate) fn cluster(settings: &Settings) -> Result<Option<ClusterAccess>, ConfigErrors> {
    match (settings.node.kubernetes, &settings.node.kubeconfig) {
        (KubernetesWatch::Off, _) => Ok(None),
        (KubernetesWatch::Auto, Some(file)) => ClusterAccess::of_kubeconfig(file).map(Some),
        (KubernetesWatch::Auto, None) => Ok(ClusterAccess::of_service_account()),
    }
}

/// Whether the mesh has the facts about pods, so that the process that enrols them must have it.
pub(crate) fn facts_are_in_mesh(settings: &Settings) -> bool {
    let is_cni = matches!(settings.node.pods, Some(PodSourceSettings::Cni(_)));
    is_cni && cluster(settings).is_ok_and(|cluster| cluster.is_none())
}
