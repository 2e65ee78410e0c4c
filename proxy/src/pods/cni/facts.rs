//! The facts about a pod: those of the plugin, and those of Kubernetes or of the mesh.
//!
//! The plugin knows no service account, labels or annotations. Kubernetes has them for each pod by
//! its uid. Without Kubernetes the mesh has the service account of a workload with the pod's
//! namespace and name, and labels and annotations stay empty.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::watch;
use tokio::time::timeout;
use underpass_config::{Hint, NodeSettings, Settings, WorkloadSettings};

use super::attachment::{AttachedPod, PodReference};
use crate::decide::snapshot::Snapshot;
use crate::pods::annotations::exemption;
use crate::pods::facts::PodFacts;
use crate::pods::kubernetes::objects::ClusterPod;
use crate::pods::kubernetes::view::ClusterView;

/// How long an addition waits for the facts about its pod. The API server sends a new pod to this
/// node's watch at the same time as to the kubelet.
const FACTS_TIMEOUT: Duration = Duration::from_secs(10);

/// Finds the facts about pods, in the mesh or at the API server.
#[derive(Debug)]
pub(super) struct FactFinder {
    origin: FactOrigin,
    /// The node's own workload, with its trust domain and network.
    own: WorkloadSettings,
    /// The settings that select the pods to enrol.
    node: NodeSettings,
}

/// The origin of the facts that the plugin does not know. Clones follow it independently.
#[derive(Debug, Clone)]
pub(crate) enum FactOrigin {
    Mesh(watch::Receiver<Arc<Snapshot>>),
    Kubernetes(watch::Receiver<ClusterView>),
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
    #[error("the API server has not sent the pods and namespaces yet{}", because(problem))]
    NotListed { problem: Option<String> },
    #[error(
        "the API server has no pod {namespace}/{name} with the uid {uid} on this node{}",
        because(problem)
    )]
    NoPod { namespace: String, name: String, uid: String, problem: Option<String> },
    #[error("the API server has no namespace {0}")]
    NoNamespace(String),
    #[error(
        "the pod with the uid {uid} is {found} at the API server, but {expected} for the runtime"
    )]
    OtherName { uid: String, found: String, expected: String },
    #[error(
        "the pod uses the network of the host (hostNetwork), but the runtime made an interface for it"
    )]
    HostNetwork,
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
            Self::NotListed { .. } => {
                "the log of `underpass node` says why the API server does not answer; the runtime tries again"
            }
            Self::NoPod { .. } => {
                "check that node.name is the name of this Node and that the runtime sets K8S_POD_UID; the runtime tries again"
            }
            Self::NoNamespace(_) | Self::OtherName { .. } | Self::HostNetwork => {
                "create the pod again"
            }
        };
        Some(hint.into())
    }
}

impl FactProblem {
    /// Whether the origin of the facts cannot be reached.
    pub(in crate::pods::cni) fn is_outage(&self) -> bool {
        matches!(self, Self::NotListed { problem: Some(_) })
    }

    /// Whether the fact may arrive soon.
    fn is_late(&self) -> bool {
        matches!(self, Self::NotListed { .. } | Self::NoPod { .. } | Self::NoNamespace(_))
    }
}

impl FactOrigin {
    /// Waits for new facts. Never returns if there will be none.
    pub(in crate::pods::cni) async fn changed(&mut self) {
        let changed = match self {
            Self::Mesh(mesh) => mesh.changed().await,
            Self::Kubernetes(view) => view.changed().await,
        };
        if changed.is_err() {
            std::future::pending().await
        }
    }

    /// The view of the cluster, if the facts come from Kubernetes.
    pub(in crate::pods::cni) fn cluster(&self) -> Option<watch::Ref<'_, ClusterView>> {
        match self {
            Self::Mesh(_) => None,
            Self::Kubernetes(view) => Some(view.borrow()),
        }
    }
}

impl FactFinder {
    pub(super) fn new(settings: &Settings, origin: FactOrigin) -> Self {
        Self { origin, own: settings.workload.clone(), node: settings.node.clone() }
    }

    /// The origin of the facts, to follow its changes.
    pub(in crate::pods::cni) fn origin(&self) -> FactOrigin {
        self.origin.clone()
    }

    /// Whether the pods of this namespace are never enrolled.
    pub(super) fn is_exempt(&self, namespace: &str) -> bool {
        self.node.exempt_namespaces.iter().any(|exempt| exempt == namespace)
    }

