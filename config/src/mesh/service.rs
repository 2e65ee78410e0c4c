//! Services: names and virtual addresses behind which workloads stand as endpoints.

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
    /// The capacities of the service's endpoints up to and with this one, added: a number below that of the last one draws
    /// an endpoint by its capacity, in a binary search.
    pub capacity_through: u64,
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
    /// The workloads behind it, in the order of their uid; only such as are fit to take connections.
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
        let by_uid = |endpoint: &Endpoint| endpoint.workload.uid.cmp(&workload.uid);
        let at = self.endpoints.binary_search_by(by_uid).ok()?;
        self.endpoints.get(at)
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.hostname)
    }
}
