//! The settings of a pod that decisions depend on, beside the mesh.

use underpass_config::{EgressSettings, KubeletProbes, MtlsSettings, WorkloadSettings};
use underpass_interception::Ports;

/// What permits of one pod depend on, beside the mesh.
#[derive(Debug)]
pub(crate) struct PolicyContext {
    pub(crate) ports: Ports,
    /// The pod's own workload.
    pub(crate) own: WorkloadSettings,
    pub(crate) egress: EgressSettings,
    pub(crate) mtls: MtlsSettings,
    /// Which connections from the kubelet's probe address `mtls: strict` lets in.
    pub(crate) probes: KubeletProbes,
}