    /// Whether the pod must be enrolled: no setting, label or annotation exempts it. An invalid
    /// label does not exempt.
    pub(in crate::pods::cni) fn selects(&self, facts: &PodFacts) -> bool {
        !matches!(exemption(facts, &self.node), Ok(Some(_)))
    }

    /// Finds the facts about a pod. Waits if Kubernetes may send them soon.
    pub(super) async fn wait_for(&self, attached: &AttachedPod) -> Result<PodFacts, FactProblem> {
        let mut origin = self.origin.clone();
        let found = async {
            loop {
                match self.find(attached) {
                    Err(problem) if problem.is_late() => origin.changed().await,
                    outcome => return outcome,
                }
            }
        };
        timeout(FACTS_TIMEOUT, found).await.unwrap_or_else(|_| self.find(attached))
    }

    /// The facts about a pod.
    pub(in crate::pods::cni) fn find(
        &self,
        attached: &AttachedPod,
    ) -> Result<PodFacts, FactProblem> {
        match &self.origin {
            FactOrigin::Mesh(mesh) => {
                let mesh = mesh.borrow().clone();
                self.in_mesh(&mesh, attached)
            }
            FactOrigin::Kubernetes(view) => in_cluster(&view.borrow(), attached),
        }
    }

    fn in_mesh(&self, mesh: &Snapshot, attached: &AttachedPod) -> Result<PodFacts, FactProblem> {
        let PodReference { namespace, name, uid } = attached.pod.clone();
        for &address in &attached.addresses {
            if let Some(other) = mesh.workload(address)
                && (&*other.namespace, &*other.name) != (&*namespace, &*name)
            {
                let (namespace, name) = (other.namespace.to_string(), other.name.to_string());
                return Err(FactProblem::AddressOfAnother { address, namespace, name });
            }
        }
        let own = self.own.clone();
        let named = WorkloadSettings { namespace: namespace.clone(), name: name.clone(), ..own };
        let Some(workload) = mesh.named(&named) else {
            return Err(FactProblem::NoWorkload { namespace, name });
        };
        let is_pods = |address: &IpAddr| attached.addresses.contains(address);
        if !workload.addresses.is_empty() && !workload.addresses.iter().any(is_pods) {
            let (workload, pod) = (workload.addresses.to_vec(), attached.addresses.clone());
            return Err(FactProblem::Addresses { namespace, name, workload, pod });
        }
        Ok(PodFacts {
            uid,
            name,
            namespace,
            service_account: workload.service_account.to_string(),
            ips: attached.addresses.clone(),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            namespace_mode: None,
            probe_ports: None,
            interception: None,
            dns: attached.dns.clone().unwrap_or_default(),
        })
    }
}

/// The facts from Kubernetes. Addresses are not compared: until the sandbox is up, Kubernetes has
/// those of the previous one, for example before a reboot.
fn in_cluster(view: &ClusterView, attached: &AttachedPod) -> Result<PodFacts, FactProblem> {
    let PodReference { namespace, name, uid } = &attached.pod;
    let problem = || view.problem().map(str::to_owned);
    if !view.is_complete() {
        return Err(FactProblem::NotListed { problem: problem() });
    }
    let Some(pod) = view.pod(uid) else {
        let (namespace, name, uid) = (namespace.clone(), name.clone(), uid.to_string());
        return Err(FactProblem::NoPod { namespace, name, uid, problem: problem() });
    };
    if (&pod.namespace, &pod.name) != (namespace, name) {
        let (found, expected) = (pod.full_name(), format!("{namespace}/{name}"));
        return Err(FactProblem::OtherName { uid: uid.to_string(), found, expected });
    }
    if pod.host_network {
        return Err(FactProblem::HostNetwork);
    }
    facts_of(view, pod, attached.addresses.clone())
}

/// The facts about a pod of the cluster with these addresses.
pub(in crate::pods::cni) fn facts_of(
    view: &ClusterView,
    pod: &ClusterPod,
    ips: Vec<IpAddr>,
) -> Result<PodFacts, FactProblem> {
    let mode = view.mode_of(&pod.namespace);
    let mode = mode.ok_or_else(|| FactProblem::NoNamespace(pod.namespace.clone()))?;
    let ClusterPod { uid, namespace, name, service_account, labels, annotations, .. } = pod.clone();
    Ok(PodFacts {
        uid,
        name,
        namespace,
        service_account,
        ips,
        labels,
        annotations,
        namespace_mode: mode.map(str::to_owned),
        probe_ports: Some(pod.probe_ports.clone()),
        interception: None,
        dns: pod.dns.clone(),
    })
}

