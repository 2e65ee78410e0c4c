//! Converts `istio.workload.Service`.

use super::{Rejection, check_lengths, gateway, hostname, network_address, one_of, ports, range};
use crate::identity::spiffe::SpiffeId;
use crate::mesh::shared::Shared;
use crate::mesh::{
    IpFamilies, LoadBalancing, LoadBalancingMode, Name, NamespacedHostname, NetworkAddress,
    NetworkCidr, Scope, Service, Visibility, WeightedWaypoint,
};
use crate::xds::workload as message;
use crate::yaml::quote::Quoted;

const MODES: &[(i32, LoadBalancingMode)] = &[
    (0, LoadBalancingMode::Standard),
    (1, LoadBalancingMode::Strict),
    (2, LoadBalancingMode::Failover),
    (3, LoadBalancingMode::Passthrough),
];
const SCOPES: &[(i32, Scope)] = &[
    (1, Scope::Region),
    (2, Scope::Zone),
    (3, Scope::Subzone),
    (4, Scope::Node),
    (5, Scope::Cluster),
    (6, Scope::Network),
];
const HEALTH: &[(i32, bool)] = &[(0, false), (1, true)];
const FAMILIES: &[(i32, IpFamilies)] =
    &[(0, IpFamilies::Any), (1, IpFamilies::V4), (2, IpFamilies::V6), (3, IpFamilies::Dual)];
const VISIBILITIES: &[(i32, Visibility)] = &[(0, Visibility::Public), (1, Visibility::Namespace)];

/// Converts a service of the resource `name`.
pub(in crate::xds) fn service(
    name: &str,
    given: &message::Service,
    shared: &mut Shared,
) -> Result<Service, Rejection> {
    let key = hostname("hostname", &given.namespace, &given.hostname, shared)?;
    if key.to_string() != name {
        return Err(Rejection::Name(Quoted::new(&key)));
    }
    check_lengths(&[
        ("name", &given.name),
        ("namespace", &given.namespace),
        ("hostname", &given.hostname),
    ])?;
    let (vips, cidr_vips) = addresses(given, shared)?;
    Ok(Service {
        name: shared.name(&given.name),
        namespace: key.namespace,
        hostname: key.hostname,
        vips: vips.into(),
        cidr_vips: cidr_vips.into(),
        ports: ports("ports", &given.ports, shared)?,
        subject_alt_names: subject_alt_names(&given.subject_alt_names),
        waypoint: gateway("waypoint", given.waypoint.as_ref(), shared)?,
        weighted_waypoints: weighted_waypoints(&given.weighted_waypoints, shared)?,
        load_balancing: load_balancing(given.load_balancing.as_ref())?,
        ip_families: one_of("ip_families", given.ip_families, FAMILIES)?,
        canonical: given.canonical,
        visibility: one_of("visibility", given.visibility, VISIBILITIES)?,
        endpoints: Box::default(),
    })
}

/// The service with the name of a resource.
pub(in crate::xds) fn service_key(name: &str) -> Option<NamespacedHostname> {
    NamespacedHostname::read(name, |text| Name::from(text)).ok()
}

fn addresses(
    given: &message::Service,
    shared: &mut Shared,
) -> Result<(Vec<NetworkAddress>, Vec<NetworkCidr>), Rejection> {
    let (mut vips, mut cidr_vips) = (Vec::new(), Vec::new());
    for one in &given.addresses {
        let at = network_address("addresses", one, shared)?;
        match one.length {
            None => vips.push(at),
            Some(length) => {
                let cidr = range(&one.address, length);
                let cidr = cidr.ok_or_else(|| Rejection::value("addresses.length", length))?;
                cidr_vips.push(NetworkCidr { network: at.network, cidr });
            }
        }
    }
    Ok((vips, cidr_vips))
}

/// The accepted identities. A name that is not a SPIFFE id matches no peer, so it is omitted.
fn subject_alt_names(given: &[String]) -> Box<[SpiffeId]> {
    given.iter().filter_map(|name| name.parse().ok()).collect()
}

fn weighted_waypoints(
    given: &[message::WeightedWaypoint],
    shared: &mut Shared,
) -> Result<Box<[WeightedWaypoint]>, Rejection> {
    let mut waypoints = Vec::with_capacity(given.len());
    for message::WeightedWaypoint { destination, weight } in given {
        let waypoint = gateway("weighted_waypoints", destination.as_ref(), shared)?;
        let gateway = waypoint.ok_or_else(|| Rejection::value("weighted_waypoints", weight))?;
        waypoints.push(WeightedWaypoint { gateway, weight: *weight });
    }
    Ok(waypoints.into())
}

fn load_balancing(given: Option<&message::LoadBalancing>) -> Result<LoadBalancing, Rejection> {
    let Some(given) = given else { return Ok(LoadBalancing::default()) };
    let preferences = given.routing_preference.iter();
    let preferences = preferences.map(|scope| one_of("routing_preference", *scope, SCOPES));
    Ok(LoadBalancing {
        mode: one_of("mode", given.mode, MODES)?,
        preferences: preferences.collect::<Result<_, _>>()?,
        allow_unhealthy: one_of("health_policy", given.health_policy, HEALTH)?,
    })
}
