//! Test meshes, described by one line for each workload and service, and repeatable random choices.
//!
//! `workload NAME ip=A,A net=N ns=N host=H hbone hostnetwork unhealthy capacity=N waypoint=GW
//! gateway=GW tunnel=PORT proxy region=R zone=Z subzone=S node=N cluster=C of=NS/HOST{80:8080,..}`
//! and `service NS/HOST vip=NET/A,.. cidr=NET/A/LEN ports=80:8080,.. sans=NAME,.. waypoint=GW
//! weighted=GW*W,.. mode=failover prefer=network,.. families=v4 unhealthy canonical private`; a
//! gateway is `NET/A@PORT` or `NS/HOST@PORT`.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use underpass_config::{
    ApplicationTunnel, Gateway, GatewayDestination, IpFamilies, LoadBalancing, LoadBalancingMode,
    Locality, Mesh, MeshBuilder, Name, NamespacedHostname, NetworkMode, PortMap, Protocol, Scope,
    Service, SpiffeId, TunnelHeader, Visibility, WeightedWaypoint, Workload, WorkloadDraft,
    WorkloadType,
};
use underpass_interception::OriginalDestination;

use super::outbound::route;
use super::{Authority, Caller, ForwardVia, NextHop, Route, RouteError, SelectionInputs};
use crate::decide::endpoint_health::EndpointKey;

/// Parses the mesh that `text` describes.
pub(super) fn mesh(text: &str) -> Mesh {
    let mut builder = MeshBuilder::default();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        match line.split_once(' ').unwrap() {
            ("workload", rest) => builder.workload(workload(&TestLine::new(rest))),
            ("service", rest) => builder.service(service(&TestLine::new(rest))),
            (other, _) => panic!("{other}"),
        }
    }
    builder.build().unwrap()
}

/// One line: a name and its attributes.
struct TestLine<'a> {
    name: &'a str,
    rest: Vec<&'a str>,
}

impl<'a> TestLine<'a> {
    fn new(line: &'a str) -> Self {
        let mut words = line.split_whitespace();
        Self { name: words.next().unwrap(), rest: words.collect() }
    }

    fn all(&self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.rest.iter().filter_map(move |word| word.strip_prefix(key)?.strip_prefix('='))
    }

