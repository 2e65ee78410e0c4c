//! One generation of the mesh, with the workloads of the pods. A change of the mesh replaces the
//! entire snapshot.

use std::net::IpAddr;
use std::sync::Arc;

use underpass_config::{Mesh, Workload, WorkloadSettings};

/// One generation of the mesh.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) mesh: Arc<Mesh>,
    /// The first generation is 1.
    pub(crate) generation: u64,
    network: String,
}

impl Snapshot {
    pub(crate) fn new(mesh: Arc<Mesh>, own: &WorkloadSettings, generation: u64) -> Self {
        Self { mesh, generation, network: own.network.clone() }
    }

    /// The workload at an address of our network: a peer of the pod.
    pub(crate) fn workload(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.mesh.workload(&self.network, address)
    }

    /// The workload with the namespace and the name of a pod, preferably in the pod's network.
    pub(crate) fn named(&self, pod: &WorkloadSettings) -> Option<&Arc<Workload>> {
        let same_name = self.mesh.workloads_named(&pod.namespace, &pod.name).iter();
        same_name.min_by_key(|workload| *workload.network != *pod.network)
    }

    /// An address that the mesh gives to another workload than `pod`, and that workload. `None` if
    /// one of the addresses is that of `pod`. Unknown addresses are ignored: a pod with a new
    /// sandbox, for example after a reboot, has a new address, which the mesh gets later.
    pub(crate) fn other_workload(
        &self,
        pod: &WorkloadSettings,
        addresses: &[IpAddr],
    ) -> Option<(IpAddr, String)> {
        let is_own = |workload: &Workload| {
            (&*workload.namespace, &*workload.name) == (&*pod.namespace, &*pod.name)
        };
        let known =
            || addresses.iter().filter_map(|address| Some((*address, self.workload(*address)?)));
        if known().any(|(_, workload)| is_own(workload)) {
            return None;
        }
        let (address, other) = known().next()?;
        Some((address, format!("{}/{}", other.namespace, other.name)))
    }

    /// The workload of a pod, by namespace and name. If the mesh has none, the workload at
    /// `address`, which must be the pod's own.
    pub(crate) fn local(&self, pod: &WorkloadSettings, address: IpAddr) -> Option<&Arc<Workload>> {
        self.named(pod).or_else(|| self.workload(address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::testing::settings;

    const MESH: &str = "workloads:
- {name: server, uid: far, network: far, workloadIps: [10.0.0.3]}
- {name: server, workloadIps: [10.0.0.1]}
- {name: sidecar, workloadIps: [10.0.0.2]}
- {name: sidecar, uid: distant, network: far, workloadIps: [10.0.0.4]}
- {name: sidecar, uid: foreign, namespace: other, workloadIps: [10.0.0.5]}
";

    fn workload_at(snapshot: &Snapshot, name: &str, address: &str) -> Option<String> {
        let pod = settings(&[&format!("workload.name={name}")]).workload;
        let workload = snapshot.local(&pod, address.parse().unwrap())?;
        Some(format!("{} {}", workload.name, workload.addresses[0]))
    }

    fn snapshot() -> Snapshot {
        let mesh = Mesh::from_text("mesh", MESH).unwrap();
        Snapshot::new(Arc::new(mesh), &settings(&[]).workload, 1)
    }

    #[test]
    fn workload_is_found_by_pod_name_before_address() {
        let snapshot = snapshot();
        for address in ["10.0.0.1", "10.0.0.2", "192.0.2.1"] {
            let found = workload_at(&snapshot, "server", address);
            assert_eq!(found.as_deref(), Some("server 10.0.0.1"), "{address}");
            // A pod other than the configured one.
            let found = workload_at(&snapshot, "sidecar", address);
            assert_eq!(found.as_deref(), Some("sidecar 10.0.0.2"), "{address}");
        }
    }

    #[test]
    fn address_of_other_workload_is_found_unless_pod_has_own_address_in_mesh() {
        let (snapshot, pod) = (snapshot(), settings(&[]).workload);
        let other = |addresses: &[&str]| {
            let addresses: Vec<_> = addresses.iter().map(|one| one.parse().unwrap()).collect();
            let (address, workload) = snapshot.other_workload(&pod, &addresses)?;
            Some(format!("{address} {workload}"))
        };
        for own_or_unknown in [&[][..], &["192.0.2.1"], &["10.0.0.1"], &["10.0.0.2", "10.0.0.1"]] {
            assert_eq!(other(own_or_unknown), None, "{own_or_unknown:?}");
        }
        assert_eq!(other(&["192.0.2.1", "10.0.0.5"]).as_deref(), Some("10.0.0.5 other/sidecar"));
    }

    #[test]
    fn workload_is_found_by_address_if_pod_name_is_unknown() {
        let snapshot = snapshot();
        let found = workload_at(&snapshot, "other", "10.0.0.2");
        assert_eq!(found.as_deref(), Some("sidecar 10.0.0.2"));
        assert_eq!(workload_at(&snapshot, "other", "192.0.2.1"), None);
    }
}
