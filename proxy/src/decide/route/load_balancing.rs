//! Selects the endpoint of a service: two of the nearest are drawn by capacity, and the less loaded
//! one is selected.
//!
//! `endpoint_health.rs` counts open connections and ejections.

use std::sync::Arc;

use underpass_config::{Endpoint, LoadBalancingMode, Name, Scope, Service, Workload};

use super::{Caller, RouteError, Unusable};
use crate::decide::endpoint_health::{EndpointHealth, EndpointKey};

/// The number of random draws before all endpoints are examined. Two draws suffice unless many
/// endpoints are unusable or far, or one has almost all of the capacity.
const MAX_RANDOM_DRAWS: usize = 32;

/// The inputs of a selection other than the mesh.
pub(crate) trait SelectionInputs {
    /// A random number below `n`, which is not 0.
    fn below(&mut self, n: u64) -> u64;
    /// The number of open connections to the endpoint.
    fn open_connections(&self, uid: &Name, port: u16) -> u32;
    /// Whether the endpoint is ejected after a failure to connect: it is selected only without an
    /// alternative.
    fn is_ejected(&self, uid: &Name, port: u16) -> bool;
    /// Excludes an endpoint that was tried for the same connection.
    fn exclude(&mut self, endpoint: EndpointKey);
    /// Whether the endpoint is excluded.
    fn is_excluded(&self, uid: &Name, port: u16) -> bool;
}

/// Selects by the health of the endpoints and with random numbers.
#[derive(Debug)]
pub(crate) struct EndpointSelector<'a> {
    /// The open connections and ejections of all endpoints.
    health: &'a EndpointHealth,
    /// The endpoints that were tried for this connection.
    excluded: Vec<EndpointKey>,
}

impl<'a> EndpointSelector<'a> {
    pub(crate) fn new(health: &'a EndpointHealth) -> Self {
        Self { health, excluded: Vec::new() }
    }
}

impl SelectionInputs for EndpointSelector<'_> {
    fn below(&mut self, n: u64) -> u64 {
        fastrand::u64(..n)
    }

    fn open_connections(&self, uid: &Name, port: u16) -> u32 {
        self.health.open_connections(&EndpointKey { uid: uid.clone(), port })
    }

    fn is_ejected(&self, uid: &Name, port: u16) -> bool {
        self.health.any_ejected() && self.health.is_ejected(&EndpointKey { uid: uid.clone(), port })
    }

    fn exclude(&mut self, endpoint: EndpointKey) {
        self.excluded.push(endpoint);
    }

    fn is_excluded(&self, uid: &Name, port: u16) -> bool {
        self.excluded.iter().any(|excluded| excluded.port == port && excluded.uid == *uid)
    }
}

/// The role of the selected endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EndpointRole {
    /// The destination of the connection.
    Service,
    /// The waypoint of a service.
    ServiceWaypoint,
    /// The waypoint of a workload.
    WorkloadWaypoint,
    /// The gateway of another network.
    NetworkGateway,
}

/// An endpoint that can be selected.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate<'m> {
    pub(super) workload: &'m Arc<Workload>,
    /// The endpoint's own port.
    pub(super) port: u16,
    /// The preference of the endpoint; compared before capacity and load.
    tier: Tier,
}

/// Better tiers compare greater: first by ejection, then by distance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Tier {
    not_ejected: bool,
    rank: usize,
}

/// Selects the endpoint of `service` for a connection to its `port`.
pub(super) fn select<'m>(
    service: &'m Arc<Service>,
    port: u16,
    role: EndpointRole,
    caller: &Caller<'_>,
    inputs: &mut impl SelectionInputs,
) -> Result<Candidate<'m>, RouteError> {
    let selection = Selection { service, port, role, caller };
    selection.check_port()?;
    let mut found = None;
    let mut examined = 0;
    for matched in selection.levels() {
        let near = service.nearest(matched, |scope| selection.caller_locality(scope));
        if near.len() == examined {
            continue;
        }
        examined = near.len();
        found = selection.draw(near, matched, inputs).or_else(|| selection.search(near, inputs));
        // A farther endpoint is better than an ejected one.
        if found.is_some_and(|found| found.tier.not_ejected) {
            break;
        }
    }
    found.ok_or_else(|| selection.explain(inputs))
}

/// The parameters of one selection.
struct Selection<'m, 'a> {
    service: &'m Arc<Service>,
    port: u16,
    role: EndpointRole,
    caller: &'a Caller<'a>,
}

