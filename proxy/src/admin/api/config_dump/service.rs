//! A service with ztunnel's keys.

use std::collections::BTreeMap;

use serde::Serialize;
use underpass_config::{
    Endpoint, IpFamilies, LoadBalancing, LoadBalancingMode, NetworkCidr, PortMap, Scope, Service,
    Visibility, WeightedWaypoint,
};

use super::append;
use super::workload::{GatewayDump, status};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ServiceDump<'a> {
    name: &'a str,
    namespace: &'a str,
    hostname: &'a str,
    vips: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cidr_vips: Vec<CidrDump<'a>>,
    ports: BTreeMap<u16, u16>,
    endpoints: BTreeMap<&'a str, EndpointDump<'a>>,
    subject_alt_names: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    waypoint: Option<GatewayDump>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    weighted_waypoints: Vec<WeightedDump>,
    load_balancer: BalancingDump,
    #[serde(skip_serializing_if = "Option::is_none")]
    ip_families: Option<&'static str>,
    canonical: bool,
    visibility: &'static str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct EndpointDump<'a> {
    workload_uid: &'a str,
    service: String,
    port: BTreeMap<u16, u16>,
    status: &'static str,
}

#[derive(Serialize)]
struct CidrDump<'a> {
    network: &'a str,
    cidr: String,
}

impl<'a> From<&'a NetworkCidr> for CidrDump<'a> {
    fn from(vip: &'a NetworkCidr) -> Self {
        Self { network: &vip.network, cidr: vip.cidr.to_string() }
    }
}

#[derive(Serialize)]
struct WeightedDump {
    destination: GatewayDump,
    weight: u32,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct BalancingDump {
    mode: &'static str,
    routing_preferences: Vec<&'static str>,
    health_policy: &'static str,
}

impl From<&WeightedWaypoint> for WeightedDump {
    fn from(waypoint: &WeightedWaypoint) -> Self {
        Self { destination: GatewayDump::from(&waypoint.gateway), weight: waypoint.weight }
    }
}

impl From<&LoadBalancing> for BalancingDump {
    fn from(balancing: &LoadBalancing) -> Self {
        let mode = match balancing.mode {
            LoadBalancingMode::Standard => "Standard",
            LoadBalancingMode::Strict => "Strict",
            LoadBalancingMode::Failover => "Failover",
            LoadBalancingMode::Passthrough => "Passthrough",
        };
        let scope = |scope: &Scope| match scope {
            Scope::Region => "Region",
            Scope::Zone => "Zone",
            Scope::Subzone => "Subzone",
            Scope::Node => "Node",
            Scope::Cluster => "Cluster",
            Scope::Network => "Network",
        };
        let health_policy = if balancing.allow_unhealthy { "AllowAll" } else { "OnlyHealthy" };
        let routing_preferences = balancing.preferences.iter().map(scope).collect();
        Self { mode, routing_preferences, health_policy }
    }
}

fn ports(ports: &PortMap) -> BTreeMap<u16, u16> {
    ports.iter().collect()
}

/// The entry of an endpoint in the map of a service.
fn entry<'a>(service: &Service, endpoint: &'a Endpoint) -> (&'a str, EndpointDump<'a>) {
    let uid = &*endpoint.workload.uid;
    let dump = EndpointDump {
        workload_uid: uid,
        service: service.to_string(),
        port: ports(&endpoint.ports),
        status: status(&endpoint.workload),
    };
    (uid, dump)
}

pub(super) fn write(service: &Service, chunk: &mut Vec<u8>) {
    let dump = ServiceDump {
        name: &service.name,
        namespace: &service.namespace,
        hostname: &service.hostname,
        vips: service.vips.iter().map(ToString::to_string).collect(),
        cidr_vips: service.cidr_vips.iter().map(CidrDump::from).collect(),
        ports: ports(&service.ports),
        endpoints: service.endpoints.iter().map(|one| entry(service, one)).collect(),
        subject_alt_names: service.subject_alt_names.iter().map(ToString::to_string).collect(),
        waypoint: service.waypoint.as_ref().map(GatewayDump::from),
        weighted_waypoints: service.weighted_waypoints.iter().map(WeightedDump::from).collect(),
        load_balancer: BalancingDump::from(&service.load_balancing),
        ip_families: match service.ip_families {
            IpFamilies::Any => None,
            IpFamilies::V4 => Some("IPv4"),
            IpFamilies::V6 => Some("IPv6"),
            IpFamilies::Dual => Some("Dual"),
        },
        canonical: service.canonical,
        visibility: match service.visibility {
            Visibility::Public => "Public",
            Visibility::Namespace => "Namespace",
        },
    };
    append(chunk, &dump);
}
