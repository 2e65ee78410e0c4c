//! Services: names and virtual addresses behind which workloads stand as endpoints.

use std::cmp::Ordering;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::names::{Name, NamespacedHostname, NetworkAddress, NetworkCidr};
use super::workload::{Gateway, Workload};
use crate::SpiffeId;

/// Which port of a service leads to which port of an endpoint, sorted.
///
/// Of a service itself the second may be 0: it is called by a name, and every endpoint says for itself what that is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct PortMap(Arc<[(u16, u16)]>);

impl PortMap {
    /// The port that `port` leads to.
    pub fn get(&self, port: u16) -> Option<u16> {
        let at = self.0.binary_search_by_key(&port, |(service, _)| *service).ok()?;
        self.0.get(at).map(|(_, target)| *target)
    }

    /// Every pair.
    pub fn iter(&self) -> impl Iterator<Item = (u16, u16)> + '_ {
        self.0.iter().copied()
    }

    /// Whether there are other copies of it.
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

/// How an endpoint is chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum LoadBalancingMode {
    /// Any, by capacity.
    #[default]
    Standard,
    /// Only such as match every preference.
    Strict,
    /// Those that match the most preferences, counted from the first.
    Failover,
    /// None: the connection goes where it was meant to go.
    Passthrough,
}

/// What of an endpoint can be near to the caller.
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
    /// Where a workload is in this respect; may be empty.
    pub fn of(self, workload: &Workload) -> &Name {
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

/// How a service spreads connections over its endpoints.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoadBalancing {
    /// How an endpoint is chosen.
    pub mode: LoadBalancingMode,
    /// What is preferred, the most important first.
    pub preferences: Box<[Scope]>,
    /// Whether workloads that are not healthy are endpoints too.
    pub allow_unhealthy: bool,
}

impl LoadBalancing {
    /// What is preferred, as far as the mode asks for it.
    pub fn scopes(&self) -> &[Scope] {
        let by_distance = self.mode != LoadBalancingMode::Standard;
        if by_distance { &self.preferences } else { &[] }
    }
}

/// The address families that a service is served in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum IpFamilies {
    /// Whatever its endpoints have.
    #[default]
    Any,
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
}

impl IpFamilies {
    /// Whether an endpoint's address is of a family that the service is served in.
    pub fn accept(self, address: IpAddr) -> bool {
        match self {
            Self::Any => true,
            Self::V4 => address.is_ipv4(),
            Self::V6 => address.is_ipv6(),
        }
    }
}

/// Who can see a service.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Visibility {
    /// Everyone.
    #[default]
    Public,
    /// Workloads of its own namespace.
    Namespace,
}

/// One of several waypoints of a service, and its share of the connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightedWaypoint {
    /// The waypoint.
    pub gateway: Gateway,
    /// Its share, compared with the others'.
    pub weight: u32,
}

/// A workload behind a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// The workload.
    pub workload: Arc<Workload>,
    /// Where it serves the ports of the service; goes before the service's own.
    pub ports: PortMap,
    /// The capacities of the service's endpoints up to and with this one, added: a number between those of two of them draws
    /// an endpoint by its capacity, in a binary search.
    pub capacity_through: u64,
}

impl Endpoint {
    /// The capacities of those before it, added.
    pub fn capacity_before(&self) -> u64 {
        self.capacity_through.saturating_sub(u64::from(self.workload.capacity))
    }
}

/// One service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Its name.
    pub name: Name,
    /// Its namespace.
    pub namespace: Name,
    /// Its hostname; unique in its namespace.
    pub hostname: Name,
    /// Its virtual addresses.
    pub vips: Box<[NetworkAddress]>,
    /// Its virtual ranges of addresses.
    pub cidr_vips: Box<[NetworkCidr]>,
    /// Its ports, and those of its endpoints behind them.
    pub ports: PortMap,
    /// Who may answer for it, beside the identities of its endpoints.
    pub subject_alt_names: Box<[SpiffeId]>,
    /// The waypoint that connections to it go through.
    pub waypoint: Option<Gateway>,
    /// Several, of which each connection goes through one; they go before [`Service::waypoint`].
    pub weighted_waypoints: Box<[WeightedWaypoint]>,
    /// How connections are spread over the endpoints.
    pub load_balancing: LoadBalancing,
    /// The address families that it is served in.
    pub ip_families: IpFamilies,
    /// Whether it goes before others with the same hostname or address.
    pub canonical: bool,
    /// Who can see it.
    pub visibility: Visibility,
    /// The workloads behind it; only such as are fit to take connections. Those are together that are in the same place, as far
    /// as a place is preferred, so that [`Service::nearest`] need not look for them.
    pub endpoints: Box<[Endpoint]>,
}

impl Service {
    /// What it is called in the mesh.
    pub fn key(&self) -> NamespacedHostname {
        NamespacedHostname { namespace: self.namespace.clone(), hostname: self.hostname.clone() }
    }

    /// Whether a workload of `namespace` can see it.
    pub fn visible_to(&self, namespace: &str) -> bool {
        self.visibility == Visibility::Public || &*self.namespace == namespace
    }

    /// The endpoint that `workload` is.
    pub fn endpoint(&self, workload: &Workload) -> Option<&Endpoint> {
        let order = |endpoint: &Endpoint| self.order(&endpoint.workload, workload);
        let at = self.endpoints.binary_search_by(order).ok()?;
        self.endpoints.get(at)
    }

    /// The endpoints that match the first `count` of the preferred scopes for somebody who is at `place`.
    pub fn nearest<'a>(&self, count: usize, place: impl Fn(Scope) -> &'a str) -> &[Endpoint] {
        let scopes = self.load_balancing.scopes().iter().take(count);
        let order = |endpoint: &Endpoint| {
            let parts = scopes.clone().map(|scope| &**scope.of(&endpoint.workload));
            parts.cmp(scopes.clone().map(|scope| place(*scope)))
        };
        let first = self.endpoints.partition_point(|endpoint| order(endpoint) == Ordering::Less);
        let from = self.endpoints.get(first..).unwrap_or_default();
        let end = from.partition_point(|endpoint| order(endpoint) == Ordering::Equal);
        from.get(..end).unwrap_or_default()
    }

    /// The order of the endpoints: by what is preferred, the most important first, and then by uid.
    pub(super) fn order(&self, one: &Workload, other: &Workload) -> Ordering {
        let scopes = self.load_balancing.scopes().iter();
        let parts = scopes.map(|scope| scope.of(one).cmp(scope.of(other)));
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

    /// A service with 81 endpoints, in three regions of three zones each, on three nodes in each of these.
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
    fn the_nearest_endpoints_are_all_who_match_the_first_preferences() {
        for preferences in ["Region, Zone, Node", "Node, Region", "Cluster, Zone", "Subzone", ""] {
            let mesh = service(&format!("mode: Failover, routingPreferences: [{preferences}]"));
            let service = &mesh.services()[0];
            let scopes = service.load_balancing.scopes();
            for count in 0..=scopes.len() {
                let near = |endpoint: &&Endpoint| {
                    let mut scopes = scopes.iter().take(count);
                    scopes.all(|scope| **scope.of(&endpoint.workload) == *place(*scope))
                };
                let expected: Vec<_> = service.endpoints.iter().filter(near).collect();
                let nearest: Vec<_> = service.nearest(count, place).iter().collect();
                assert_eq!(nearest, expected, "{count} of {preferences}");
            }
        }
    }

    #[test]
    fn whatever_is_preferred_each_endpoint_is_found_and_drawn_by_its_capacity() {
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