    fn get(&self, key: &'a str) -> Option<&'a str> {
        self.all(key).next()
    }

    fn name(&self, key: &'a str) -> Name {
        self.get(key).unwrap_or_default().into()
    }

    fn list(&self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.get(key).into_iter().flat_map(|list| list.split(','))
    }

    fn has(&self, flag: &str) -> bool {
        self.rest.contains(&flag)
    }
}

fn gateway(text: &str) -> Gateway {
    let (destination, port) = text.split_once('@').unwrap();
    let destination = match destination.parse() {
        Ok(address) => GatewayDestination::Address(address),
        Err(_) => GatewayDestination::Hostname(destination.parse().unwrap()),
    };
    Gateway { destination, hbone_port: port.parse().unwrap() }
}

fn ports(text: &str) -> PortMap {
    let pair = |pair: &str| {
        let (one, other) = pair.split_once(':').unwrap();
        (one.parse().unwrap(), other.parse().unwrap())
    };
    text.split(',').filter(|pair| !pair.is_empty()).map(pair).collect()
}

/// The SPIFFE ID of `name`.
pub(super) fn identity(name: &str) -> SpiffeId {
    format!("spiffe://td/ns/default/sa/{name}").parse().unwrap()
}

fn workload(words: &TestLine<'_>) -> WorkloadDraft {
    let tunnel = words.get("tunnel").map(|port| ApplicationTunnel {
        header: if words.has("proxy") { TunnelHeader::Proxy } else { TunnelHeader::None },
        port: (port != "any").then(|| port.parse().unwrap()),
    });
    let choose = |flag: bool, one, other| if flag { one } else { other };
    let workload = Workload {
        uid: words.name.into(),
        name: words.name.into(),
        namespace: words.get("ns").unwrap_or("default").into(),
        service_account: words.name.into(),
        identity: identity(words.name),
        network: words.name("net"),
        addresses: words.list("ip").map(|ip| ip.parse().unwrap()).collect(),
        hostname: words.name("host"),
        network_mode: if words.has("hostnetwork") {
            NetworkMode::HostNetwork
        } else {
            NetworkMode::Standard
        },
        protocol: choose(words.has("hbone"), Protocol::Hbone, Protocol::Tcp),
        waypoint: words.get("waypoint").map(|text| Arc::new(gateway(text))),
        network_gateway: words.get("gateway").map(|text| Arc::new(gateway(text))),
        application_tunnel: tunnel,
        healthy: !words.has("unhealthy"),
        capacity: words.get("capacity").map_or(1, |text| text.parse().unwrap()),
        policies: Box::default(),
        services: Box::default(),
        workload_name: words.name.into(),
        workload_type: WorkloadType::Pod,
        canonical_name: "".into(),
        canonical_revision: "".into(),
        cluster_id: words.name("cluster"),
        node: words.name("node"),
        locality: Arc::new(Locality {
            region: words.name("region"),
            zone: words.name("zone"),
            subzone: words.name("subzone"),
        }),
    };
    let endpoint_of = |text: &str| match text.split_once('{') {
        Some((name, map)) => (name.parse().unwrap(), ports(map.trim_end_matches('}'))),
        None => (text.parse().unwrap(), PortMap::default()),
    };
    WorkloadDraft {
        workload,
        services: words.all("of").map(endpoint_of).collect(),
        policies: vec![],
    }
}

fn service(words: &TestLine<'_>) -> Service {
    let name: NamespacedHostname = words.name.parse().unwrap();
    let weighted = |text: &str| {
        let (waypoint, weight) = text.split_once('*').unwrap();
        WeightedWaypoint { gateway: gateway(waypoint), weight: weight.parse().unwrap() }
    };
    Service {
        name: name.hostname.clone(),
        namespace: name.namespace,
        hostname: name.hostname,
        vips: words.list("vip").map(|vip| vip.parse().unwrap()).collect(),
        cidr_vips: words.list("cidr").map(|cidr| cidr.parse().unwrap()).collect(),
        ports: ports(words.get("ports").unwrap_or("80:8080")),
        subject_alt_names: words.list("sans").map(identity).collect(),
        waypoint: words.get("waypoint").map(gateway),
        weighted_waypoints: words.list("weighted").map(weighted).collect(),
        load_balancing: LoadBalancing {
            mode: match words.get("mode") {
                None => LoadBalancingMode::Standard,
                Some("strict") => LoadBalancingMode::Strict,
                Some("failover") => LoadBalancingMode::Failover,
                Some(_) => LoadBalancingMode::Passthrough,
            },
            preferences: words.list("prefer").map(scope).collect(),
            allow_unhealthy: words.has("unhealthy"),
        },
        ip_families: match words.get("families") {
            None => IpFamilies::Any,
            Some("v4") => IpFamilies::V4,
            Some(_) => IpFamilies::V6,
        },
        canonical: words.has("canonical"),
        visibility: if words.has("private") { Visibility::Namespace } else { Visibility::Public },
        endpoints: Box::default(),
    }
}

fn scope(text: &str) -> Scope {
    match text {
        "region" => Scope::Region,
        "zone" => Scope::Zone,
        "subzone" => Scope::Subzone,
        "node" => Scope::Node,
        "cluster" => Scope::Cluster,
        _ => Scope::Network,
    }
}

/// The workload with this name.
pub(super) fn named<'m>(mesh: &'m Mesh, name: &str) -> &'m Arc<Workload> {
    mesh.workloads().into_iter().find(|workload| &*workload.name == name).unwrap()
}

/// The caller of a connection from `workload`.
pub(super) fn caller(workload: &Workload) -> Caller<'_> {
    Caller {
        network: &workload.network,
        namespace: &workload.namespace,
        workload: Some(workload),
        address: workload
            .addresses
            .first()
            .copied()
            .unwrap_or_else(|| IpAddr::from([127, 0, 0, 1])),
        identity: Some(&workload.identity),
        hbone_port: 15008,
    }
}

