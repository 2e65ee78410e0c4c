//! The settings `workload` and `mesh`.

use std::path::PathBuf;

use crate::identity::spiffe::{SpiffeId, TrustDomain};
use crate::settings::declare::{Document, Fallback, Kind, PATH, TEXT, Written, settings};
use crate::settings::{Settings, WorkloadSettings};

settings! {
    /// the workload's name in the mesh and in logs ([mesh.md](mesh.md), "The pod's own workload")
    NAME: String = "workload.name", TEXT,
        Fallback::Varies("the service account"), |s| of_one_pod(s, &s.workload.name);
    /// the namespace of the workload
    NAMESPACE: String = "workload.namespace", TEXT,
        Fallback::Is(|| "default".to_owned()), |s| of_one_pod(s, &s.workload.namespace);
    /// the service account in the identity of the workload
    SERVICE_ACCOUNT: String = "workload.serviceAccount", TEXT,
        Fallback::Is(|| "default".to_owned()), |s| of_one_pod(s, &s.workload.service_account);
    /// the trust domain of the identity
    TRUST_DOMAIN: TrustDomain = "workload.trustDomain", TRUST_DOMAIN_NAME,
        Fallback::Is(TrustDomain::cluster_local), |s| Some(s.workload.trust_domain.clone());
    /// the network of the workload's addresses, in which addresses are looked up in the mesh
    NETWORK: String = "workload.network", NETWORK_NAME,
        Fallback::Is(String::new), |s| Some(s.workload.network.clone());
    /// the mesh file ([mesh.md](mesh.md)), or a folder of files that together describe the mesh
    MESH_FILE: PathBuf = "mesh.file", PATH,
        Fallback::Varies("none: no other workload is known"), |s| s.mesh_file.clone();
}

/// A value that a node daemon does not have: each of its pods has its own.
fn of_one_pod(settings: &Settings, value: &str) -> Option<String> {
    settings.node.pods.is_none().then(|| value.to_owned())
}

const TRUST_DOMAIN_NAME: Kind<TrustDomain> = Kind {
    name: "trust domain",
    is_list: false,
    read: |cursor, _| cursor.parse_explained(),
    write: |trust_domain| Written::scalar(trust_domain),
};

/// A network name without a slash, because the mesh file writes addresses as `network/address`.
const NETWORK_NAME: Kind<String> = Kind {
    read: |cursor, _| {
        let name = cursor.text()?;
        if name.contains('/') {
            cursor.problem("must be the name of a network, without '/'");
            return None;
        }
        Some(name.to_owned())
    },
    ..TEXT
};

pub(super) fn workload(document: Document<'_>) -> Option<WorkloadSettings> {
    let namespace = NAMESPACE.read(document)?;
    let service_account = SERVICE_ACCOUNT.read(document)?;
    let trust_domain = TRUST_DOMAIN.read_sound(document)?;
    let spiffe_id = SpiffeId::istio(trust_domain.clone(), &namespace, &service_account)
        .map_err(|error| {
            document.root.key("workload").problem(format!(
                "namespace and serviceAccount do not form a SPIFFE identity: {error}"
            ));
        })
        .ok()?;
    // The default name of a workload is its service account.
    let name = NAME.read(document).unwrap_or_else(|| service_account.clone());
    let network = NETWORK.read_sound(document)?;
    Some(WorkloadSettings { name, namespace, service_account, trust_domain, network, spiffe_id })
}

pub(super) fn mesh_file(document: Document<'_>) -> Option<PathBuf> {
    MESH_FILE.read(document)
}
