//! The addresses that the mesh has for a name. Pure.
//!
//! The order and the forms of names are ztunnel's, so that an application sees the same answers:
//! the name itself, its completion to the name of a Kubernetes service, then the same without a
//! domain of the search path. Each is looked up exactly, then as a wildcard, most specific first.

use std::net::IpAddr;

use underpass_config::{Lookup, Mesh, Service};

use super::message::RecordType;
use super::name::DomainName;
use crate::decide::lookups::{hostname, kubernetes_namespace};

/// Names with more labels are not looked up in the mesh: each label costs lookups of wildcards.
const MAX_LABELS: usize = 32;

/// The properties of a pod that its answers depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PodView {
    pub(super) namespace: String,
    pub(super) network: String,
    /// The domain of Kubernetes services, such as `cluster.local`.
    pub(super) domain: String,
    /// Whether connections to IPv6 addresses are captured.
    pub(super) ipv6: bool,
}

/// The addresses of a name in the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    /// Those of the requested family. It may have none, although the name exists.
    pub(super) addresses: Vec<IpAddr>,
    /// The number of labels of the name without the domain of the search path, to which a CNAME
    /// record points.
    pub(super) alias: Option<usize>,
}

/// A name under which a query may be found.
struct Candidate {
    name: String,
    /// The number of labels that are left without a domain of the search path.
    stripped: Option<usize>,
}

/// Looks up a name for a pod. Addresses of types other than A and AAAA are never found. `None`: the
/// mesh does not know the name, or has no address for it.
pub(super) fn find(
    mesh: &Mesh,
    pod: &PodView,
    search: &[String],
    name: &DomainName,
    kind: RecordType,
) -> Option<Found> {
    if !is_findable(name) {
        return None;
    }
    // Most names of the mesh are complete: the others are not made.
    let complete = Candidate { name: name.as_str().to_owned(), stripped: None };
    of_candidate(mesh, pod, &complete, kind).or_else(|| {
        let mut others = candidates(name, pod, search).into_iter().skip(1);
        others.find_map(|candidate| of_candidate(mesh, pod, &candidate, kind))
    })
}

fn of_candidate(
    mesh: &Mesh,
    pod: &PodView,
    candidate: &Candidate,
    kind: RecordType,
) -> Option<Found> {
    let Some((service, is_wildcard)) = exact_or_wildcard(mesh, pod, &candidate.name) else {
        return of_headless_pod(mesh, pod, candidate, kind);
    };
    let addresses = addresses(service, pod)?;
    let alias = candidate.stripped.filter(|_| !is_wildcard);
    Some(Found { addresses: of_kind(addresses, pod, kind), alias })
}

/// The lookups on demand of a name, of the wildcards for it, and of the headless service for the
/// name of its pod. None without lookups on demand.
pub(super) fn lookups(
    mesh: &Mesh,
    pod: &PodView,
    search: &[String],
    name: &DomainName,
) -> Vec<Lookup> {
    let PodView { network, namespace, .. } = pod;
    if !is_findable(name) {
        return Vec::new();
    }
    let mut lookups = Vec::new();
    let mut add = |name: &str| lookups.extend(hostname(mesh, network, namespace, name));
    for Candidate { name, .. } in candidates(name, pod, search) {
        add(&name);
        let service = name.split_once('.').map(|(_, service)| service);
        if let Some(service) = service.filter(|name| kubernetes_namespace(name).is_some()) {
            add(service);
        }
        wildcards(&name).for_each(|wildcard| add(&wildcard));
    }
    lookups
}

fn is_findable(name: &DomainName) -> bool {
    name.is_plain() && (1..=MAX_LABELS).contains(&name.labels())
}

/// The service with this hostname, or the most specific wildcard for it.
fn exact_or_wildcard<'a>(
    mesh: &'a Mesh,
    pod: &PodView,
    hostname: &str,
) -> Option<(&'a Service, bool)> {
    let with_addresses = |service: &Service| is_answerable(service, pod);
    let named = |name: &str| mesh.service_named(name, &pod.namespace, with_addresses);
    if let Some(service) = named(hostname) {
        return Some((service, false));
    }
    wildcards(hostname).find_map(|wildcard| named(&wildcard)).map(|service| (&**service, true))
}

/// The wildcards that match a hostname, most specific first.
fn wildcards(hostname: &str) -> impl Iterator<Item = String> {
    let mut rest = hostname;
    std::iter::from_fn(move || {
        (_, rest) = rest.split_once('.')?;
        Some(format!("*.{rest}"))
    })
}