impl<'m> Selection<'m, '_> {
    /// Checks that the service has the port. A waypoint needs no service port for its tunnel.
    fn check_port(&self) -> Result<(), RouteError> {
        if self.is_for_waypoint() || self.service.ports.get(self.port).is_some() {
            return Ok(());
        }
        Err(RouteError::NoPort { service: self.service.clone(), port: self.port })
    }

    /// The numbers of leading preferences to match, in the order of attempts: all, then fewer.
    /// Strict mode requires all.
    fn levels(&self) -> impl Iterator<Item = usize> {
        let preferences = self.preferences().len();
        let least = if self.is_strict() { preferences } else { 0 };
        (least..=preferences).rev()
    }

    /// Draws among the endpoints that match the first `matched` preferences until it has two of the
    /// best tier. Returns `None` after too many draws, for example because many endpoints are
    /// unusable.
    fn draw(
        &self,
        near: &'m [Endpoint],
        matched: usize,
        inputs: &mut impl SelectionInputs,
    ) -> Option<Candidate<'m>> {
        let before = near.first()?.capacity_before();
        let all = near.last()?.capacity_through.saturating_sub(before);
        if all == 0 {
            return None;
        }
        let best = Tier { not_ejected: true, rank: self.rank_of(matched) };
        let mut first: Option<Candidate<'m>> = None;
        for _ in 0..MAX_RANDOM_DRAWS {
            let at = before.saturating_add(inputs.below(all));
            let index = near.partition_point(|endpoint| endpoint.capacity_through <= at);
            let drawn = self.candidate(near.get(index)?, inputs);
            let Some(drawn) = drawn.ok().filter(|drawn| drawn.tier == best) else {
                continue;
            };
            match first {
                None if near.len() == 1 => return Some(drawn),
                None => first = Some(drawn),
                Some(first) if Arc::ptr_eq(first.workload, drawn.workload) => {}
                Some(first) => return Some(less_loaded(first, drawn, inputs)),
            }
        }
        None
    }

    /// Examines all endpoints, and draws two of the best tier.
    fn search(
        &self,
        near: &'m [Endpoint],
        inputs: &mut impl SelectionInputs,
    ) -> Option<Candidate<'m>> {
        let mut best: Vec<Candidate<'m>> = Vec::new();
        for endpoint in near {
            let Ok(candidate) = self.candidate(endpoint, inputs) else { continue };
            match best.last().map(|known| candidate.tier.cmp(&known.tier)) {
                Some(std::cmp::Ordering::Less) => continue,
                Some(std::cmp::Ordering::Greater) => best.clear(),
                Some(std::cmp::Ordering::Equal) | None => {}
            }
            best.push(candidate);
        }
        let first = take_by_capacity(&mut best, inputs)?;
        match take_by_capacity(&mut best, inputs) {
            Some(second) => Some(less_loaded(first, second, inputs)),
            None => Some(first),
        }
    }

    /// The error of a service without a usable endpoint.
    fn explain(&self, inputs: &mut impl SelectionInputs) -> RouteError {
        let endpoints = self.service.endpoints.iter();
        let nearest = endpoints.filter_map(|endpoint| self.candidate(endpoint, inputs).err()).max();
        RouteError::NoEndpoint {
            service: self.service.clone(),
            port: self.port,
            nearest: nearest.unwrap_or(Unusable::NoHealthyWorkload),
        }
    }

    fn candidate(
        &self,
        endpoint: &'m Endpoint,
        inputs: &impl SelectionInputs,
    ) -> Result<Candidate<'m>, Unusable> {
        let workload = &endpoint.workload;
        let port = self.target_port(endpoint).ok_or(Unusable::NoPort)?;
        // As in ztunnel, an endpoint of capacity 0 gets no connection, even if all have capacity 0.
        if workload.capacity == 0 {
            return Err(Unusable::NoCapacity);
        }
        self.check_reachable(workload)?;
        let rank = self.rank(workload);
        if self.is_strict() && rank < self.rank_of(self.preferences().len()) {
            return Err(Unusable::NotNear);
        }
        if inputs.is_excluded(&workload.uid, port) {
            return Err(Unusable::Tried);
        }
        let not_ejected = !inputs.is_ejected(&workload.uid, port);
        Ok(Candidate { workload, port, tier: Tier { not_ejected, rank } })
    }

    /// The port to dial: the endpoint's, else the service's. A waypoint with an application tunnel
    /// accepts every port. The number of a named port is not known in another network, whose
    /// gateway needs only the port of the service.
    fn target_port(&self, endpoint: &Endpoint) -> Option<u16> {
        let of_service = self.service.ports.get(self.port);
        let tunnel = endpoint.workload.application_tunnel;
        let of_tunnel = tunnel.filter(|tunnel| self.is_for_waypoint() && tunnel.port.is_some());
        let of_tunnel = of_tunnel.map(|_| self.port);
        let exists = of_service.or(of_tunnel).is_some();
        let of_endpoint = endpoint.ports.get(self.port).filter(|_| exists);
        let is_away = *endpoint.workload.network != *self.caller.network;
        let of_gateway = of_endpoint.filter(|_| is_away).map(|_| self.port);
        let ports = [of_endpoint, of_service, of_tunnel, of_gateway];
        ports.into_iter().flatten().find(|port| *port != 0)
    }

    fn is_for_waypoint(&self) -> bool {
        matches!(self.role, EndpointRole::ServiceWaypoint | EndpointRole::WorkloadWaypoint)
    }

    fn check_reachable(&self, workload: &Workload) -> Result<(), Unusable> {
        let here = *workload.network == *self.caller.network;
        match self.role {
            EndpointRole::Service | EndpointRole::ServiceWaypoint if !here => {
                check_behind_gateway(workload, Some(self.service))
            }
            EndpointRole::WorkloadWaypoint if !here => Err(Unusable::OtherNetwork),
            _ => check_address(workload, self.service),
        }
    }

    /// The number of leading preferences that the workload matches.
    ///
    /// As in ztunnel, if the network is the first preference, every endpoint of the caller's
    /// network precedes all others. Endpoints of other networks are compared by the remaining
    /// preferences.
    fn rank(&self, workload: &Workload) -> usize {
        let matched = |scopes: &[Scope]| {
            let near =
                |scope: &&Scope| **scope.value_of(workload) == *self.caller_locality(**scope);
            scopes.iter().take_while(near).count()
        };
        match (matched(self.preferences()), self.preferences()) {
            (0, [Scope::Network, rest @ ..]) => matched(rest),
            (matched, _) => self.rank_of(matched),
        }
    }

    /// The rank of an endpoint that matches exactly the first `matched` preferences.
    fn rank_of(&self, matched: usize) -> usize {
        match (matched, self.preferences()) {
            (0, [Scope::Network, rest @ ..]) => rest.len(),
            (_, [Scope::Network, rest @ ..]) => rest.len() + matched,
            _ => matched,
        }
    }

    fn preferences(&self) -> &'m [Scope] {
        self.service.load_balancing.scopes()
    }

    fn is_strict(&self) -> bool {
        self.service.load_balancing.mode == LoadBalancingMode::Strict
    }

    /// The caller's value of `scope`. As in ztunnel, two unknown values are equal.
    fn caller_locality(&self, scope: Scope) -> &str {
        match (scope, self.caller.workload) {
            (Scope::Network, _) => self.caller.network,
            (_, Some(workload)) => scope.value_of(workload),
            (_, None) => "",
        }
    }
}

