//! The names that a decision needs if the control plane answers lookups on demand.

use std::net::{IpAddr, SocketAddr};

use underpass_config::{Lookup, Mesh, Name, NamespacedHostname, WorkloadSettings};

use crate::decide::route::Target;
use crate::decide::snapshot::Snapshot;

/// The lookups of an outbound connection from `client`: its destination, and the pod itself.
pub(crate) fn outbound(
    snapshot: &Snapshot,
    own: &WorkloadSettings,
    client: IpAddr,
    destination: IpAddr,
) -> Vec<Lookup> {
    let addresses = [destination, client].into_iter();
    addresses.flat_map(|address| snapshot.mesh.lookups_to_address(&own.network, address)).collect()
}

/// The lookups of an inbound connection to `here`: the pod itself, and the destination that a
/// tunnel requests.
pub(crate) fn inbound(
    snapshot: &Snapshot,
    own: &WorkloadSettings,
    here: SocketAddr,
    requested: Option<&Target>,
) -> Vec<Lookup> {
    let mut lookups = snapshot.mesh.lookups_to_address(&own.network, here.ip());
    match requested {
        Some(Target::Address(address)) if address.ip().to_canonical() != here.ip() => {
            lookups.extend(snapshot.mesh.lookups_to_address(&own.network, address.ip()));
        }
        Some(Target::Hostname(hostname, _)) => {
            lookups.extend(hostname_of_endpoint(snapshot, own, here.ip(), hostname));
        }
        Some(Target::Address(_)) | None => {}
    }
    lookups
}

/// The lookups of a hostname that a client in `namespace` and `network` uses. The control plane
/// looks up a hostname only with its namespace: the client's, or the one in a Kubernetes name.
pub(crate) fn hostname(mesh: &Mesh, network: &str, namespace: &str, hostname: &str) -> Vec<Lookup> {
    let of_name = kubernetes_namespace(hostname).filter(|of_name| *of_name != namespace);
    let namespaces = std::iter::once(namespace).chain(of_name);
    let names = namespaces.map(|namespace| NamespacedHostname {
        namespace: namespace.into(),
        hostname: hostname.into(),
    });
    names.flat_map(|name| mesh.lookups_to_name(network, &name)).collect()
}

/// The lookups of a hostname in a tunnel to this workload, which may be an endpoint of the service.
fn hostname_of_endpoint(
    snapshot: &Snapshot,
    own: &WorkloadSettings,
    here: IpAddr,
    requested: &Name,
) -> Vec<Lookup> {
    let local = snapshot.local(own, here);
    let services = local.into_iter().flat_map(|local| &*local.services);
    let named = services.filter(|service| service.hostname == *requested);
    let lookups = named.flat_map(|name| snapshot.mesh.lookups_to_name(&own.network, name));
    lookups.chain(hostname(&snapshot.mesh, &own.network, &own.namespace, requested)).collect()
}

/// The namespace in `SERVICE.NAMESPACE.svc.DOMAIN`.
pub(crate) fn kubernetes_namespace(hostname: &str) -> Option<&str> {
    let mut labels = hostname.split('.').skip(1);
    let namespace = labels.next()?;
    (labels.next()? == "svc").then_some(namespace)
}
