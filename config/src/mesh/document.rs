//! The mesh file: ztunnel's `LOCAL_XDS_PATH` document (camelCase YAML), checked whole.
//!
//! What would change routing or policy and is not built yet is refused by name: to ignore a policy would open a door, to
//! ignore a waypoint would go round it.

use std::net::IpAddr;

use super::{Locality, Mesh, Protocol, Workload, WorkloadType};
use crate::document::Node;
use crate::error::ConfigErrors;
use crate::read::{Cursor, Problems};
use crate::{SpiffeId, TrustDomain};

const SECTIONS: &[&str] = &["workloads", "services", "policies"];

/// Every key that ztunnel knows of a workload.
const WORKLOAD_KEYS: &[&str] = &[
    "uid",
    "name",
    "namespace",
    "serviceAccount",
    "trustDomain",
    "workloadIps",
    "protocol",
    "node",
    "network",
    "clusterId",
    "services",
    "workloadName",
    "workloadType",
    "canonicalName",
    "canonicalRevision",
    "locality",
    "capacity",
    "status",
    "nativeTunnel",
    "hostname",
    "waypoint",
    "networkGateway",
    "applicationTunnel",
    "authorizationPolicies",
    "networkMode",
];

/// Keys whose meaning is not built yet and must not be ignored.
const NOT_YET: &[&str] = &[
    "hostname",
    "waypoint",
    "networkGateway",
    "applicationTunnel",
    "authorizationPolicies",
    "networkMode",
];

pub(super) fn read(node: &Node) -> Result<Mesh, ConfigErrors> {
    let problems = Problems::default();
    let root = Cursor::root(node, &problems);
    root.only(SECTIONS);
    for section in ["services", "policies"] {
        refuse_unless_empty(root.key(section));
    }
    let mut mesh = Mesh::default();
    root.key("workloads").items(|item| {
        let inserted = mesh.insert(workload(item)?);
        inserted
            .map_err(|(address, other)| {
                item.problem(format!(
                    "{address} already belongs to {}/{}",
                    other.namespace, other.name
                ));
            })
            .ok()
    });
    problems.or_else(Some(mesh))
}

fn refuse_unless_empty(section: Cursor<'_>) {
    if !section.items(|_| Some(())).is_empty() {
        section.problem("not supported yet: leave the list empty or out");
    }
}

fn workload(item: Cursor<'_>) -> Option<Workload> {
    item.only(WORKLOAD_KEYS);
    NOT_YET.iter().for_each(|key| item.key(key).not_yet());
    refuse_other_network(item.key("network"));
    let text =
        |key: &str, default: &str| -> String { item.key(key).text().unwrap_or(default).to_owned() };
    let protocols = [("TCP", Protocol::Tcp), ("HBONE", Protocol::Hbone)];
    let protocol = match item.key("protocol") {
        given if given.is_given() => given.one_of(&protocols),
        _ => Some(Protocol::Tcp),
    };
    let (namespace, service_account) =
        (text("namespace", "default"), text("serviceAccount", "default"));
    let identity = identity(item, &namespace, &service_account);
    let addresses = addresses(item.key("workloadIps"));
    let name = text("name", "");
    let workload_name = text("workloadName", &name);
    Some(Workload {
        uid: text("uid", ""),
        canonical_name: text("canonicalName", &workload_name),
        canonical_revision: text("canonicalRevision", "latest"),
        cluster_id: text("clusterId", "Kubernetes"),
        workload_type: workload_type(item.key("workloadType")),
        locality: locality(item.key("locality")),
        identity: identity?,
        addresses: addresses?,
        protocol: protocol?,
        name,
        namespace,
        service_account,
        workload_name,
    })
}

fn identity(item: Cursor<'_>, namespace: &str, service_account: &str) -> Option<SpiffeId> {
    let trust_domain: TrustDomain = match item.key("trustDomain") {
        given if given.text().is_some_and(|text| !text.is_empty()) => given.parse_explained()?,
        _ => "cluster.local".parse().ok()?,
    };
    SpiffeId::istio(trust_domain, namespace, service_account)
        .map_err(|error| {
            item.problem(format!("namespace and serviceAccount make no SPIFFE identity: {error}"))
        })
        .ok()
}

fn workload_type(cursor: Cursor<'_>) -> WorkloadType {
    let words = WorkloadType::ALL.map(|kind| (kind.as_str(), kind));
    match cursor.text() {
        // Empty is ztunnel's default, and says nothing.
        None | Some("") => WorkloadType::Pod,
        Some(_) => cursor.one_of(&words).unwrap_or(WorkloadType::Pod),
    }
}

fn locality(section: Cursor<'_>) -> Locality {
    section.only(&["region", "zone", "subzone"]);
    let text = |key: &str| section.key(key).text().unwrap_or_default().to_owned();
    Locality { region: text("region"), zone: text("zone"), subzone: text("subzone") }
}

fn addresses(list: Cursor<'_>) -> Option<Vec<IpAddr>> {
    let addresses = list
        .items(|item| item.parse::<IpAddr>("an IP address").map(|address| address.to_canonical()));
    if addresses.is_empty() {
        list.problem("needs at least one IP address");
        return None;
    }
    Some(addresses)
}

