//! The two ends of a connection: their proven properties, kept apart from the claimed ones.
//!
//! A source address proves nothing: a pod can send from the address of another pod. Nor does
//! `baggage`, which the peer writes. Both are logged under separate names (`src.claimed.workload`),
//! and no metric has them as a label.

use std::net::SocketAddr;
use std::sync::Arc;

use http::HeaderMap;
use underpass_config::{Quoted, SpiffeId, Workload};
use underpass_hbone::Baggage;

use crate::decide::snapshot::Snapshot;

/// The direction of a connection, which determines the end that reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Direction {
    Inbound,
    Outbound,
}

impl Direction {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

/// One end of a connection.
#[derive(Debug, Default, Clone)]
pub(crate) struct Party {
    pub(crate) address: Option<SocketAddr>,
    /// The proven workload: the pod in whose namespace the connection was caught, a peer whose
    /// identity is that of the workload at its address, or the workload that the route selected.
    pub(crate) workload: Option<Arc<Workload>>,
    /// The identity that the TLS handshake has proven.
    pub(crate) identity: Option<SpiffeId>,
    /// A claim about a party whose workload is not proven.
    pub(crate) claim: Option<Claim>,
}

/// An unproven claim about the workload of one end.
#[derive(Debug, Clone)]
pub(crate) enum Claim {
    /// The mesh has this workload at its address.
    Address(Arc<Workload>),
    /// The peer's `baggage` header names it.
    Baggage(Box<ClaimedNames>),
}

/// The fields of a peer's `baggage` that are logged.
#[derive(Debug, Clone)]
pub(crate) struct ClaimedNames {
    workload: Option<Quoted>,
    namespace: Quoted,
    cluster: Quoted,
}

impl From<Baggage> for ClaimedNames {
    fn from(baggage: Baggage) -> Self {
        Self {
            workload: baggage.workload.map(|(_, name)| Quoted::new(&*name)),
            namespace: Quoted::new(&*baggage.namespace),
            cluster: Quoted::new(&*baggage.cluster),
        }
    }
}

impl Party {
    pub(crate) fn at_address(address: SocketAddr) -> Self {
        Self { address: Some(address), ..Self::default() }
    }

    /// A plaintext client. Its address is the only indication of its workload.
    pub(crate) fn plaintext_client(address: SocketAddr, snapshot: &Snapshot) -> Self {
        let claim = snapshot.workload(address.ip()).cloned().map(Claim::Address);
        Self { claim, ..Self::at_address(address) }
    }

    /// A client of a tunnel with a proven identity. It is the workload at its address if their
    /// identities agree. Behind a gateway, a waypoint or NAT they differ.
    pub(crate) fn tunnel_client(
        address: SocketAddr,
        identity: &SpiffeId,
        headers: &HeaderMap,
        snapshot: &Snapshot,
    ) -> Self {
        let at_address = snapshot.workload(address.ip());
        let workload = at_address.filter(|workload| workload.identity == *identity).cloned();
        let claim = match workload {
            Some(_) => None,
            None => Baggage::read(headers).map(|baggage| Claim::Baggage(Box::new(baggage.into()))),
        };
        Self { workload, identity: Some(identity.clone()), claim, ..Self::at_address(address) }
    }

    /// The proven names, for the log.
    pub(crate) fn proven_names(&self) -> Names<'_> {
        self.workload.as_deref().map(Names::from_workload).unwrap_or_default()
    }

    /// The claimed names, for the log.
    pub(crate) fn claimed_names(&self) -> Names<'_> {
        match &self.claim {
            Some(Claim::Address(workload)) => Names::from_workload(workload),
            Some(Claim::Baggage(names)) => {
                let text = |text| Some(Quoted::as_str(text)).filter(|text| !text.is_empty());
                Names {
                    workload: names.workload.as_ref().and_then(text),
                    namespace: text(&names.namespace),
                    cluster: text(&names.cluster),
                }
            }
            None => Names::default(),
        }
    }
}

/// The names of a workload in the access log.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Names<'a> {
    pub(crate) workload: Option<&'a str>,
    pub(crate) namespace: Option<&'a str>,
    pub(crate) cluster: Option<&'a str>,
}

impl<'a> Names<'a> {
    fn from_workload(workload: &'a Workload) -> Self {
        Self {
            workload: Some(&workload.name),
            namespace: Some(&workload.namespace),
            cluster: Some(&workload.cluster_id),
        }
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use underpass_config::Mesh;

    use super::*;
    use crate::node::testing::settings;

    fn snapshot() -> Snapshot {
        let text = "workloads:
- {name: web, serviceAccount: web, workloadIps: [10.0.0.1]}
- {name: gateway, serviceAccount: gateway, workloadIps: [10.0.0.2]}
";
        let mesh = Arc::new(Mesh::from_text("mesh", text).unwrap());
        Snapshot::new(mesh, &settings(&[]).workload, 1)
    }

    fn client(address: &str, account: &str, baggage: &'static str) -> Party {
        let identity = format!("spiffe://cluster.local/ns/default/sa/{account}").parse().unwrap();
        let mut headers = HeaderMap::new();
        if !baggage.is_empty() {
            headers.insert("baggage", HeaderValue::from_static(baggage));
        }
        Party::tunnel_client(address.parse().unwrap(), &identity, &headers, &snapshot())
    }

    const ADMIN: &str =
        "k8s.cluster.name=Kubernetes,k8s.namespace.name=kube-system,k8s.deployment.name=admin";

    #[test]
    fn client_is_proven_workload_if_address_and_identity_agree() {
        let web = client("10.0.0.1:1", "web", ADMIN);
        assert_eq!(web.proven_names().workload, Some("web"));
        assert_eq!(web.claimed_names(), Names::default());
    }

    #[test]
    fn client_with_another_identity_is_not_attributed_to_workload_at_its_address() {
        let neighbour = client("10.0.0.2:1", "web", "");
        assert_eq!(neighbour.proven_names(), Names::default());
        assert_eq!(neighbour.claimed_names(), Names::default());
        assert!(neighbour.identity.is_some_and(|id| id.path().ends_with("/web")));
    }

    #[test]
    fn baggage_of_client_behind_gateway_is_only_claimed() {
        let behind = client("10.0.0.2:1", "web", ADMIN);
        assert_eq!(behind.proven_names(), Names::default());
        let claimed = behind.claimed_names();
        assert_eq!((claimed.workload, claimed.namespace), (Some("admin"), Some("kube-system")));
    }

    #[test]
    fn address_of_plaintext_client_is_only_claimed() {
        let web = Party::plaintext_client("10.0.0.1:1".parse().unwrap(), &snapshot());
        assert_eq!(web.proven_names(), Names::default());
        assert_eq!(web.claimed_names().workload, Some("web"));
        let unknown = Party::plaintext_client("192.0.2.1:1".parse().unwrap(), &snapshot());
        assert_eq!(unknown.claimed_names(), Names::default());
    }
}
