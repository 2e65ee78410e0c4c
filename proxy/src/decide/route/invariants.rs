//! Property tests of routing, for every mesh, destination and state of the endpoints.

use std::net::{IpAddr, SocketAddr};

use proptest::prelude::*;
use underpass_config::{Mesh, NetworkMode, Protocol, Workload};

use super::testing::{FixedInputs, best_route, caller, mesh, named};
use super::{ForwardVia, NextHop, Route, Target, inbound};

const WORKLOADS: u8 = 6;
const SERVICES: u8 = 4;

/// A line for a workload. Its address is its own, shared with other workloads, or missing.
fn workload(index: u8) -> impl Strategy<Value = String> {
    let address = prop_oneof![
        4 => Just(format!("ip=10.0.0.{index}")),
        1 => Just(format!("ip=10.0.0.{index},fd00::{index}")),
        1 => Just("ip=10.0.9.9 hostnetwork".to_owned()),
        1 => Just(format!("host=w{index}.internal")),
        1 => Just(String::new()),
    ];
    let network = prop_oneof![3 => Just(""), 1 => Just("net=far"), 2 => Just("net=far gateway=far/10.5.0.1@15009")];
    let protocol = prop_oneof![Just("hbone"), Just("")];
    let waypoint = prop_oneof![3 => Just(""), 1 => Just("waypoint=default/s0@80"), 1 => Just("waypoint=/10.6.0.1@15008")];
    let rest = prop_oneof![3 => Just(""), 1 => Just("capacity=0"), 1 => Just("capacity=7"), 1 => Just("unhealthy tunnel=15088")];
    let of = proptest::sample::subsequence((0..SERVICES).collect::<Vec<_>>(), 0..4);
    (address, network, protocol, waypoint, rest, of).prop_map(move |parts| {
        let (address, network, protocol, waypoint, rest, of) = parts;
        let of: String = of.iter().map(|service| format!(" of=default/s{service}")).collect();
        format!("workload w{index} {address} {network} {protocol} {waypoint} {rest} {of}\n")
    })
}

/// A line for a service. Its address may equal that of a workload, or be a range that contains one.
fn service(index: u8) -> impl Strategy<Value = String> {
    let vip = prop_oneof![
        4 => Just(format!("vip=/10.1.0.{index},/fd01::{index}")),
        1 => Just("vip=/10.0.9.9,/10.0.0.1".to_owned()),
        1 => Just("cidr=/10.0.0.0/16".to_owned()),
    ];
    let mode = prop_oneof![
        2 => Just(""), 1 => Just("mode=failover prefer=network,region"), 1 => Just("mode=strict prefer=network"),
        2 => Just("mode=passthrough")
    ];
    let waypoint = prop_oneof![3 => Just(""), 1 => Just("waypoint=default/s1@80"), 1 => Just("waypoint=/10.6.0.1@15008")];
    let rest = prop_oneof![
        Just(""),
        Just("sans=team"),
        Just("families=v4"),
        Just("families=v6 unhealthy")
    ];
    (vip, mode, waypoint, rest).prop_map(move |(vip, mode, waypoint, rest)| {
        format!("service default/s{index} {vip} {mode} {waypoint} {rest}\n")
    })
}

fn any_mesh() -> impl Strategy<Value = String> {
    let workloads: Vec<_> = (1..=WORKLOADS).map(workload).collect();
    let services: Vec<_> = (0..SERVICES).map(service).collect();
    (workloads, services).prop_map(|(workloads, services)| {
        let fixed = "workload client ip=10.0.7.1 region=r\n\
                     workload gateway ip=10.5.0.1 net=far\n\
                     workload waypoint ip=10.6.0.1 hbone\n";
        format!("{fixed}{}{}", workloads.concat(), services.concat())
    })
}

fn destination() -> impl Strategy<Value = SocketAddr> {
    let address = prop_oneof![
        (1..=WORKLOADS).prop_map(|index| IpAddr::from([10, 0, 0, index])),
        (0..SERVICES).prop_map(|index| IpAddr::from([10, 1, 0, index])),
        (1..=WORKLOADS).prop_map(|index| format!("fd00::{index}").parse().unwrap()),
        Just(IpAddr::from([10, 0, 9, 9])),
        Just(IpAddr::from([192, 0, 2, 1])),
    ];
    (address, prop_oneof![3 => Just(80), 1 => Just(81)]).prop_map(SocketAddr::from)
}

/// The numbers of some workloads.
fn some_workloads() -> impl Strategy<Value = Vec<u8>> {
    proptest::sample::subsequence((1..=WORKLOADS).collect::<Vec<_>>(), 0..=usize::from(WORKLOADS))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn hbone_workload_is_never_dialled_in_plaintext(
        (text, destination) in (any_mesh(), destination()),
        (ejected, tried, seed) in (some_workloads(), some_workloads(), any::<u64>()),
    ) {
        let mesh = mesh(&text);
        let mut inputs = FixedInputs::new(seed);
        inputs.ejected = ejected.iter().map(|index| format!("w{index}").into()).collect();
        inputs.tried = tried.iter().map(|index| format!("w{index}").into()).collect();
        let caller = caller(named(&mesh, "client"));
        if let Ok(route) = best_route(destination, &mesh, &caller, &mut inputs) {
            check(&route, &mesh, destination);
            for endpoint in route.endpoints() {
                assert!(!inputs.tried.contains(&endpoint.uid));
                assert_ne!(named(&mesh, &endpoint.uid).capacity, 0);
            }
        }
    }

    #[test]
    fn tunnel_target_stays_at_its_local_address(
        (text, requested, here) in (any_mesh(), destination(), 1..=WORKLOADS),
        hostname in proptest::option::of(0..=SERVICES),
    ) {
        let mesh = mesh(&text);
        let local = named(&mesh, &format!("w{here}"));
        let here = SocketAddr::from(([10, 0, 0, here], 15008));
        let authority = match hostname {
            Some(index) => Target::Hostname(format!("s{index}").into(), requested.port()),
            None => Target::Address(requested),
        };
        if let Ok(target) = inbound(&authority, here, &mesh, Some(local), "", "default") {
            assert_eq!(target.address.ip(), here.ip());
            assert_ne!(target.address.port(), 0);
        }
    }
}