/// The best route to `destination`.
pub(super) fn best_route(
    destination: SocketAddr,
    mesh: &Mesh,
    caller: &Caller<'_>,
    inputs: &mut impl SelectionInputs,
) -> Result<Route, RouteError> {
    route(OriginalDestination::new(destination), mesh, caller, inputs)
}

/// Repeatable random numbers, and the configured state of endpoints.
#[derive(Debug)]
pub(super) struct FixedInputs {
    pub(super) random: fastrand::Rng,
    pub(super) open: HashMap<Name, u32>,
    pub(super) ejected: Vec<Name>,
    pub(super) tried: Vec<Name>,
}

impl FixedInputs {
    pub(super) fn new(seed: u64) -> Self {
        let random = fastrand::Rng::with_seed(seed);
        Self { random, open: HashMap::new(), ejected: vec![], tried: vec![] }
    }
}

impl SelectionInputs for FixedInputs {
    fn below(&mut self, n: u64) -> u64 {
        self.random.u64(..n)
    }

    fn open_connections(&self, uid: &Name, _: u16) -> u32 {
        self.open.get(uid).copied().unwrap_or_default()
    }

    fn is_ejected(&self, uid: &Name, _: u16) -> bool {
        self.ejected.contains(uid)
    }

    fn exclude(&mut self, endpoint: EndpointKey) {
        self.tried.push(endpoint.uid);
    }

    fn is_excluded(&self, uid: &Name, _: u16) -> bool {
        self.tried.contains(uid)
    }
}

/// A route in one line: kind, next hop, `>` authority, `by` identities, and (workload, service,
/// endpoint).
pub(super) fn show(route: &Result<Route, RouteError>) -> String {
    let route = match route {
        Ok(route) => route,
        Err(RouteError::NoEndpoint { nearest, .. }) => return format!("no endpoint: {nearest:?}"),
        Err(RouteError::UnusableWorkload { workload, reason }) => {
            return format!("{} unusable: {reason:?}", workload.name);
        }
        Err(error) => return error.code().to_owned(),
    };
    let via = match &route.via {
        ForwardVia::Plain { to } => format!("plain {}", hop(to)),
        ForwardVia::Tunnel { to, peers, authority } => {
            let authority = match authority {
                Authority::KnownEndpoint(target) => target.to_string(),
                Authority::AtNextHop(port) => format!("*:{port}"),
            };
            format!("tunnel {} > {authority} by {}", hop(to), names(peers))
        }
        ForwardVia::DoubleTunnel { gateway, gateway_peers, peers, authority } => {
            let (outer, inner) = (names(gateway_peers), names(peers));
            format!("double {} by {outer} > {authority} by {inner}", hop(gateway))
        }
    };
    let mut text = via;
    let known = [
        route.workload.as_ref().map(|workload| workload.name.to_string()),
        route.service.as_ref().map(|service| service.hostname.to_string()),
        route.endpoint.as_ref().map(|endpoint| format!("{}:{}", endpoint.uid, endpoint.port)),
        route.gateway.as_ref().map(|endpoint| format!("{}:{}", endpoint.uid, endpoint.port)),
    ];
    for (sign, known) in ["@", "for ", "one ", "gateway "].into_iter().zip(known) {
        if let Some(known) = known {
            text.push_str(&format!(" {sign}{known}"));
        }
    }
    text
}

fn hop(hop: &NextHop) -> String {
    match hop {
        NextHop::Address(address) => address.to_string(),
        NextHop::Hostname { hostname, port, families, prefer_v6 } => {
            format!("{hostname}:{port}/{families:?}{}", if *prefer_v6 { "/v6" } else { "" })
        }
    }
}

fn names(peers: &[SpiffeId]) -> String {
    let name = |peer: &SpiffeId| peer.path().rsplit('/').next().unwrap_or_default().to_owned();
    peers.iter().map(name).collect::<Vec<_>>().join("+")
}
