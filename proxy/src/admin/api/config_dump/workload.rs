//! A workload with ztunnel's keys.

use std::net::IpAddr;

use serde::Serialize;
use underpass_config::{
    ApplicationTunnel, Gateway, Locality, NamespacedHostname, NetworkMode, Protocol, TunnelHeader,
    Workload,
};

use super::append;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct WorkloadDump<'a> {
    workload_ips: &'a [IpAddr],
    #[serde(skip_serializing_if = "Option::is_none")]
    waypoint: Option<GatewayDump>,
    #[serde(skip_serializing_if = "Option::is_none")]
    network_gateway: Option<GatewayDump>,
    protocol: &'static str,
    network_mode: &'static str,
    uid: &'a str,
    name: &'a str,
    namespace: &'a str,
    trust_domain: &'a str,
    service_account: &'a str,
    network: &'a str,
    workload_name: &'a str,
    workload_type: &'static str,
    canonical_name: &'a str,
    canonical_revision: &'a str,
    hostname: &'a str,
    node: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    application_tunnel: Option<TunnelDump>,
    authorization_policies: Vec<String>,
    status: &'static str,
    cluster_id: &'a str,
    locality: LocalityDump<'a>,
    services: Vec<String>,
    capacity: u32,
}

/// A waypoint or gateway.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct GatewayDump {
    /// `NETWORK/ADDRESS`, or `NAMESPACE/HOSTNAME`.
    destination: String,
    hbone_mtls_port: u16,
}

#[derive(Serialize)]
struct TunnelDump {
    protocol: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
}

#[derive(Serialize)]
struct LocalityDump<'a> {
    region: &'a str,
    zone: &'a str,
    subzone: &'a str,
}

impl From<&Gateway> for GatewayDump {
    fn from(gateway: &Gateway) -> Self {
        let destination = gateway.destination.to_string();
        Self { destination, hbone_mtls_port: gateway.hbone_port }
    }
}

impl From<ApplicationTunnel> for TunnelDump {
    fn from(tunnel: ApplicationTunnel) -> Self {
        let protocol = match tunnel.header {
            TunnelHeader::None => "NONE",
            TunnelHeader::Proxy => "PROXY",
        };
        Self { protocol, port: tunnel.port }
    }
}

impl<'a> From<&'a Locality> for LocalityDump<'a> {
    fn from(Locality { region, zone, subzone }: &'a Locality) -> Self {
        Self { region, zone, subzone }
    }
}

/// Whether an endpoint is selectable, in ztunnel's words.
pub(super) fn status(workload: &Workload) -> &'static str {
    if workload.healthy { "Healthy" } else { "Unhealthy" }
}

pub(super) fn write(workload: &Workload, chunk: &mut Vec<u8>) {
    let dump = WorkloadDump {
        workload_ips: &workload.addresses,
        waypoint: workload.waypoint.as_deref().map(GatewayDump::from),
        network_gateway: workload.network_gateway.as_deref().map(GatewayDump::from),
        protocol: match workload.protocol {
            Protocol::Tcp => "TCP",
            Protocol::Hbone => "HBONE",
        },
        network_mode: match workload.network_mode {
            NetworkMode::Standard => "Standard",
            NetworkMode::HostNetwork => "HostNetwork",
        },
        uid: &workload.uid,
        name: &workload.name,
        namespace: &workload.namespace,
        trust_domain: workload.identity.trust_domain().as_str(),
        service_account: &workload.service_account,
        network: &workload.network,
        workload_name: &workload.workload_name,
        workload_type: workload.workload_type.as_str(),
        canonical_name: &workload.canonical_name,
        canonical_revision: &workload.canonical_revision,
        hostname: &workload.hostname,
        node: &workload.node,
        application_tunnel: workload.application_tunnel.map(TunnelDump::from),
        authorization_policies: workload.policies.iter().map(ToString::to_string).collect(),
        status: status(workload),
        cluster_id: &workload.cluster_id,
        locality: LocalityDump::from(&*workload.locality),
        services: workload.services.iter().map(NamespacedHostname::to_string).collect(),
        capacity: workload.capacity,
    };
    append(chunk, &dump);
}
