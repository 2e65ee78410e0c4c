//! Reads the services of the mesh file.

use super::gateway::{gateway, ports};
use crate::cidr::canonical;
use crate::error::Reason;
use crate::identity::spiffe::SpiffeId;
use crate::mesh::names::{Name, NetworkCidr};
use crate::mesh::shared::Shared;
use crate::mesh::{
    IpFamilies, LoadBalancing, LoadBalancingMode, NetworkAddress, Scope, Service, Visibility,
    WeightedWaypoint,
};
use crate::yaml::read::Cursor;

/// All keys that ztunnel supports for a service (`state/service.rs`).
const KEYS: &[&str] = &[
    "name",
    "namespace",
    "hostname",
    "vips",
    "cidrVips",
    "ports",
    "endpoints",
    "subjectAltNames",
    "waypoint",
    "weightedWaypoints",
    "loadBalancer",
    "ipFamilies",
    "canonical",
    "visibility",
];

/// Reads a service. A mistake is reported and rejects the document.
pub(super) fn service(item: Cursor<'_>, shared: &mut Shared) -> Option<Service> {
    item.only(KEYS);
    refuse_endpoints(item.key("endpoints"));
    let hostname = hostname(item.key("hostname"), shared)?;
    let namespace = item.key("namespace").text().unwrap_or("default");
    Some(Service {
        name: shared.name(item.key("name").text().unwrap_or(&hostname)),
        namespace: shared.name(namespace),
        vips: vips(item.key("vips"), shared),
        cidr_vips: cidr_vips(item.key("cidrVips"), shared),
        ports: ports(item.key("ports"), true, shared),
        subject_alt_names: subject_alt_names(item.key("subjectAltNames")),
        waypoint: gateway(item.key("waypoint"), shared),
        weighted_waypoints: weighted_waypoints(item.key("weightedWaypoints"), shared),
        load_balancing: load_balancing(item.key("loadBalancer")),
        ip_families: ip_families(item.key("ipFamilies")),
        canonical: item.key("canonical").flag().unwrap_or(false),
        visibility: visibility(item.key("visibility")),
        endpoints: Box::default(),
        hostname,
    })
}

fn hostname(given: Cursor<'_>, shared: &mut Shared) -> Option<Name> {
    match given.text() {
        Some(text) if !text.is_empty() && !text.contains('/') => Some(shared.name(text)),
        _ => {
            given.problem("must be a hostname, such as example.com");
            None
        }
    }
}

/// Rejects endpoints. ztunnel reads them here, but workloads list their services too, and the two
/// lists could contradict.
fn refuse_endpoints(section: Cursor<'_>) {
    if !section.entries().is_empty() {
        let hint = "name the service in `services` of each workload";
        section.problem(Reason::with_hint("not supported here", hint));
    }
}

fn vips(list: Cursor<'_>, shared: &mut Shared) -> Box<[NetworkAddress]> {
    let vips = list.items(|item| {
        let vip: NetworkAddress =
            item.given_or("must be NETWORK/ADDRESS, such as /10.0.0.1")?.parse_explained()?;
        Some(vip.shared(&mut shared.names))
    });
    vips.into()
}

/// Reads address ranges. In ztunnel's document they are mappings; the text form of virtual
/// addresses is accepted too.
fn cidr_vips(list: Cursor<'_>, shared: &mut Shared) -> Box<[NetworkCidr]> {
    let ranges = list.items(|item| {
        item.given_or("must be {network: NETWORK, cidr: ADDRESS/LENGTH}")?;
        let NetworkCidr { network, cidr } = if item.is_mapping() {
            item.only(&["network", "cidr"]);
            let cidr = item.key("cidr").given_or("must be given: ADDRESS/LENGTH")?;
            let cidr = cidr.parse("ADDRESS/LENGTH, such as 10.0.0.0/8").map(canonical)?;
            NetworkCidr { network: item.key("network").text().unwrap_or_default().into(), cidr }
        } else {
            item.parse_explained()?
        };
        Some(NetworkCidr { network: shared.name(&network), cidr })
    });
    ranges.into()
}

fn subject_alt_names(list: Cursor<'_>) -> Box<[SpiffeId]> {
    let names = list.items(|item| item.given_or("must be a SPIFFE identity")?.parse_explained());
    names.into()
}

fn weighted_waypoints(list: Cursor<'_>, shared: &mut Shared) -> Box<[WeightedWaypoint]> {
    let waypoints = list.items(|item| {
        if !item.is_mapping() {
            item.problem("must be a mapping: {destination: {destination: …}, weight: 1}");
            return None;
        }
        item.only(&["destination", "weight"]);
        let destination = item.key("destination").given_or("must be given: {destination: …}")?;
        let weight = item.key("weight").parse("a number, 0 to 4294967295").unwrap_or(1);
        Some(WeightedWaypoint { gateway: gateway(destination, shared)?, weight })
    });
    waypoints.into()
}

fn load_balancing(section: Cursor<'_>) -> LoadBalancing {
    section.only(&["routingPreferences", "mode", "healthPolicy"]);
    let modes = [
        ("Standard", LoadBalancingMode::Standard),
        ("Strict", LoadBalancingMode::Strict),
        ("Failover", LoadBalancingMode::Failover),
        ("Passthrough", LoadBalancingMode::Passthrough),
    ];
    let scopes = [
        ("Region", Scope::Region),
        ("Zone", Scope::Zone),
        ("Subzone", Scope::Subzone),
        ("Node", Scope::Node),
        ("Cluster", Scope::Cluster),
        ("Network", Scope::Network),
    ];
    let health = [("OnlyHealthy", false), ("AllowAll", true)];
    let preferences = section
        .key("routingPreferences")
        .items(|item| item.given_or("must be a scope, such as Region")?.one_of(&scopes));
    LoadBalancing {
        mode: section.key("mode").one_of(&modes).unwrap_or_default(),
        preferences: preferences.into(),
        allow_unhealthy: section.key("healthPolicy").one_of(&health).unwrap_or(false),
    }
}

fn ip_families(given: Cursor<'_>) -> IpFamilies {
    let words = [("Dual", IpFamilies::Dual), ("IPv4", IpFamilies::V4), ("IPv6", IpFamilies::V6)];
    given.one_of(&words).unwrap_or_default()
}

fn visibility(given: Cursor<'_>) -> Visibility {
    let words = [("Public", Visibility::Public), ("Namespace", Visibility::Namespace)];
    given.one_of(&words).unwrap_or_default()
}
