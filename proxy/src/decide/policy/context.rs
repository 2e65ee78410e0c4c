//! The settings of a pod that policy decisions depend on.

use std::net::IpAddr;

use underpass_config::{
    EgressSettings, KubeletProbes, MtlsSettings, Profile, Settings, WorkloadSettings,
};
use underpass_interception::Ports;

use crate::decide::snapshot::Snapshot;
use crate::error::ProxyError;

/// The settings of one pod that its permits depend on.
#[derive(Debug)]
pub(crate) struct PolicyContext {
    pub(crate) ports: Ports,
    /// The pod's own workload.
    pub(crate) own: WorkloadSettings,
    pub(crate) egress: EgressSettings,
    pub(crate) mtls: MtlsSettings,
    /// Whether permits require the pod's own workload in the mesh. On a node a pod may start before
    /// the mesh has its workload.
    pub(crate) must_be_in_mesh: bool,
    /// The ports at which `mtls: strict` accepts connections from the kubelet's probe address.
    pub(crate) probes: KubeletProbes,
}

impl PolicyContext {
    /// The context of a pod with these settings.
    pub(crate) fn new(settings: &Settings) -> Self {
        Self {
            ports: Ports::of(settings),
            own: settings.workload.clone(),
            egress: settings.egress.clone(),
            mtls: settings.proxy.mtls.clone(),
            must_be_in_mesh: settings.node.pods.is_some(),
            probes: probes(settings),
        }
    }
}

impl PolicyContext {
    /// Fails if permits require the pod's own workload, and the mesh has none with its identity.
    pub(crate) fn check_own(&self, snapshot: &Snapshot) -> Result<(), ProxyError> {
        if !self.must_be_in_mesh {
            return Ok(());
        }
        match snapshot.named(&self.own) {
            Some(workload) if workload.identity == self.own.spiffe_id => Ok(()),
            _ => Err(ProxyError::PodNotInMesh { pod: self.pod(), id: self.own.spiffe_id.clone() }),
        }
    }

    /// Fails if the mesh may lack policies for inbound connections to `address` of the pod, because
    /// its control plane has not sent the pod's workload.
    pub(crate) fn check_inbound(
        &self,
        snapshot: &Snapshot,
        address: IpAddr,
    ) -> Result<(), ProxyError> {
        self.check_own(snapshot)?;
        let local = snapshot.local(&self.own, address).map(|workload| &**workload);
        let known = snapshot.mesh.has_policies_of(local);
        if known { Ok(()) } else { Err(ProxyError::WorkloadNotSent { pod: self.pod() }) }
    }

    /// The pod in errors.
    fn pod(&self) -> String {
        format!("{}/{}", self.own.namespace, self.own.name)
    }
}

/// Only the ambient profile identifies the kubelet by its source address.
fn probes(settings: &Settings) -> KubeletProbes {
    match settings.interception.profile {
        Profile::Ambient => settings.interception.kubelet_probes.clone(),
        Profile::Sidecar | Profile::Osm | Profile::None => KubeletProbes::Off,
    }
}
