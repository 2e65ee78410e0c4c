//! Reads the workloads of the mesh file.

use std::net::IpAddr;
use std::sync::Arc;

use super::gateway::{gateway, ports};
use crate::identity::spiffe::{SpiffeError, SpiffeId};
use crate::mesh::names::Name;
use crate::mesh::shared::Shared;
use crate::mesh::{
    ApplicationTunnel, Locality, NamespacedHostname, NetworkMode, PortMap, Protocol, TunnelHeader,
    Workload, WorkloadDraft, WorkloadType,
};
use crate::yaml::document::Value;
use crate::yaml::read::Cursor;

/// All keys that ztunnel supports for a workload (`state/workload.rs`, `xds.rs`).
const KEYS: &[&str] = &[
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

/// Reads a workload. A mistake is reported and rejects the document.
pub(super) fn workload(item: Cursor<'_>, shared: &mut Shared) -> Option<WorkloadDraft> {
    item.only(KEYS);
    // Ignored: it means that the workload itself supports HBONE, like `protocol`.
    item.key("nativeTunnel").flag();
    let name = item.key("name").text().unwrap_or_default();
    let namespace = text(item.key("namespace"), "default", shared);
    let service_account = text(item.key("serviceAccount"), "default", shared);
    let workload_name = text(item.key("workloadName"), name, shared);
    let gateway_of = |key: &str, shared: &mut Shared| {
        gateway(item.key(key), shared).map(|gateway| shared.gateway(gateway))
    };
    let workload = Workload {
        uid: item.key("uid").text().unwrap_or_default().into(),
        network: text(item.key("network"), "", shared),
        hostname: text(item.key("hostname"), "", shared),
        node: text(item.key("node"), "", shared),
        network_mode: network_mode(item.key("networkMode")),
        waypoint: gateway_of("waypoint", shared),
        network_gateway: gateway_of("networkGateway", shared),
        application_tunnel: application_tunnel(item.key("applicationTunnel")),
        healthy: healthy(item.key("status")),
        capacity: item.key("capacity").parse("a number, 0 to 4294967295").unwrap_or(1),
        policies: Box::default(),
        services: Box::default(),
        canonical_name: text(item.key("canonicalName"), &workload_name, shared),
        canonical_revision: text(item.key("canonicalRevision"), "latest", shared),
        cluster_id: text(item.key("clusterId"), "Kubernetes", shared),
        workload_type: workload_type(item.key("workloadType")),
        locality: locality(item.key("locality"), shared),
        identity: identity(item, &namespace, &service_account, shared)?,
        addresses: addresses(item),
        protocol: protocol(item.key("protocol")),
        name: name.into(),
        namespace,
        service_account,
        workload_name,
    };
    let services = services(item.key("services"), shared);
    Some(WorkloadDraft { workload, services, policies: policies(item, shared) })
}

fn text(given: Cursor<'_>, default: &str, shared: &mut Shared) -> Name {
    shared.name(given.text().unwrap_or(default))
}

fn protocol(given: Cursor<'_>) -> Protocol {
    given.one_of(&[("TCP", Protocol::Tcp), ("HBONE", Protocol::Hbone)]).unwrap_or(Protocol::Tcp)
}

fn network_mode(given: Cursor<'_>) -> NetworkMode {
    let words = [("Standard", NetworkMode::Standard), ("HostNetwork", NetworkMode::HostNetwork)];
    given.one_of(&words).unwrap_or(NetworkMode::Standard)
}

fn healthy(given: Cursor<'_>) -> bool {
    given.one_of(&[("Healthy", true), ("Unhealthy", false)]).unwrap_or(true)
}

fn workload_type(given: Cursor<'_>) -> WorkloadType {
    let words = WorkloadType::ALL.map(|kind| (kind.as_str(), kind));
    match given.text() {
        // ztunnel's default is the empty string.
        None | Some("") => WorkloadType::Pod,
        Some(_) => given.one_of(&words).unwrap_or(WorkloadType::Pod),
    }
}

fn application_tunnel(section: Cursor<'_>) -> Option<ApplicationTunnel> {
    if !section.is_given() {
        return None;
    }
    section.only(&["protocol", "port"]);
    let words = [("NONE", TunnelHeader::None), ("PROXY", TunnelHeader::Proxy)];
    let header = section.key("protocol").one_of(&words).unwrap_or(TunnelHeader::None);
    Some(ApplicationTunnel { header, port: section.key("port").port() })
}

fn identity(
    item: Cursor<'_>,
    namespace: &Name,
    service_account: &Name,
    shared: &mut Shared,
) -> Option<SpiffeId> {
    let given = item.key("trustDomain");
    let trust_domain = match given.text().filter(|text| !text.is_empty()) {
        Some(text) => shared.name(text),
        None => shared.name("cluster.local"),
    };
    match shared.identity([trust_domain, namespace.clone(), service_account.clone()]) {
        Ok(identity) => Some(identity),
        Err(error @ SpiffeError::TrustDomain) => {
            given.problem(error.to_string());
            None
        }
        Err(error) => {
            item.problem(format!(
                "namespace and serviceAccount do not form a SPIFFE identity: {error}"
            ));
            None
        }
    }
}

fn locality(section: Cursor<'_>, shared: &mut Shared) -> Arc<Locality> {
    section.only(&["region", "zone", "subzone"]);
    let region = text(section.key("region"), "", shared);
    let zone = text(section.key("zone"), "", shared);
    let subzone = text(section.key("subzone"), "", shared);
    shared.localities.shared(Locality { region, zone, subzone })
}

/// Reads the addresses. A workload without an address must have a hostname or a gateway.
fn addresses(item: Cursor<'_>) -> Box<[IpAddr]> {
    let list = item.key("workloadIps");
    let no_items = list.node().is_none_or(|node| node.value == Value::Sequence(Vec::new()));
    let has_text = |key: &str| item.key(key).is_given() && !item.key(key).is_word("");
    if no_items && !has_text("hostname") && !has_text("networkGateway") {
        list.problem("needs at least one IP address, unless there is a hostname or networkGateway");
    }
    let addresses =
        list.items(|item| item.given_or("must be an IP address")?.parse::<IpAddr>("an IP address"));
    addresses.into_iter().map(|address| address.to_canonical()).collect()
}

fn services(section: Cursor<'_>, shared: &mut Shared) -> Vec<(NamespacedHostname, PortMap)> {
    section.each(|key, map| match NamespacedHostname::read(key, |text| shared.name(text)) {
        Ok(name) => Some((name, ports(map, false, shared))),
        Err(reason) => {
            map.problem(format!("the key {reason}"));
            None
        }
    })
}

fn policies(item: Cursor<'_>, shared: &mut Shared) -> Vec<Name> {
    item.key("authorizationPolicies").items(|item| {
        let text = item.given_or("must be the NAMESPACE/NAME of a policy")?.text()?;
        Some(shared.name(text))
    })
}