/// Checks that a workload of this network can be dialled for `service`.
fn check_address(workload: &Workload, service: &Service) -> Result<(), Unusable> {
    let fits = |address: &std::net::IpAddr| service.ip_families.accept(*address);
    if !workload.hostname.is_empty() || workload.addresses.iter().any(fits) {
        Ok(())
    } else if workload.addresses.is_empty() {
        Err(Unusable::NoAddress)
    } else {
        Err(Unusable::NoAddressOfFamily)
    }
}

/// Checks that a workload of another network can be reached through its gateway.
pub(super) fn check_behind_gateway(
    workload: &Workload,
    service: Option<&Arc<Service>>,
) -> Result<(), Unusable> {
    if workload.network_gateway.is_none() {
        return Err(Unusable::NoGateway);
    }
    match service {
        Some(service) if !service.subject_alt_names.is_empty() => Ok(()),
        _ => Err(Unusable::NoSubjectAltNames),
    }
}

/// Draws a candidate by capacity and removes it.
fn take_by_capacity<'m>(
    candidates: &mut Vec<Candidate<'m>>,
    inputs: &mut impl SelectionInputs,
) -> Option<Candidate<'m>> {
    let capacity = |candidate: &Candidate<'_>| u64::from(candidate.workload.capacity);
    let all: u64 = candidates.iter().map(capacity).sum();
    if all == 0 {
        return None;
    }
    let mut at = inputs.below(all);
    let index = candidates.iter().position(|candidate| {
        let found = at < capacity(candidate);
        at = at.saturating_sub(capacity(candidate));
        found
    });
    index.map(|index| candidates.swap_remove(index))
}

/// The candidate with fewer connections relative to its capacity; the first if they are equal.
fn less_loaded<'m>(
    first: Candidate<'m>,
    second: Candidate<'m>,
    inputs: &impl SelectionInputs,
) -> Candidate<'m> {
    // Multiplying by the other's capacity compares the ratios without a division.
    let load = |one: Candidate<'_>, other: Candidate<'_>| {
        let open = inputs.open_connections(&one.workload.uid, one.port);
        u64::from(open) * u64::from(other.workload.capacity)
    };
    if load(second, first) < load(first, second) { second } else { first }
}
