//! The settings of a pod that decisions depend on, beside the mesh.

use underpass_config::{
    EgressSettings, KubeletProbes, MtlsSettings, Profile, Settings, WorkloadSettings,
};
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

impl PolicyContext {
    /// That of a pod with these settings.
    pub(crate) fn of(settings: &Settings) -> Self {
        Self {
            ports: Ports::of(settings),
            own: settings.workload.clone(),
            egress: settings.egress.clone(),
            mtls: settings.proxy.mtls.clone(),
            probes: probes(settings),
        }
    }
}

/// Only the ambient profile knows the kubelet by its source.
fn probes(settings: &Settings) -> KubeletProbes {
    match settings.interception.profile {
        Profile::Ambient => settings.interception.kubelet_probes.clone(),
        Profile::Sidecar | Profile::Osm | Profile::None => KubeletProbes::Off,
    }
}