/// Whether the mesh has the addresses of a service. Of a service outside of Kubernetes without a
/// virtual address, the pod's own servers know them.
fn is_answerable(service: &Service, pod: &PodView) -> bool {
    !service.vips.is_empty() || is_headless(service, pod)
}

fn is_headless(service: &Service, pod: &PodView) -> bool {
    let kubernetes = service.hostname.strip_suffix(&*pod.domain);
    service.vips.is_empty() && kubernetes.is_some_and(|rest| rest.ends_with(".svc."))
}

/// The addresses of a service for a pod; `None` if the mesh has no endpoint of a headless service.
fn addresses(service: &Service, pod: &PodView) -> Option<Vec<IpAddr>> {
    if !service.vips.is_empty() {
        let vips = service.vips.iter().filter(|vip| *vip.network == pod.network);
        return Some(vips.map(|vip| vip.address).collect());
    }
    let mut addresses = Vec::new();
    let families = service.ip_families;
    let usable = service.endpoints.iter().map(|endpoint| &endpoint.workload).filter(|workload| {
        let is_ready = workload.healthy || service.load_balancing.allow_unhealthy;
        is_ready && *workload.network == pod.network
    });
    for workload in usable {
        for is_v6 in [false, true] {
            let mut of_family = workload.addresses.iter().filter(|one| one.is_ipv6() == is_v6);
            addresses.extend(of_family.find(|address| families.accept(**address)).copied());
        }
    }
    let known = service.endpoints.iter().any(|endpoint| !endpoint.workload.addresses.is_empty());
    known.then_some(addresses)
}

/// The addresses of `POD.SERVICE.NAMESPACE.svc.DOMAIN`, if the service is headless.
fn of_headless_pod(
    mesh: &Mesh,
    pod: &PodView,
    candidate: &Candidate,
    kind: RecordType,
) -> Option<Found> {
    let (name, service) = candidate.name.split_once('.')?;
    let service = mesh.service_named(service, &pod.namespace, |one| is_headless(one, pod))?;
    let mut workloads = service.endpoints.iter().map(|endpoint| &endpoint.workload);
    let workload = workloads.find(|one| *one.name == *name && *one.network == pod.network)?;
    let addresses = workload.addresses.iter().copied();
    let addresses = addresses.filter(|address| service.ip_families.accept(*address)).collect();
    Some(Found { addresses: of_kind(addresses, pod, kind), alias: candidate.stripped })
}

fn of_kind(mut addresses: Vec<IpAddr>, pod: &PodView, kind: RecordType) -> Vec<IpAddr> {
    addresses.retain(|address| match address {
        IpAddr::V4(_) => kind == RecordType::A,
        IpAddr::V6(_) => kind == RecordType::AAAA && pod.ipv6,
    });
    addresses
}

/// The names to look up, in order.
fn candidates(name: &DomainName, pod: &PodView, search: &[String]) -> Vec<Candidate> {
    let mut all = Vec::new();
    add_with_completions(&mut all, name.as_str(), None, pod);
    for domain in search {
        let stripped = name.as_str().strip_suffix(&**domain);
        if let Some(stripped) = stripped.and_then(|rest| rest.strip_suffix('.')) {
            let labels = stripped.split('.').count();
            add_with_completions(&mut all, stripped, Some(labels), pod);
        }
    }
    all
}

/// Adds a name, and the names of Kubernetes services that it abbreviates.
fn add_with_completions(
    all: &mut Vec<Candidate>,
    name: &str,
    stripped: Option<usize>,
    PodView { namespace, domain, .. }: &PodView,
) {
    let is_svc = name.ends_with(".svc");
    let completions = match name.split('.').count() {
        1 => vec![format!("{name}.{namespace}.svc.{domain}")],
        // A service and its namespace; or a pod and its service.
        2 => vec![format!("{name}.svc.{domain}"), format!("{name}.{namespace}.svc.{domain}")],
        3 if is_svc => vec![format!("{name}.{domain}"), format!("{name}.svc.{domain}")],
        3 => vec![format!("{name}.svc.{domain}")],
        4 if is_svc => vec![format!("{name}.{domain}")],
        _ => Vec::new(),
    };
    for name in std::iter::once(name.to_owned()).chain(completions) {
        if !all.iter().any(|known| known.name == name) {
            all.push(Candidate { name, stripped });
        }
    }
}

#[cfg(test)]
mod tests;