/// An endpoint: whether it is in another network, its region, zone and capacity, and whether it is
/// ejected or was tried.
type EndpointCase = (bool, u8, u8, u32, bool, bool);

fn endpoint_case() -> impl Strategy<Value = EndpointCase> {
    (any::<bool>(), 0..2u8, 0..2u8, 0..3u32, any::<bool>(), proptest::bool::weighted(0.2))
}

/// The distance of an endpoint to a client in region 0 and zone 0 of this network. Nearer ones
/// compare greater.
fn nearness((far, region, zone, ..): EndpointCase, preferences: &[&str]) -> (bool, usize) {
    let near = |scope: &&&str| match **scope {
        "network" => !far,
        "region" => region == 0,
        _ => zone == 0,
    };
    match preferences {
        ["network", rest @ ..] => (!far, rest.iter().take_while(near).count()),
        all => (true, all.iter().take_while(near).count()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn selects_nearest_usable_endpoint(
        places in proptest::collection::vec(endpoint_case(), 1..12),
        preferences in proptest::sample::subsequence(vec!["network", "region", "zone"], 0..=3).prop_shuffle(),
        (strict, seed) in (any::<bool>(), any::<u64>()),
    ) {
        let mode = if strict { "strict" } else { "failover" };
        let prefer = if preferences.is_empty() { String::new() } else { format!("prefer={}", preferences.join(",")) };
        let mut text = format!(
            "workload client ip=10.0.7.1 region=0 zone=0\n\
             service default/s vip=/10.1.0.1 sans=team mode={mode} {prefer}\n"
        );
        let mut inputs = FixedInputs::new(seed);
        for (index, (far, region, zone, capacity, ejected, tried)) in places.iter().enumerate() {
            let far = if *far { "net=far gateway=/10.0.7.1@15009" } else { "" };
            text.push_str(&format!(
                "workload w{index} ip=10.0.0.{index} {far} region={region} zone={zone} capacity={capacity} of=default/s\n"
            ));
            let lists = [(ejected, &mut inputs.ejected), (tried, &mut inputs.tried)];
            for (_, list) in lists.into_iter().filter(|(is, _)| **is) {
                list.push(format!("w{index}").into());
            }
        }
        let here = nearness((false, 0, 0, 1, false, false), &preferences);
        let fit = |place: &&EndpointCase| {
            let near = !strict || nearness(**place, &preferences) == here;
            place.3 > 0 && !place.5 && near
        };
        let quality = |place: &EndpointCase| (!place.4, nearness(*place, &preferences));
        let best = places.iter().filter(fit).map(quality).max();
        let mesh = mesh(&text);
        let route = best_route(([10, 1, 0, 1], 80).into(), &mesh, &caller(named(&mesh, "client")), &mut inputs);
        let chosen = match &route {
            Ok(Route { endpoint: Some(endpoint), .. }) => endpoint.uid.strip_prefix('w').unwrap().parse().ok(),
            Ok(_) => Some(0),
            Err(_) => None,
        };
        let chosen = chosen.map(|index: usize| &places[index]);
        assert!(chosen.is_none_or(|chosen| fit(&chosen)));
        assert_eq!(chosen.map(quality), best);
    }
}

fn check(route: &Route, mesh: &Mesh, destination: SocketAddr) {
    let workload = route.workload.as_deref();
    match &route.via {
        ForwardVia::Plain { to } => {
            assert!(workload.is_none_or(|workload| workload.protocol == Protocol::Tcp));
            // A service may identify one of the workloads that share a node's address.
            let is_shared =
                workload.is_some_and(|known| known.network_mode == NetworkMode::HostNetwork);
            if let NextHop::Address(address) = to {
                assert!(is_shared || !mesh.speaks_hbone("", address.ip()));
            }
            assert!(workload.is_some() || *to == NextHop::Address(destination));
            assert!(workload.is_none_or(|known| is_at(known, to) && known.network.is_empty()));
        }
        ForwardVia::Tunnel { to, peers, .. } => {
            let workload = workload.unwrap();
            assert!(peers.contains(&workload.identity));
            assert!(is_at(workload, to) && workload.network.is_empty());
        }
        ForwardVia::DoubleTunnel { gateway, gateway_peers, peers, .. } => {
            let workload = workload.unwrap();
            assert!(gateway_peers.contains(&workload.identity) && is_at(workload, gateway));
            assert!(!peers.is_empty() && route.service.is_some());
        }
    }
}

fn is_at(workload: &Workload, hop: &NextHop) -> bool {
    match hop {
        NextHop::Address(address) => workload.addresses.contains(&address.ip()),
        NextHop::Hostname { hostname, .. } => *hostname == workload.hostname,
    }
}
