//! The settings of one pod: those of its node, with the pod's identity and interception settings.

use underpass_config::{KubeletProbes, NodeProbes, Settings, WorkloadSettings};

use crate::pods::annotations::{self, ExemptReason};
use crate::pods::facts::{FactsError, PodFacts};

/// The decision whether a node enrols a pod, with its settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PodSettings {
    Enrolled(Box<Settings>),
    Exempt(ExemptReason),
}

/// The settings of the pod with these facts on a node with the settings `node`. The pod's identity
/// is its service account in the node's trust domain.
pub(crate) fn pod_settings(node: &Settings, facts: &PodFacts) -> Result<PodSettings, FactsError> {
    facts.check()?;
    if let Some(reason) = annotations::exemption(facts, &node.node)? {
        return Ok(PodSettings::Exempt(reason));
    }
    let from_annotations = annotations::interception(facts, &node.interception)?;
    let overlays: Vec<_> = std::iter::once(&from_annotations).chain(&facts.interception).collect();
    let settings = node.with_interception(&overlays).map_err(FactsError::Interception)?;
    let (mut settings, workload) = (settings, workload(&node.workload, facts)?);
    narrow_probes(&mut settings, facts);
    settings.dns.pod = facts.dns.clone();
    Ok(PodSettings::Enrolled(Box::new(Settings { workload, ..settings })))
}

/// Exempts only the ports of the pod's probes, if they are known. `exact` rules exempt all ports.
fn narrow_probes(settings: &mut Settings, facts: &PodFacts) {
    let interception = &mut settings.interception;
    let is_translated = settings.node.probes == NodeProbes::Translate && !interception.exact;
    if let (Some(ports), KubeletProbes::On) = (&facts.probe_ports, &interception.kubelet_probes)
        && is_translated
    {
        interception.kubelet_probes = match ports.is_empty() {
            true => KubeletProbes::Off,
            false => KubeletProbes::Ports(ports.iter().map(|port| (*port).into()).collect()),
        };
    }
}

fn workload(node: &WorkloadSettings, facts: &PodFacts) -> Result<WorkloadSettings, FactsError> {
    let PodFacts { name, namespace, service_account, .. } = facts;
    node.of_pod(name, namespace, service_account).map_err(|source| FactsError::Identity {
        namespace: namespace.clone(),
        service_account: service_account.clone(),
        source,
    })
}

#[cfg(test)]
mod tests;
