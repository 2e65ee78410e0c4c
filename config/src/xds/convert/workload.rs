//! Converts `istio.workload.Workload`.

use std::net::IpAddr;
use std::sync::Arc;

use super::{Rejection, address, check_lengths, gateway, one_of, port, ports};
use crate::mesh::shared::Shared;
use crate::mesh::{
    ApplicationTunnel, Locality, Name, NamespacedHostname, NetworkMode, PortMap, Protocol,
    TunnelHeader, Workload, WorkloadDraft, WorkloadType,
};
use crate::xds::workload as message;
use crate::yaml::quote::Quoted;

/// A workload with another protocol is rejected: it must not be reached in plaintext instead.
const PROTOCOLS: &[(i32, Protocol)] = &[(0, Protocol::Tcp), (1, Protocol::Hbone)];
const STATUSES: &[(i32, bool)] = &[(0, true), (1, false)];
const MODES: &[(i32, NetworkMode)] = &[(0, NetworkMode::Standard), (1, NetworkMode::HostNetwork)];
const HEADERS: &[(i32, TunnelHeader)] = &[(0, TunnelHeader::None), (1, TunnelHeader::Proxy)];
const TYPES: &[(i32, WorkloadType)] = &[
    (0, WorkloadType::Deployment),
    (1, WorkloadType::CronJob),
    (2, WorkloadType::Pod),
    (3, WorkloadType::Job),
];

/// Converts a workload of the resource `uid`.
pub(in crate::xds) fn workload(
    uid: Name,
    given: &message::Workload,
    shared: &mut Shared,
) -> Result<WorkloadDraft, Rejection> {
    if *given.uid != *uid {
        return Err(Rejection::Name(Quoted::new(&given.uid)));
    }
    check_names(given)?;
    let namespace = shared.name(&given.namespace);
    let service_account = shared.name(or(&given.service_account, "default"));
    let trust_domain = shared.name(or(&given.trust_domain, "cluster.local"));
    let identity = shared.identity([trust_domain, namespace.clone(), service_account.clone()]);
    let workload = Workload {
        uid,
        name: given.name.as_str().into(),
        identity: identity.map_err(Rejection::Identity)?,
        network: shared.name(&given.network),
        addresses: addresses(given)?,
        hostname: shared.name(&given.hostname),
        network_mode: one_of("network_mode", given.network_mode, MODES)?,
        protocol: one_of("tunnel_protocol", given.tunnel_protocol, PROTOCOLS)?,
        waypoint: shared_gateway("waypoint", given.waypoint.as_ref(), shared)?,
        network_gateway: shared_gateway("network_gateway", given.network_gateway.as_ref(), shared)?,
        application_tunnel: application_tunnel(given.application_tunnel.as_ref())?,
        healthy: one_of("status", given.status, STATUSES)?,
        capacity: given.capacity.map_or(1, |capacity| capacity.value),
        policies: Box::default(),
        services: Box::default(),
        workload_name: shared.name(&given.workload_name),
        // A new type is only information, so it rejects nothing.
        workload_type: one_of("workload_type", given.workload_type, TYPES)
            .unwrap_or(WorkloadType::Pod),
        canonical_name: shared.name(&given.canonical_name),
        canonical_revision: shared.name(&given.canonical_revision),
        cluster_id: shared.name(or(&given.cluster_id, "Kubernetes")),
        node: shared.name(&given.node),
        locality: locality(given.locality.as_ref(), shared),
        namespace,
        service_account,
    };
    let policies = given.authorization_policies.iter().map(|name| shared.name(name)).collect();
    Ok(WorkloadDraft { workload, services: services(given, shared)?, policies })
}

fn check_names(given: &message::Workload) -> Result<(), Rejection> {
    check_lengths(&[
        ("name", &given.name),
        ("namespace", &given.namespace),
        ("network", &given.network),
        ("trust_domain", &given.trust_domain),
        ("service_account", &given.service_account),
        ("node", &given.node),
        ("canonical_name", &given.canonical_name),
        ("canonical_revision", &given.canonical_revision),
        ("workload_name", &given.workload_name),
        ("cluster_id", &given.cluster_id),
        ("hostname", &given.hostname),
    ])?;
    match &given.locality {
        Some(message::Locality { region, zone, subzone }) => {
            check_lengths(&[("region", region), ("zone", zone), ("subzone", subzone)])
        }
        None => Ok(()),
    }
}

fn or<'a>(given: &'a str, default: &'a str) -> &'a str {
    if given.is_empty() { default } else { given }
}

fn addresses(given: &message::Workload) -> Result<Box<[IpAddr]>, Rejection> {
    let mut addresses = Vec::with_capacity(given.addresses.len());
    for bytes in &given.addresses {
        let address = address("addresses", bytes)?;
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    Ok(addresses.into())
}

fn shared_gateway(
    field: &'static str,
    given: Option<&message::GatewayAddress>,
    shared: &mut Shared,
) -> Result<Option<Arc<crate::mesh::Gateway>>, Rejection> {
    Ok(gateway(field, given, shared)?.map(|gateway| shared.gateway(gateway)))
}

fn application_tunnel(
    given: Option<&message::ApplicationTunnel>,
) -> Result<Option<ApplicationTunnel>, Rejection> {
    let Some(message::ApplicationTunnel { protocol, port: number }) = given else {
        return Ok(None);
    };
    let header = one_of("application_tunnel.protocol", *protocol, HEADERS)?;
    let port = Some(port("application_tunnel.port", *number, true)?).filter(|port| *port != 0);
    Ok(Some(ApplicationTunnel { header, port }))
}

fn locality(given: Option<&message::Locality>, shared: &mut Shared) -> Arc<Locality> {
    let [region, zone, subzone] = match given {
        Some(locality) => {
            [&locality.region, &locality.zone, &locality.subzone].map(|name| shared.name(name))
        }
        None => ["", "", ""].map(|name| shared.name(name)),
    };
    shared.localities.shared(Locality { region, zone, subzone })
}

fn services(
    given: &message::Workload,
    shared: &mut Shared,
) -> Result<Vec<(NamespacedHostname, PortMap)>, Rejection> {
    let mut services = Vec::with_capacity(given.services.len());
    for (key, list) in &given.services {
        let name = NamespacedHostname::read(key, |text| shared.name(text));
        let name = name.map_err(|_| Rejection::value("services", key))?;
        services.push((name, ports("services", &list.ports, shared)?));
    }
    Ok(services)
}
