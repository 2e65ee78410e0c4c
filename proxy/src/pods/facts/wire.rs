//! The facts about a pod as JSON: for a process that takes over, and for the one after a restart.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use underpass_config::{DnsPolicy, InterceptionOverlay, PodDns};

use super::PodFacts;

/// Facts that are written, or that were read and not checked yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WireFacts {
    uid: String,
    name: String,
    namespace: String,
    service_account: String,
    ips: Vec<IpAddr>,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    namespace_mode: Option<String>,
    probe_ports: Option<BTreeSet<u16>>,
    /// A YAML document on one line.
    interception: Option<String>,
    /// `None` for the default.
    dns: Option<WireDns>,
}

/// Resolver settings that are written, or that were read and not checked yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WireDns {
    policy: String,
    nameservers: Vec<IpAddr>,
    search: Vec<String>,
    options: Vec<String>,
}

/// Facts of which one is invalid.
#[derive(Debug, Error)]
#[error("the facts have no valid `{0}`")]
pub(crate) struct InvalidFact(&'static str);

impl From<&PodFacts> for WireFacts {
    fn from(facts: &PodFacts) -> Self {
        let facts = facts.clone();
        Self {
            uid: facts.uid.to_string(),
            name: facts.name,
            namespace: facts.namespace,
            service_account: facts.service_account,
            ips: facts.ips,
            labels: facts.labels,
            annotations: facts.annotations,
            namespace_mode: facts.namespace_mode,
            probe_ports: facts.probe_ports,
            interception: facts.interception.map(|overlay| overlay.to_string()),
            dns: (facts.dns != PodDns::default()).then(|| facts.dns.into()),
        }
    }
}

impl TryFrom<WireFacts> for PodFacts {
    type Error = InvalidFact;

    fn try_from(wire: WireFacts) -> Result<Self, InvalidFact> {
        let overlay = |text: String| InterceptionOverlay::parse("interception", &text);
        let interception = wire.interception.map(overlay).transpose();
        Ok(Self {
            uid: wire.uid.parse().map_err(|_| InvalidFact("uid"))?,
            name: wire.name,
            namespace: wire.namespace,
            service_account: wire.service_account,
            ips: wire.ips,
            labels: wire.labels,
            annotations: wire.annotations,
            namespace_mode: wire.namespace_mode,
            probe_ports: wire.probe_ports,
            interception: interception.map_err(|_| InvalidFact("interception"))?,
            dns: wire.dns.map(PodDns::try_from).transpose()?.unwrap_or_default(),
        })
    }
}

impl From<PodDns> for WireDns {
    fn from(PodDns { policy, nameservers, search, options }: PodDns) -> Self {
        Self { policy: policy.as_str().to_owned(), nameservers, search, options }
    }
}

impl TryFrom<WireDns> for PodDns {
    type Error = InvalidFact;

    fn try_from(wire: WireDns) -> Result<Self, InvalidFact> {
        let WireDns { policy, nameservers, search, options } = wire;
        let policy = DnsPolicy::of_name(&policy).ok_or(InvalidFact("dns"))?;
        Ok(Self { policy, nameservers, search, options })
    }
}
