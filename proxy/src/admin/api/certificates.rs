//! `/certificates`: the certificates of the served pods, without keys.

use std::collections::BTreeMap;
use std::time::SystemTime;

use serde::Serialize;
use underpass_hbone::{CertificateDescription, Identity};

use crate::admin::api::time::{rfc3339, seconds_until};
use crate::admin::state::Admin;

/// The certificate of one identity.
#[derive(Debug, Serialize)]
pub(crate) struct WorkloadCertificate {
    /// The SPIFFE ID.
    identity: String,
    state: CertificateState,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires: Option<String>,
    /// The time until the certificate expires; negative afterwards.
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_in_seconds: Option<i64>,
    /// The pods that use it: `NAMESPACE/NAME`.
    pods: Vec<String>,
    /// The leaf, then intermediates.
    chain: Vec<Certificate>,
    roots: Vec<Root>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum CertificateState {
    /// The first certificate is not issued yet.
    Awaited,
    Valid,
    Expired,
}

#[derive(Debug, Serialize)]
struct Certificate {
    serial_number: String,
    not_before: String,
    not_after: String,
    pem: String,
}

#[derive(Debug, Serialize)]
struct Root {
    trust_domain: String,
    #[serde(flatten)]
    certificate: Certificate,
}

impl From<CertificateDescription> for Certificate {
    fn from(described: CertificateDescription) -> Self {
        let CertificateDescription { pem, serial_number, not_before, not_after } = described;
        let (not_before, not_after) = (rfc3339(not_before), rfc3339(not_after));
        Self { serial_number, not_before, not_after, pem }
    }
}

/// The identities of the served pods, each with its pods. The value is `None` until the first
/// certificate is issued.
pub(super) fn identities(admin: &Admin) -> BTreeMap<String, (Option<Identity>, Vec<String>)> {
    let mut identities: BTreeMap<String, (Option<Identity>, Vec<String>)> = BTreeMap::new();
    for pod in admin.node.pods.all() {
        let Some(lease) = &pod.credentials else { continue };
        let issued = lease.issued().map(|credentials| credentials.borrow().identity().clone());
        let (identity, pods) = identities.entry(lease.identity().to_string()).or_default();
        *identity = issued;
        pods.push(pod.name.to_string());
    }
    identities
}

/// The certificates of all served pods.
pub(crate) fn certificates(admin: &Admin) -> Vec<WorkloadCertificate> {
    let now = SystemTime::now();
    let describe = |(identity, (issued, mut pods)): (String, (Option<Identity>, Vec<String>))| {
        pods.sort_unstable();
        let expires = issued.as_ref().map(Identity::expires);
        let state = match expires {
            None => CertificateState::Awaited,
            Some(expires) if expires <= now => CertificateState::Expired,
            Some(_) => CertificateState::Valid,
        };
        let (chain, roots) = issued
            .map(|identity| (identity.describe_chain(), identity.describe_roots()))
            .unwrap_or_default();
        let root = |(domain, root): (_, CertificateDescription)| Root {
            trust_domain: ToString::to_string(&domain),
            certificate: root.into(),
        };
        WorkloadCertificate {
            identity,
            state,
            expires: expires.map(rfc3339),
            expires_in_seconds: expires.map(|expires| seconds_until(now, expires)),
            pods,
            chain: chain.into_iter().map(Certificate::from).collect(),
            roots: roots.into_iter().map(root).collect(),
        }
    };
    identities(admin).into_iter().map(describe).collect()
}
