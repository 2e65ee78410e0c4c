//! Services: names and virtual addresses with workloads as endpoints.

use std::cmp::Ordering;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::names::{Name, NamespacedHostname, NetworkAddress, NetworkCidr};
use super::workload::{Gateway, Workload};
use crate::identity::spiffe::SpiffeId;

/// A sorted map from ports of a service to ports of an endpoint.
///
/// In the map of a service, target 0 is a named port, which every endpoint resolves itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct PortMap(Arc<[(u16, u16)]>);

impl PortMap {
    /// The target of `port`.
    pub fn get(&self, port: u16) -> Option<u16> {
        let at = self.0.binary_search_by_key(&port, |(service, _)| *service).ok()?;
        self.0.get(at).map(|(_, target)| *target)
    }

    /// All pairs.
    pub fn iter(&self) -> impl Iterator<Item = (u16, u16)> + '_ {
        self.0.iter().copied()
    }

    /// Whether other references to the map exist.
    pub(super) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}

impl FromIterator<(u16, u16)> for PortMap {
    fn from_iter<T: IntoIterator<Item = (u16, u16)>>(pairs: T) -> Self {
        let mut pairs: Vec<_> = pairs.into_iter().collect();
        pairs.sort_unstable();
        Self(pairs.into())
    }
}

/// The selection of an endpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum LoadBalancingMode {
    /// Any endpoint, weighted by capacity.
    #[default]
    Standard,
    /// Only endpoints that match every preference.
    Strict,
    /// The endpoints that match the most preferences, in order.
    Failover,
    /// No selection: the connection goes to its original destination.
    Passthrough,
}

/// A property of an endpoint that is compared with that of the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// [`super::Locality::region`].
    Region,
    /// [`super::Locality::zone`].
    Zone,
    /// [`super::Locality::subzone`].
    Subzone,
    /// [`Workload::node`].
    Node,
    /// [`Workload::cluster_id`].
    Cluster,
    /// [`Workload::network`].
    Network,
}

impl Scope {
    /// The workload's value; may be empty.
    pub fn value_of(self, workload: &Workload) -> &Name {
        match self {
            Self::Region => &workload.locality.region,
            Self::Zone => &workload.locality.zone,
            Self::Subzone => &workload.locality.subzone,
            Self::Node => &workload.node,
            Self::Cluster => &workload.cluster_id,
            Self::Network => &workload.network,
        }
    }
}

/// The load balancing of a service.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoadBalancing {
    /// The selection of an endpoint.
    pub mode: LoadBalancingMode,
    /// The preferences, most important first.
    pub preferences: Box<[Scope]>,
    /// Whether unhealthy workloads are selectable too.
    pub allow_unhealthy: bool,
}

impl LoadBalancing {
    /// The preferences that the mode uses.
    pub fn scopes(&self) -> &[Scope] {
        let uses_preferences = self.mode != LoadBalancingMode::Standard;
        if uses_preferences { &self.preferences } else { &[] }
    }
}

/// The address families of a service.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum IpFamilies {
    /// The families of the endpoints' addresses.
    #[default]
    Any,
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
    /// Both.
    Dual,
}

impl IpFamilies {
    /// Whether the service uses the family of an endpoint's address.
    pub fn accept(self, address: IpAddr) -> bool {
        match self {
            Self::Any | Self::Dual => true,
            Self::V4 => address.is_ipv4(),
            Self::V6 => address.is_ipv6(),
        }
    }
}

/// The workloads that can see a service.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Visibility {
    /// All workloads.
    #[default]
    Public,
    /// Workloads of the service's namespace.
    Namespace,
}

/// One of several waypoints of a service, with a weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightedWaypoint {
    /// The waypoint.
    pub gateway: Gateway,
    /// The relative weight.
    pub weight: u32,
}

/// A workload behind a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// The workload.
    pub workload: Arc<Workload>,
    /// The workload's ports, which take precedence over the service's.
    pub ports: PortMap,
    /// The sum of the capacities of the endpoints up to this one. A binary search for a random
    /// number selects an endpoint by capacity.
    pub capacity_through: u64,
}

impl Endpoint {
    /// The sum of the capacities of the endpoints before this one.
    pub fn capacity_before(&self) -> u64 {
        self.capacity_through.saturating_sub(u64::from(self.workload.capacity))
    }
}

/// One service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// The name.
    pub name: Name,
    /// The namespace.
    pub namespace: Name,
    /// The hostname, unique within the namespace.
    pub hostname: Name,
    /// The virtual addresses.
    pub vips: Box<[NetworkAddress]>,
    /// The virtual address ranges.
    pub cidr_vips: Box<[NetworkCidr]>,
    /// The ports, with the endpoints' target ports.
    pub ports: PortMap,
    /// Identities that the servers may have, in addition to those of the endpoints.
    pub subject_alt_names: Box<[SpiffeId]>,
    /// The waypoint of connections to the service.
    pub waypoint: Option<Gateway>,
    /// Weighted waypoints, of which each connection uses one. They take precedence over
    /// [`Service::waypoint`].
    pub weighted_waypoints: Box<[WeightedWaypoint]>,
    /// The load balancing.
    pub load_balancing: LoadBalancing,
    /// The address families that the service uses.
    pub ip_families: IpFamilies,
    /// Whether the service takes precedence over others with the same hostname or address.
    pub canonical: bool,
    /// The workloads that can see the service.
    pub visibility: Visibility,
    /// The selectable endpoints. Endpoints with equal preferred properties are adjacent, which
    /// [`Service::nearest`] uses.
    pub endpoints: Box<[Endpoint]>,
}

