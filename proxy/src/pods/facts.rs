//! The facts about one pod that its source reports.

pub(crate) mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use thiserror::Error;
use underpass_config::{ConfigErrors, InterceptionOverlay, PodDns, PodUid, SpiffeError};

/// In bytes, as for a Kubernetes object name.
const MAX_NAME_BYTES: usize = 253;

/// A pod according to its source. [`PodFacts::check`] rejects invalid facts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodFacts {
    pub(crate) uid: PodUid,
    pub(crate) name: String,
    pub(crate) namespace: String,
    pub(crate) service_account: String,
    /// The pod's addresses; empty if the source does not know them.
    pub(crate) ips: Vec<IpAddr>,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) annotations: BTreeMap<String, String>,
    /// The value of the label `istio.io/dataplane-mode` of the pod's namespace.
    pub(crate) namespace_mode: Option<String>,
    /// The ports to which the kubelet connects; `None` if the source does not know them.
    pub(crate) probe_ports: Option<BTreeSet<u16>>,
    /// The pod's own interception settings, which only a file of the pod directory has.
    pub(crate) interception: Option<InterceptionOverlay>,
    /// The pod's resolver settings.
    pub(crate) dns: PodDns,
}

/// The reason why facts are invalid. Missing facts are never guessed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum FactsError {
    #[error("the pod's {what} is missing")]
    Missing { what: &'static str },
    #[error(
        "the pod's {what} {value:?} must be 1 to 253 characters of a-z, A-Z, 0-9, '.', '-' and '_'"
    )]
    Name { what: &'static str, value: String },
    #[error(
        "namespace {namespace:?} and service account {service_account:?} do not form a SPIFFE identity"
    )]
    Identity {
        namespace: String,
        service_account: String,
        #[source]
        source: SpiffeError,
    },
    #[error("{0} cannot be the address of a pod")]
    Address(IpAddr),
    #[error("the pod's {kind} {key}: {value:?}: {expected}")]
    Metadata {
        /// `label` or `annotation`.
        kind: &'static str,
        key: &'static str,
        value: String,
        expected: &'static str,
    },
    #[error("the pod's interception settings: {0}")]
    Interception(ConfigErrors),
}

impl PodFacts {
    /// `NAMESPACE/NAME`, for the log.
    pub(crate) fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Rejects missing and invalid facts.
    pub(crate) fn check(&self) -> Result<(), FactsError> {
        for (what, value) in [
            ("name", &self.name),
            ("namespace", &self.namespace),
            ("service account", &self.service_account),
        ] {
            check_name(what, value)?;
        }
        self.ips.iter().try_for_each(|ip| check_address(*ip))
    }
}

fn check_name(what: &'static str, value: &str) -> Result<(), FactsError> {
    if value.is_empty() {
        return Err(FactsError::Missing { what });
    }
    let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'-' | b'_');
    if value.len() > MAX_NAME_BYTES || !value.bytes().all(allowed) {
        return Err(FactsError::Name { what, value: value.to_owned() });
    }
    Ok(())
}

/// Rejects an address that cannot tell the pod's namespace from others, such as loopback.
fn check_address(ip: IpAddr) -> Result<(), FactsError> {
    let ip = ip.to_canonical();
    if ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() {
        return Err(FactsError::Address(ip));
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A pod of the namespace `shop` with the address 10.0.0.1.
    pub(crate) fn facts() -> PodFacts {
        PodFacts {
            uid: "pod-a".parse().unwrap(),
            name: "web-1".to_owned(),
            namespace: "shop".to_owned(),
            service_account: "web".to_owned(),
            ips: vec!["10.0.0.1".parse().unwrap()],
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            namespace_mode: None,
            probe_ports: None,
            interception: None,
            dns: PodDns::default(),
        }
    }

    #[test]
    fn accepts_valid_facts() {
        facts().check().unwrap();
        PodFacts { ips: Vec::new(), ..facts() }.check().unwrap();
    }

    #[test]
    fn rejects_missing_facts() {
        for pod in [
            PodFacts { name: String::new(), ..facts() },
            PodFacts { namespace: String::new(), ..facts() },
            PodFacts { service_account: String::new(), ..facts() },
        ] {
            assert!(matches!(pod.check(), Err(FactsError::Missing { .. })), "{pod:?}");
        }
    }

    #[test]
    fn rejects_hostile_names() {
        let too_long = "a".repeat(254);
        for name in ["a/b", "a\nb", "a b", "\u{e4}", &too_long] {
            let pod = PodFacts { service_account: name.to_owned(), ..facts() };
            assert!(matches!(pod.check(), Err(FactsError::Name { .. })), "{name:?}");
        }
    }

    #[test]
    fn rejects_addresses_that_no_pod_has() {
        for ip in ["0.0.0.0", "127.0.0.1", "::ffff:127.0.0.1", "224.0.0.1", "::", "::1", "ff02::1"]
        {
            let pod = PodFacts { ips: vec![ip.parse().unwrap()], ..facts() };
            assert!(matches!(pod.check(), Err(FactsError::Address(_))), "{ip}");
        }
    }
}
