//! Interned names, and addresses that belong to a network.

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::hash::Hash;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use equivalent::{Comparable, Equivalent};
use foldhash::fast::RandomState;
use ipnet::IpNet;

use crate::cidr::canonical;

/// An interned name: a namespace, a node, a network.
pub type Name = Arc<str>;

/// The namespace and the name of a workload. It has the order of a pair of strings, so that a pair
/// can look it up.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct NamespacedName(pub(super) Name, pub(super) Name);

impl Equivalent<NamespacedName> for (&str, &str) {
    fn equivalent(&self, NamespacedName(namespace, name): &NamespacedName) -> bool {
        *self == (&**namespace, &**name)
    }
}

impl Comparable<NamespacedName> for (&str, &str) {
    fn compare(&self, NamespacedName(namespace, name): &NamespacedName) -> Ordering {
        self.cmp(&(&**namespace, &**name))
    }
}

/// A map with a fast hash function. Keys come from the control plane and not from peers, so peers
/// cannot cause hash collisions.
pub(crate) type Map<K, V> = HashMap<K, V, RandomState>;

/// A set with the hash function of [`Map`].
pub(crate) type Set<T> = HashSet<T, RandomState>;

/// Interns strings.
#[derive(Debug, Default)]
pub(crate) struct Names(Set<Name>);

impl Names {
    /// The shared copy of `text`.
    pub(crate) fn shared(&mut self, text: &str) -> Name {
        if let Some(known) = self.0.get(text) {
            return known.clone();
        }
        let name = Name::from(text);
        self.0.insert(name.clone());
        name
    }

    /// Drops strings without other references.
    pub(crate) fn drop_unused(&mut self) {
        self.0.retain(|name| Arc::strong_count(name) > 1);
    }
}

/// Interns values.
#[derive(Debug)]
pub(crate) struct Interned<T>(Set<Arc<T>>);

impl<T> Default for Interned<T> {
    fn default() -> Self {
        Self(Set::default())
    }
}

impl<T: Eq + Hash> Interned<T> {
    /// The shared copy of `value`.
    pub(crate) fn shared(&mut self, value: T) -> Arc<T> {
        if let Some(known) = self.0.get(&value) {
            return known.clone();
        }
        let value = Arc::new(value);
        self.0.insert(value.clone());
        value
    }

    /// Drops values without other references.
    pub(crate) fn drop_unused(&mut self) {
        self.0.retain(|value| Arc::strong_count(value) > 1);
    }
}

/// An address in a network. The network with the empty name is the mesh's own.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NetworkAddress {
    /// The name of the network; may be empty.
    pub network: Name,
    /// The address; never IPv4-mapped.
    pub address: IpAddr,
}

impl NetworkAddress {
    /// Interns the name of the network.
    pub(crate) fn shared(self, names: &mut Names) -> Self {
        Self { network: names.shared(&self.network), ..self }
    }
}

/// A range of addresses in a network.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NetworkCidr {
    /// The name of the network; may be empty.
    pub network: Name,
    /// The range.
    pub cidr: IpNet,
}

/// The name of a service, or of a workload with a hostname: ztunnel's `namespace/hostname`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NamespacedHostname {
    /// The namespace; may be empty.
    pub namespace: Name,
    /// The hostname.
    pub hostname: Name,
}

impl NamespacedHostname {
    /// Parses ztunnel's `namespace/hostname`; `name` interns each part.
    pub(crate) fn read(
        text: &str,
        mut name: impl FnMut(&str) -> Name,
    ) -> Result<Self, &'static str> {
        match text.split_once('/') {
            Some((namespace, hostname)) if !hostname.is_empty() && !hostname.contains('/') => {
                Ok(Self { namespace: name(namespace), hostname: name(hostname) })
            }
            _ => Err("must be NAMESPACE/HOSTNAME, such as default/example.com"),
        }
    }
}

impl FromStr for NetworkAddress {
    type Err = &'static str;

    /// Parses ztunnel's `network/address`, such as `/10.0.0.1`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const EXPECTED: &str = "must be NETWORK/ADDRESS, such as /10.0.0.1 or remote/10.0.0.1";
        let (network, address) = text.split_once('/').ok_or(EXPECTED)?;
        let address: IpAddr = address.parse().map_err(|_| EXPECTED)?;
        Ok(Self { network: network.into(), address: address.to_canonical() })
    }
}

impl FromStr for NetworkCidr {
    type Err = &'static str;

    /// Parses `network/address/length`, such as `/10.0.0.0/8`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const EXPECTED: &str = "must be NETWORK/ADDRESS/LENGTH, such as /10.0.0.0/8";
        let (network, cidr) = text.split_once('/').ok_or(EXPECTED)?;
        let cidr: IpNet = cidr.parse().map_err(|_| EXPECTED)?;
        Ok(Self { network: network.into(), cidr: canonical(cidr) })
    }
}

impl FromStr for NamespacedHostname {
    type Err = &'static str;

    /// Parses ztunnel's `namespace/hostname`, such as `default/example.com`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::read(text, |text| text.into())
    }
}

impl fmt::Display for NetworkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.address)
    }
}

impl fmt::Display for NetworkCidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.cidr)
    }
}

impl fmt::Display for NamespacedHostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.hostname)
    }
}
