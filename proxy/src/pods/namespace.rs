//! Rejects network namespaces that cannot be a pod's: processes in them would get the pod's
//! identity.
//!
//! The interception crate opens the files of namespaces. `state.rs` rejects a second pod of a
//! namespace.

use std::net::IpAddr;

use thiserror::Error;
use underpass_interception::{Environment, HostNamespaces, NamespaceId};

/// The reason why a network namespace cannot be the pod's.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum NamespaceError {
    #[error("the network namespace {namespace} is {description}, not a pod's")]
    Host { namespace: NamespaceId, description: &'static str },
    #[error(
        "the network namespace {namespace} has none of the pod's addresses ({}): it has {}",
        list(expected),
        list(found)
    )]
    OtherAddresses { namespace: NamespaceId, expected: Vec<IpAddr>, found: Vec<IpAddr> },
    #[error(
        "the network namespace {namespace} has the address {address}, which is that of {other} in the mesh"
    )]
    OfAnotherWorkload { namespace: NamespaceId, address: IpAddr, other: String },
}

/// Rejects the host's namespaces.
pub(crate) fn check_owner(
    hosts: &HostNamespaces,
    namespace: NamespaceId,
) -> Result<(), NamespaceError> {
    match hosts.description(namespace) {
        Some(description) => Err(NamespaceError::Host { namespace, description }),
        None => Ok(()),
    }
}

/// Rejects a namespace that has none of the pod's addresses, if these are known.
pub(crate) fn check_addresses(
    namespace: NamespaceId,
    expected: &[IpAddr],
    environment: &Environment,
) -> Result<(), NamespaceError> {
    let found = addresses(environment);
    let is_found = |address: &IpAddr| found.contains(&address.to_canonical());
    if expected.is_empty() || expected.iter().any(is_found) {
        return Ok(());
    }
    Err(NamespaceError::OtherAddresses { namespace, expected: expected.to_vec(), found })
}

/// The addresses of the namespace except for those of the loopback interface.
pub(crate) fn addresses(environment: &Environment) -> Vec<IpAddr> {
    let addresses = environment.interfaces.iter().flat_map(|interface| &interface.addresses);
    addresses.map(|network| network.addr()).filter(|address| !address.is_loopback()).collect()
}

fn list(addresses: &[IpAddr]) -> String {
    if addresses.is_empty() {
        return "none".to_owned();
    }
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use underpass_interception::Namespace;
    use underpass_interception::testing::fake_namespace;

    use super::*;

    fn parsed(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn rejects_own_namespace() {
        let hosts = HostNamespaces::read().unwrap();
        let own = Namespace::current().unwrap().id();
        let error = check_owner(&hosts, own).unwrap_err();
        assert!(matches!(error, NamespaceError::Host { .. }), "{error}");
        check_owner(&hosts, fake_namespace().unwrap().id()).unwrap();
    }

    #[test]
    fn accepts_namespace_with_one_address_of_the_pod() {
        // Has 10.0.0.1 and fd00::1.
        let environment = Environment::example();
        let check = |expected: &[&str]| {
            let id = fake_namespace().unwrap().id();
            check_addresses(id, &parsed(expected), &environment)
        };
        for expected in [&[][..], &["10.0.0.1"], &["10.0.0.9", "fd00::1"], &["::ffff:10.0.0.1"]] {
            check(expected).unwrap();
        }
        let error = check(&["10.0.0.9", "127.0.0.1"]).unwrap_err().to_string();
        assert!(error.contains("(10.0.0.9, 127.0.0.1): it has 10.0.0.1, fd00::1"), "{error}");
    }

    #[test]
    fn rejects_namespace_without_addresses() {
        let none = Environment { interfaces: Vec::new() };
        let id = fake_namespace().unwrap().id();
        let error = check_addresses(id, &parsed(&["10.0.0.1"]), &none).unwrap_err();
        assert!(error.to_string().contains("it has none"), "{error}");
    }
}
