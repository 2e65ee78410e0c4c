//! The facts about a pod: those from the plugin, and the service account from the mesh.
//!
//! The plugin knows neither service account nor labels nor annotations. The service account is that
//! of the workload with the pod's namespace and name; labels and annotations stay empty.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use thiserror::Error;
use tokio::sync::watch;
use underpass_config::{Hint, Settings, WorkloadSettings};

use super::attachment::{AttachedPod, PodReference};
use crate::decide::snapshot::Snapshot;
use crate::pods::facts::PodFacts;

/// Finds the facts about pods in the mesh.
#[derive(Debug)]
pub(super) struct FactFinder {
    mesh: watch::Receiver<Arc<Snapshot>>,
    /// The node's own workload, with its trust domain and network.
    own: WorkloadSettings,
    exempt_namespaces: Vec<String>,
}

/// A fact about a pod that is missing, or that contradicts the mesh.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(super) enum FactProblem {
    #[error("the mesh has no workload {namespace}/{name}, so the pod's service account is unknown")]
    NoWorkload { namespace: String, name: String },
    #[error(
        "the mesh has the workload {namespace}/{name} at {}, but the pod has {}",
        listed(workload),
        listed(pod)
    )]
    Addresses { namespace: String, name: String, workload: Vec<IpAddr>, pod: Vec<IpAddr> },
    #[error("the pod has the address {address}, which belongs to {namespace}/{name} in the mesh")]
    AddressOfAnother { address: IpAddr, namespace: String, name: String },
}

impl Hint for FactProblem {
    fn hint(&self) -> Option<Cow<'static, str>> {
        let hint = match self {
            Self::NoWorkload { .. } => {
                "add the workload with its serviceAccount to the mesh (mesh.file); the runtime tries again"
            }
            Self::Addresses { .. } | Self::AddressOfAnother { .. } => {
                "correct workloadIps in the mesh (mesh.file); the runtime tries again"
            }
        };
        Some(hint.into())
    }
}

impl FactFinder {
    pub(super) fn new(settings: &Settings, mesh: watch::Receiver<Arc<Snapshot>>) -> Self {
        let exempt_namespaces = settings.node.exempt_namespaces.clone();
        Self { mesh, own: settings.workload.clone(), exempt_namespaces }
    }

    /// Whether the pod's Kubernetes namespace is exempt from enrolment.
    pub(super) fn is_exempt(&self, pod: &PodReference) -> bool {
        self.exempt_namespaces.contains(&pod.namespace)
    }

    pub(super) fn find(&self, attached: &AttachedPod) -> Result<PodFacts, FactProblem> {
        let (snapshot, pod) = (self.mesh.borrow().clone(), &attached.pod);
        let (namespace, name) = (pod.namespace.clone(), pod.name.clone());
        for &address in &attached.addresses {
            if let Some(other) = snapshot.workload(address)
                && (&*other.namespace, &*other.name) != (&*namespace, &*name)
            {
                let (namespace, name) = (other.namespace.to_string(), other.name.to_string());
                return Err(FactProblem::AddressOfAnother { address, namespace, name });
            }
        }
        let own = self.own.clone();
        let named = WorkloadSettings { namespace: namespace.clone(), name: name.clone(), ..own };
        let Some(workload) = snapshot.named(&named) else {
            return Err(FactProblem::NoWorkload { namespace, name });
        };
        let is_pods = |address: &IpAddr| attached.addresses.contains(address);
        if !workload.addresses.is_empty() && !workload.addresses.iter().any(is_pods) {
            let (workload, pod) = (workload.addresses.to_vec(), attached.addresses.clone());
            return Err(FactProblem::Addresses { namespace, name, workload, pod });
        }
        Ok(PodFacts {
            uid: pod.uid.clone(),
            name,
            namespace,
            service_account: workload.service_account.to_string(),
            ips: attached.addresses.clone(),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            interception: None,
        })
    }

    /// The mesh. A change of it may add missing facts.
    pub(super) fn mesh(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.mesh.clone()
    }
}

fn listed(addresses: &[IpAddr]) -> String {
    let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
    addresses.join(", ")
}

#[cfg(test)]
mod tests {
    use tokio::sync::watch;
    use underpass_config::Mesh;

    use super::*;
    use crate::node::testing::settings;
    use crate::pods::cni::testing::attached;

    const MESH: &str = "workloads:
- {name: web, namespace: shop, serviceAccount: web-account, workloadIps: [10.0.0.1]}
- {name: db, namespace: shop, serviceAccount: db-account, workloadIps: [10.0.0.2]}
- {name: anywhere, namespace: shop, serviceAccount: any, hostname: any.example}
";

    fn finder() -> FactFinder {
        let settings = settings(&["node.exempt_namespaces=core"]);
        let mesh = Mesh::from_text("mesh", MESH).unwrap();
        let snapshot = Snapshot::new(Arc::new(mesh), &settings.workload, 1);
        FactFinder::new(&settings, watch::Sender::new(Arc::new(snapshot)).subscribe())
    }

    #[test]
    fn service_account_comes_from_the_mesh() {
        let facts = finder().find(&attached("web", &["10.0.0.1", "fd00::1"])).unwrap();
        assert_eq!((&*facts.service_account, facts.ips.len()), ("web-account", 2));
        let facts = finder().find(&attached("anywhere", &["10.0.0.9"])).unwrap();
        assert_eq!(facts.service_account, "any");
    }

    #[test]
    fn missing_and_contradictory_facts_are_errors_with_hints() {
        for (name, address, problem) in [
            (
                "other",
                "10.0.0.9",
                "the mesh has no workload shop/other, so the pod's service account is unknown",
            ),
            (
                "web",
                "10.0.0.9",
                "the mesh has the workload shop/web at 10.0.0.1, but the pod has 10.0.0.9",
            ),
            (
                "web",
                "10.0.0.2",
                "the pod has the address 10.0.0.2, which belongs to shop/db in the mesh",
            ),
        ] {
            let found = finder().find(&attached(name, &[address])).unwrap_err();
            assert_eq!(found.to_string(), problem);
            assert!(found.hint().unwrap().contains("mesh.file"));
        }
    }

    #[test]
    fn exempt_namespaces_are_recognized() {
        let mut pod = attached("web", &[]).pod;
        assert!(!finder().is_exempt(&pod));
        pod.namespace = "core".to_owned();
        assert!(finder().is_exempt(&pod));
    }
}