/// Another network is reached through its gateway, which is not built yet; an address there means nothing here.
fn refuse_other_network(network: Cursor<'_>) {
    if network.text().is_some_and(|text| !text.is_empty()) {
        network.problem("not supported yet: only workloads of our own network (\"\")");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::Origin;

    fn mesh(text: &str) -> Result<Mesh, ConfigErrors> {
        let origin = |line, column| Origin::Document { name: "mesh.yaml".into(), line, column };
        read(&Node::parse(text, &origin)?)
    }

    fn mistakes(text: &str) -> Vec<String> {
        mesh(text).unwrap_err().problems.iter().map(ToString::to_string).collect()
    }

    /// The workload that ztunnel's documentation describes, with every key that is only information.
    const WORKLOAD: &str = r#"
workloads:
- uid: cluster1//v1/Pod/default/local
  name: local
  namespace: default
  serviceAccount: web
  trustDomain: cluster.local
  workloadIps: ["10.0.0.1", "fd00::1"]
  protocol: HBONE
  node: local
  network: ""
  services: {"default/example.com": {80: 8080}}
  locality: {region: r, zone: z, subzone: ""}
  workloadName: web
  workloadType: deployment
  capacity: 1
  status: Healthy
- {name: plain, namespace: default, workloadIps: ["10.0.0.2"], services: {}}
services: []
policies: []
"#;

    #[test]
    fn a_workload_is_found_by_each_of_its_addresses() {
        let mesh = mesh(WORKLOAD).unwrap();
        assert_eq!(mesh.len(), 2);
        for address in ["10.0.0.1", "fd00::1", "::ffff:10.0.0.1"] {
            let workload = mesh.workload(address.parse().unwrap()).unwrap();
            assert_eq!(workload.name, "local");
            assert_eq!(workload.protocol, Protocol::Hbone);
            assert_eq!(workload.identity.to_string(), "spiffe://cluster.local/ns/default/sa/web");
        }
        assert_eq!(mesh.workload("10.0.0.9".parse().unwrap()), None);
    }

    #[test]
    fn absent_keys_take_their_obvious_default() {
        let mesh = mesh(WORKLOAD).unwrap();
        let plain = mesh.workload("10.0.0.2".parse().unwrap()).unwrap();
        assert_eq!(plain.protocol, Protocol::Tcp);
        assert_eq!(plain.identity.to_string(), "spiffe://cluster.local/ns/default/sa/default");
        assert_eq!(plain.workload_name, "plain");
        assert_eq!(plain.canonical_revision, "latest");
        assert_eq!(plain.workload_type, WorkloadType::Pod);
        assert_eq!(plain.locality, Locality::default());
    }

    #[test]
    fn what_a_workload_is_part_of_and_where_it_runs_are_read() {
        let mesh = mesh(WORKLOAD).unwrap();
        let local = mesh.workload("10.0.0.1".parse().unwrap()).unwrap();
        assert_eq!(local.workload_type, WorkloadType::Deployment);
        let Locality { region, zone, subzone } = &local.locality;
        assert_eq!((region.as_str(), zone.as_str(), subzone.as_str()), ("r", "z", ""));
        let text = "workloads:\n- {name: a, workloadIps: [10.0.0.1], workloadType: pods, \
                    locality: {regoin: r}}\n- {name: b, workloadIps: [10.0.0.2], workloadType: '', locality: ~}\n";
        assert_eq!(
            mistakes(text),
            [
                "mesh.yaml:2:52: workloads[0].workloadType: \"pods\": must be one of deployment, cronjob, pod, job",
                "mesh.yaml:2:77: workloads[0].locality.regoin: \"r\": no such key; did you mean region?",
            ]
        );
    }

    #[test]
    fn every_mistake_is_told_with_its_place() {
        let text = "workloads:\n- {name: a, workloadIps: [10.0.0.1], protocol: HBON}\n\
                    - {name: b, workloadIps: [10.0.0], serviceAcount: x}\n- {name: c}\n";
        assert_eq!(
            mistakes(text),
            [
                "mesh.yaml:2:48: workloads[0].protocol: \"HBON\": must be one of TCP, HBONE",
                "mesh.yaml:3:51: workloads[1].serviceAcount: \"x\": no such key; did you mean serviceAccount?",
                "mesh.yaml:3:27: workloads[1].workloadIps[0]: \"10.0.0\": must be an IP address",
                "mesh.yaml:3:26: workloads[1].workloadIps: needs at least one IP address",
                "workloads[2].workloadIps: needs at least one IP address",
            ]
        );
    }

    #[test]
    fn two_workloads_cannot_have_one_address() {
        let text = "workloads:\n- {name: a, workloadIps: [10.0.0.1]}\n- {name: b, workloadIps: [\"::ffff:10.0.0.1\"]}\n";
        assert_eq!(
            mistakes(text),
            ["mesh.yaml:3:3: workloads[1]: 10.0.0.1 already belongs to default/a"]
        );
    }

    #[test]
    fn what_would_change_routing_or_policy_is_refused_until_it_is_built() {
        let text = "workloads:\n- {name: a, workloadIps: [10.0.0.1], network: far, waypoint: {destination: x}}\n\
                    policies: [{name: deny}]\nservices: [{name: s}]\n";
        let found = mistakes(text);
        assert_eq!(found.len(), 4, "{found:?}");
        assert!(found.iter().all(|mistake| mistake.contains("not supported yet")), "{found:?}");
    }
}
