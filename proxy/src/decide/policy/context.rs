//! The settings of a pod that policy decisions depend on.

use std::net::IpAddr;

use underpass_config::{
    EgressSettings, KubeletProbes, Lookup, MtlsSettings, Profile, Settings, WorkloadSettings,
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
    /// The lookup of the pod's own workload by its name; `None` without lookups on demand.
    own_lookup: Option<Lookup>,
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
            own_lookup: settings.xds.as_ref().and_then(|xds| xds.lookup_of(&settings.workload)),
            egress: settings.egress.clone(),
            mtls: settings.proxy.mtls.clone(),
            must_be_in_mesh: settings.node.pods.is_some(),
            probes: probes(settings),
        }
    }
}

impl PolicyContext {
    /// Fails if the mesh has the pod's own workload only in another network: the mesh would have no
    /// address of this network, and connections to peers would be plaintext. Also fails if permits
    /// require the pod's own workload, and the mesh has none with its identity.
    pub(crate) fn check_own(&self, snapshot: &Snapshot) -> Result<(), ProxyError> {
        match snapshot.named(&self.own) {
            Some(workload) if *workload.network != *self.own.network => {
                let (workload, network) = (workload.clone(), self.own.network.clone());
                Err(ProxyError::OtherNetwork { workload, network })
            }
            _ if !self.must_be_in_mesh => Ok(()),
            Some(workload) if workload.identity == self.own.spiffe_id => Ok(()),
            _ => Err(ProxyError::PodNotInMesh { pod: self.pod(), id: self.own.spiffe_id.clone() }),
        }
    }

    /// The lookup of the pod's own workload by its name, while the control plane has not sent the
    /// workload. A lookup of the pod's address may not find it: the address may be one that the
    /// control plane does not know, or be in another network.
    pub(crate) fn lookup_of_own(&self, snapshot: &Snapshot) -> Option<Lookup> {
        let lookup = self.own_lookup.as_ref()?;
        let known = snapshot.named(&self.own).map(|workload| &**workload);
        (!snapshot.mesh.has_policies_of(known)).then(|| lookup.clone())
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
