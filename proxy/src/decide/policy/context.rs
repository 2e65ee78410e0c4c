//! The settings of a pod on which policy decisions depend.

use underpass_config::{
    EgressSettings, KubeletProbes, MtlsSettings, Profile, Settings, WorkloadSettings,
};
use underpass_interception::Ports;

/// The settings of one pod on which its permits depend.
#[derive(Debug)]
pub(crate) struct PolicyContext {
    pub(crate) ports: Ports,
    /// The pod's own workload.
    pub(crate) own: WorkloadSettings,
    pub(crate) egress: EgressSettings,
    pub(crate) mtls: MtlsSettings,
    /// The ports at which `mtls: strict` accepts connections from the kubelet's probe address.
    pub(crate) probes: KubeletProbes,
}

impl PolicyContext {
    /// The context of a pod with these settings.
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

/// Only the ambient profile identifies the kubelet by its source address.
fn probes(settings: &Settings) -> KubeletProbes {
    match settings.interception.profile {
        Profile::Ambient => settings.interception.kubelet_probes.clone(),
        Profile::Sidecar | Profile::Osm | Profile::None => KubeletProbes::Off,
    }
}
