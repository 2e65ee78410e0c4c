//! One generation of the mesh, with the workloads of the pods. A change of the mesh replaces the
//! entire snapshot.

use std::net::IpAddr;
use std::sync::{Arc, OnceLock};

use underpass_config::{Mesh, Workload, WorkloadSettings};

/// One generation of the mesh.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) mesh: Arc<Mesh>,
    /// The first generation is 1.
    pub(crate) generation: u64,
    network: String,
    /// The namespace, name and workload of the pod that the settings configure.
    own: (String, String, Option<Arc<Workload>>),
    /// All workloads by namespace and name. Computed on the first lookup of another pod, so never
    /// in a process with one pod.
    by_name: OnceLock<Box<[Arc<Workload>]>>,
}

impl Snapshot {
    pub(crate) fn new(mesh: Arc<Mesh>, own: &WorkloadSettings, generation: u64) -> Self {
        let workload = best(mesh.workloads().iter().filter(|w| named(w) == key(own)), own).cloned();
        let network = own.network.clone();
        let own = (own.namespace.clone(), own.name.clone(), workload);
        Self { mesh, generation, network, own, by_name: OnceLock::new() }
    }

    /// The workload at an address of our network: a peer of the pod.
    pub(crate) fn workload(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.mesh.workload(&self.network, address)
    }

    /// The workload with the namespace and the name of a pod.
    pub(crate) fn named(&self, pod: &WorkloadSettings) -> Option<&Arc<Workload>> {
        let (namespace, name, workload) = &self.own;
        if *namespace == pod.namespace && *name == pod.name {
            return workload.as_ref();
        }
        let all = self.by_name.get_or_init(|| {
            let mut all = self.mesh.workloads().to_vec();
            all.sort_by(|a, b| named(a).cmp(&named(b)));
            all.into()
        });
        let first = all.partition_point(|workload| named(workload) < key(pod));
        let from_first = all.get(first..).unwrap_or_default().iter();
        best(from_first.take_while(|workload| named(workload) == key(pod)), pod)
    }

    /// The workload of a pod, by namespace and name. If the mesh has none, the workload at
    /// `address`, which must be the pod's own.
    pub(crate) fn local(&self, pod: &WorkloadSettings, address: IpAddr) -> Option<&Arc<Workload>> {
        self.named(pod).or_else(|| self.workload(address))
    }
}

/// The numbers of workloads, services and policies of a mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct MeshSize {
    pub(crate) workloads: usize,
    pub(crate) services: usize,
    pub(crate) policies: usize,
}

impl MeshSize {
    pub(crate) fn new(mesh: &Mesh) -> Self {
        Self {
            workloads: mesh.workloads().len(),
            services: mesh.services().len(),
            policies: mesh.policy_count(),
        }
    }

    pub(crate) fn log(self, event: &str) {
        let Self { workloads, services, policies } = self;
        tracing::info!(workloads, services, policies, "{event}");
    }
}

fn named(workload: &Workload) -> (&str, &str) {
    (&workload.namespace, &workload.name)
}

fn key(pod: &WorkloadSettings) -> (&str, &str) {
    (&pod.namespace, &pod.name)
}

/// The workload in the pod's network, among those with its name.
fn best<'a>(
    several: impl Iterator<Item = &'a Arc<Workload>>,
    pod: &WorkloadSettings,
) -> Option<&'a Arc<Workload>> {
    several.min_by_key(|workload| *workload.network != *pod.network)
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
    fn workload_is_found_by_address_if_pod_name_is_unknown() {
        let snapshot = snapshot();
        let found = workload_at(&snapshot, "other", "10.0.0.2");
        assert_eq!(found.as_deref(), Some("sidecar 10.0.0.2"));
        assert_eq!(workload_at(&snapshot, "other", "192.0.2.1"), None);
    }
}