fn because(problem: &Option<String>) -> String {
    problem.as_ref().map(|problem| format!(": {problem}")).unwrap_or_default()
}

fn listed(addresses: &[IpAddr]) -> String {
    let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
    addresses.join(", ")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use underpass_config::Mesh;

    use super::*;
    use crate::node::testing::settings;
    use crate::pods::cni::testing::attached;
    use crate::pods::kubernetes::testing::{cluster, namespace, pod};

    const MESH: &str = "workloads:
- {name: web, namespace: shop, serviceAccount: web-account, workloadIps: [10.0.0.1]}
- {name: db, namespace: shop, serviceAccount: db-account, workloadIps: [10.0.0.2]}
- {name: anywhere, namespace: shop, serviceAccount: any, hostname: any.example}
";

    fn finder() -> FactFinder {
        let settings = settings(&["node.exempt_namespaces=core"]);
        let mesh = Mesh::from_text("mesh", MESH).unwrap();
        let snapshot = Snapshot::new(Arc::new(mesh), &settings.workload, 1);
        let mesh = watch::Sender::new(Arc::new(snapshot)).subscribe();
        FactFinder::new(&settings, FactOrigin::Mesh(mesh))
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
        assert!(!finder().is_exempt("shop"));
        assert!(finder().is_exempt("core"));
    }

    #[test]
    fn kubernetes_has_the_facts_of_a_pod_by_its_uid() {
        let (finder, view) = in_kubernetes();
        cluster(&view, &[pod("web")], &[namespace("shop", "none")]);
        // The API server still has the addresses of the previous sandbox.
        let facts = finder.find(&attached("web", &["10.0.0.9"])).unwrap();
        assert_eq!((&*facts.service_account, &*facts.name), ("web-account", "web"));
        assert_eq!(facts.ips, ["10.0.0.9".parse::<IpAddr>().unwrap()]);
        assert_eq!(facts.namespace_mode.as_deref(), Some("none"));
        assert!(facts.annotations.contains_key("traffic.sidecar.istio.io/excludeOutboundPorts"));
        assert_eq!(facts.probe_ports, Some(BTreeSet::new()));
    }

    #[test]
    fn facts_that_kubernetes_lacks_or_contradicts_are_problems() {
        let (finder, view) = in_kubernetes();
        let error = |name: &str| finder.find(&attached(name, &[])).unwrap_err();
        assert!(matches!(error("web"), FactProblem::NotListed { problem: None }));
        let mut host = pod("host");
        host["spec"]["hostNetwork"] = true.into();
        let mut stray = pod("stray");
        stray["metadata"]["namespace"] = "other".into();
        cluster(&view, &[pod("web"), host, stray], &[namespace("other", "ambient")]);
        assert_eq!(error("web"), FactProblem::NoNamespace("shop".to_owned()));
        assert_eq!(error("host"), FactProblem::HostNetwork);
        assert!(matches!(error("gone"), FactProblem::NoPod { .. }));
        assert_eq!(
            error("stray").to_string(),
            "the pod with the uid uid-of-stray is other/stray at the API server, but shop/stray for the runtime"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn addition_waits_for_its_pod_for_a_while() {
        let (finder, view) = in_kubernetes();
        let web = attached("web", &[]);
        let waiting = finder.wait_for(&web);
        tokio::pin!(waiting);
        cluster(&view, &[], &[namespace("shop", "ambient")]);
        timeout(FACTS_TIMEOUT / 2, &mut waiting).await.unwrap_err();
        cluster(&view, &[pod("web")], &[namespace("shop", "ambient")]);
        assert_eq!(waiting.await.unwrap().service_account, "web-account");
        let late = finder.wait_for(&attached("db", &[])).await.unwrap_err();
        assert!(late.hint().unwrap().contains("node.name"), "{late}");
    }

    fn in_kubernetes() -> (FactFinder, watch::Sender<ClusterView>) {
        let view = watch::Sender::default();
        (FactFinder::new(&settings(&[]), FactOrigin::Kubernetes(view.subscribe())), view)
    }
}