impl Service {
    /// The name in the mesh.
    pub fn key(&self) -> NamespacedHostname {
        NamespacedHostname { namespace: self.namespace.clone(), hostname: self.hostname.clone() }
    }

    /// This service with these endpoints.
    pub(super) fn with_endpoints(&self, mut endpoints: Vec<Endpoint>) -> Self {
        endpoints.sort_by(|one, other| self.order(&one.workload, &other.workload));
        let mut capacity = 0;
        for endpoint in &mut endpoints {
            capacity += u64::from(endpoint.workload.capacity);
            endpoint.capacity_through = capacity;
        }
        Self { endpoints: endpoints.into(), ..self.clone() }
    }

    /// Whether workloads of `namespace` can see the service.
    pub fn visible_to(&self, namespace: &str) -> bool {
        self.visibility == Visibility::Public || &*self.namespace == namespace
    }

    /// The endpoint of `workload`.
    pub fn endpoint(&self, workload: &Workload) -> Option<&Endpoint> {
        let order = |endpoint: &Endpoint| self.order(&endpoint.workload, workload);
        let at = self.endpoints.binary_search_by(order).ok()?;
        self.endpoints.get(at)
    }

    /// The endpoints that match the first `count` preferences of a client. `place` returns the
    /// client's properties.
    pub fn nearest<'a>(&self, count: usize, place: impl Fn(Scope) -> &'a str) -> &[Endpoint] {
        let scopes = self.load_balancing.scopes().iter().take(count);
        let order = |endpoint: &Endpoint| {
            let parts = scopes.clone().map(|scope| &**scope.value_of(&endpoint.workload));
            parts.cmp(scopes.clone().map(|scope| place(*scope)))
        };
        let first = self.endpoints.partition_point(|endpoint| order(endpoint) == Ordering::Less);
        let from = self.endpoints.get(first..).unwrap_or_default();
        let end = from.partition_point(|endpoint| order(endpoint) == Ordering::Equal);
        from.get(..end).unwrap_or_default()
    }

    /// The order of endpoints: by preferences, most important first, then by uid.
    pub(super) fn order(&self, one: &Workload, other: &Workload) -> Ordering {
        let scopes = self.load_balancing.scopes().iter();
        let parts = scopes.map(|scope| scope.value_of(one).cmp(scope.value_of(other)));
        parts.fold(Ordering::Equal, Ordering::then).then_with(|| one.uid.cmp(&other.uid))
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.hostname)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::Mesh;

    /// A service with 81 endpoints: three regions with three zones each, and three nodes per zone.
    fn service(load_balancer: &str) -> Mesh {
        let workload = |n: usize| {
            format!(
                "- {{name: w{n:02}, workloadIps: [10.0.0.{n}], services: {{default/s: {{}}}}, capacity: {}, \
                 node: n{}, locality: {{region: r{}, zone: z{}}}}}\n",
                n % 4,
                n % 3,
                n / 3 % 3,
                n / 9 % 3,
            )
        };
        let workloads: String = (0..81).map(workload).collect();
        let text = format!(
            "workloads:\n{workloads}services: [{{hostname: s, loadBalancer: {{{load_balancer}}}}}]"
        );
        Mesh::from_text("mesh.yaml", &text).unwrap()
    }

    fn place(scope: Scope) -> &'static str {
        match scope {
            Scope::Region => "r1",
            Scope::Zone => "z2",
            Scope::Node => "n0",
            _ => "Kubernetes",
        }
    }

    #[test]
    fn nearest_endpoints_match_first_preferences() {
        for preferences in ["Region, Zone, Node", "Node, Region", "Cluster, Zone", "Subzone", ""] {
            let mesh = service(&format!("mode: Failover, routingPreferences: [{preferences}]"));
            let service = &mesh.services()[0];
            let scopes = service.load_balancing.scopes();
            for count in 0..=scopes.len() {
                let near = |endpoint: &&Endpoint| {
                    let mut scopes = scopes.iter().take(count);
                    scopes.all(|scope| **scope.value_of(&endpoint.workload) == *place(*scope))
                };
                let expected: Vec<_> = service.endpoints.iter().filter(near).collect();
                let nearest: Vec<_> = service.nearest(count, place).iter().collect();
                assert_eq!(nearest, expected, "{count} of {preferences}");
            }
        }
    }

    #[test]
    fn endpoints_are_selected_by_capacity_with_any_preferences() {
        for mode in ["Standard", "Failover", "Strict"] {
            let mesh = service(&format!("mode: {mode}, routingPreferences: [Region, Zone]"));
            let service = &mesh.services()[0];
            let mut through = 0;
            for endpoint in &service.endpoints {
                assert_eq!(service.endpoint(&endpoint.workload), Some(endpoint));
                assert_eq!(endpoint.capacity_before(), through);
                through = endpoint.capacity_through;
            }
            assert_eq!(service.endpoints.len(), 81);
            let standard = mode == "Standard";
            assert_eq!(service.nearest(2, place).len(), if standard { 81 } else { 9 });
        }
    }
}
